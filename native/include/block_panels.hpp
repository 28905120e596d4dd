// Products of prepared rows with panels, written once over what the including file defines before:
//   V       LANES float32 numbers: zero, set, load, load_float, load_half, load_bf16, load_bytes (unsigned), load_signed, load_nibbles,
//           load_exponents, load_e4m3 (all from bytes in memory), store, fma, operator *
//   Bytes   LANES * 4 codes: load(from)
//   Vectors<Code, COUNT>  the codes of COUNT vectors, decoded once for all rows: read(unit, half, first), and
//           dot(x, digit, first, correction) = the sum over 4 COUNT in features, of LANES out features, as float32; STEP
//   what block_input.hpp asks for
//
// Sums of a unit (or of its halves) are integers, and exact; digits and units are then added in float32 in the order of K.
// A digit that is zero changes no bit, so how many are left out does not matter.  Internal linkage.
#pragma once
#include "block_input.hpp"

namespace bitgrain {
namespace {

constexpr int HALVES = int(PANEL) / V::LANES;

// Scale and minimum of every part of a record, for 16 out features.
struct RecordScales {
  alignas(64) float scale[2 * RECORD_UNITS][PANEL];
  alignas(64) float minimum[2 * RECORD_UNITS][PANEL];
};

inline V load_wide(const uint8_t* from, int64_t at, int32_t dtype) {
  if (dtype == F32) return V::load_float(from + at * 4);
  return dtype == F16 ? V::load_half(from + at * 2) : V::load_bf16(from + at * 2);
}

// to[part] = the number of the part's span, one span after another
inline void read_spans(const BlockFormat& format, int64_t per_span, const uint8_t* from, int64_t parts, float (*to)[PANEL]) {
  for (int64_t part = 0, span = 0; part < parts; ++span) {
    V values[HALVES];
    for (int half = 0; half < HALVES; ++half) values[half] = load_wide(from, span * PANEL + half * V::LANES, format.scale_dtype);
    for (int64_t i = 0; i < per_span && part < parts; ++i, ++part) {
      for (int half = 0; half < HALVES; ++half) values[half].store(to[part] + half * V::LANES);
    }
  }
}

// to[part] *= read(byte of the part's group); `shared` parts have one group
template <class Read>
inline void multiply_bytes(const uint8_t* from, int64_t shared, int64_t parts, float sign, float (*to)[PANEL], Read read) {
  for (int64_t part = 0; part < parts; ++part) {
    for (int half = 0; half < HALVES; ++half) {
      const int64_t lane = half * V::LANES;
      (V::set(sign) * V::load(to[part] + lane) * read(from + part / shared * PANEL + lane)).store(to[part] + lane);
    }
  }
}

inline void multiply_sub(const BlockFormat& format, const uint8_t* from, int64_t shared, int64_t parts, float (*to)[PANEL]) {
  switch (format.sub) {
    case UNSIGNED_SUB: return multiply_bytes(from, shared, parts, 1.0f, to, [](const uint8_t* at) { return V::load_bytes(at); });
    case SIGNED_SUB: return multiply_bytes(from, shared, parts, 1.0f, to, [](const uint8_t* at) { return V::load_signed(at); });
    case NIBBLE_SUB: return multiply_bytes(from, shared, parts, 1.0f, to, [](const uint8_t* at) { return V::load_nibbles(at, false); });
    case E8M0_SUB: return multiply_bytes(from, shared, parts, 1.0f, to, [](const uint8_t* at) { return V::load_exponents(at); });
    default: return multiply_bytes(from, shared, parts, 1.0f, to, [](const uint8_t* at) { return V::load_e4m3(at); });
  }
}

inline void read_scales(const BlockFormat& format, int per_unit, const uint8_t* record, const RecordLayout& at, int64_t units, RecordScales& to) {
  const int64_t parts = units * per_unit, shared = format.group * per_unit / BLOCK_UNIT, per_span = format.span * per_unit / BLOCK_UNIT;
  if (format.span) {
    read_spans(format, per_span, record, parts, to.scale);
  } else {
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t lane = 0; lane < PANEL; lane += V::LANES) V::set(1.0f).store(to.scale[part] + lane);
  }
  if (format.sub != NO_SUB) multiply_sub(format, record + at.sub, shared, parts, to.scale);
  const auto bytes = [](const uint8_t* from) { return V::load_bytes(from); };
  switch (format.minimum) {
    case NO_MINIMUM: return;
    case ADDED_MINIMUM: return read_spans(format, per_span, record + at.minima, parts, to.minimum);
    case SCALED_MINIMUM:
      read_spans(format, per_span, record + at.minima, parts, to.minimum);
      if (format.sub != NIBBLE_SUB) return multiply_bytes(record + at.sub_minima, shared, parts, -1.0f, to.minimum, bytes);
      return multiply_bytes(record + at.sub, shared, parts, -1.0f, to.minimum, [](const uint8_t* from) { return V::load_nibbles(from, true); });
    default:
      std::memcpy(to.minimum, to.scale, size_t(parts) * sizeof to.scale[0]);
      return multiply_bytes(record + at.points, per_span, parts, -1.0f, to.minimum, bytes);
  }
}

template <class Vectors>
inline V dot_digits(const Vectors& vectors, const UnitInput& x, int part, int size) {
  if (x.count == 0) return V::zero();
  int digit = x.count - 1;
  V dot = vectors.dot(x, digit, part * size, x.correction[part][digit]);
  while (--digit >= 0) dot = V::fma(dot, V::set(Vectors::STEP), vectors.dot(x, digit, part * size, x.correction[part][digit]));
  return dot;
}

// totals[row][lane] += scale * (unit . x) + minimum * sum(x), for one unit of one panel.
template <class Code, int PARTS>
inline void add_unit(const uint8_t* codes, const UnitInput* input, int64_t rows, bool shifted, const float (*scale)[PANEL], const float (*minimum)[PANEL],
                     float* totals) {
  for (int half = 0; half < HALVES; ++half) {
    const int64_t lane = half * V::LANES;
    for (int part = 0; part < PARTS; ++part) {
      Vectors<Code, 8 / PARTS> vectors;
      vectors.read(codes, half, part * (8 / PARTS));
      const V factor = V::load(scale[part] + lane), offset = shifted ? V::load(minimum[part] + lane) : V::zero();
      for (int64_t row = 0; row < rows; ++row) {
        const UnitInput& x = input[row];
        const V dot = dot_digits(vectors, x, part, BLOCK_UNIT / PARTS);
        float* to = totals + row * PANEL + lane;
        V total = V::fma(dot, factor * V::set(x.scale), V::load(to));
        if (shifted) total = V::fma(offset, V::set(x.sum[part]), total);
        total.store(to);
      }
    }
  }
}

// The same for the units of a record and one row, whose totals stay in registers.
template <class Code, int PARTS, bool SHIFTED>
inline void add_record(const uint8_t* codes, const UnitInput* input, int64_t units, const RecordScales& scales, float* totals) {
  V total[HALVES];
  for (int half = 0; half < HALVES; ++half) total[half] = V::load(totals + half * V::LANES);
  for (int64_t unit = 0; unit < units; ++unit, codes += Code::BYTES) {
    const UnitInput& x = input[unit];
    // what the next record holds here, in time for the memory's latency
    for (int64_t line = 0; line < Code::BYTES; line += 64) __builtin_prefetch(codes + RECORD_UNITS * Code::BYTES + line);
#pragma GCC unroll 2
    for (int half = 0; half < HALVES; ++half) {
#pragma GCC unroll 2
      for (int part = 0; part < PARTS; ++part) {
        Vectors<Code, 8 / PARTS> vectors;
        vectors.read(codes, half, part * (8 / PARTS));
        const int64_t at = unit * PARTS + part, lane = half * V::LANES;
        const V dot = dot_digits(vectors, x, part, BLOCK_UNIT / PARTS);
        total[half] = V::fma(dot, V::load(scales.scale[at] + lane) * V::set(x.scale), total[half]);
        if (SHIFTED) total[half] = V::fma(V::load(scales.minimum[at] + lane), V::set(x.sum[part]), total[half]);
      }
    }
  }
  for (int half = 0; half < HALVES; ++half) total[half].store(totals + half * V::LANES);
}

inline void store_row(const BlockWeight& weight, const float* totals, int64_t first, int64_t row, const void* bias, void* y, int32_t y_dtype, int64_t y_stride) {
  const int64_t left = weight.n - first, count = left < PANEL ? left : PANEL;
  for (int64_t i = 0; i < count; ++i) {
    float value = totals[i];
    if (weight.factor) value *= weight.factor[first + i];
    if (bias) value += load_scalar(bias, first + i, y_dtype);
    store_scalar(y, row * y_stride + first + i, y_dtype, value);
  }
}

template <class Code, int PARTS>
inline void run_panels(const BlockWeight& weight, const void* input, int64_t rows, int64_t first, int64_t last, const void* bias, void* y, int32_t y_dtype,
                       int64_t y_stride) {
  const BlockFormat& format = weight.format;
  const int64_t units = weight.k / BLOCK_UNIT, records = (units + RECORD_UNITS - 1) / RECORD_UNITS;
  const RecordLayout full(format, RECORD_UNITS), tail(format, units - (records - 1) * RECORD_UNITS);
  const int64_t panel_bytes = (records - 1) * full.end + tail.end;
  const bool shifted = format.minimum != NO_MINIMUM;
  RecordScales scales[PANELS_TOGETHER];
  alignas(64) float totals[PANELS_TOGETHER * ROWS_TOGETHER * PANEL];
  for (int64_t base = 0; base < rows; base += ROWS_TOGETHER) {
    const int64_t step = rows_in_block(base, rows), together = step == 1 ? 1 : PANELS_TOGETHER;
    for (int64_t panel = first; panel < last; panel += together) {
      const int64_t count = last - panel < together ? last - panel : together;
      const UnitInput* x = aligned_input(input) + base * units;
      std::memset(totals, 0, size_t(count * step * PANEL) * sizeof(float));
      for (int64_t record = 0; record < records; ++record) {
        const RecordLayout& at = record + 1 < records ? full : tail;
        const int64_t inside = record + 1 < records ? RECORD_UNITS : units - record * RECORD_UNITS;
        const uint8_t* from = weight.data + panel * panel_bytes + record * full.end;
        for (int64_t p = 0; p < count; ++p) read_scales(format, PARTS, from + p * panel_bytes, at, inside, scales[p]);
        if (step == 1) {
          if (shifted) add_record<Code, PARTS, true>(from + at.codes, x, inside, scales[0], totals);
          else add_record<Code, PARTS, false>(from + at.codes, x, inside, scales[0], totals);
          x += inside;
          continue;
        }
        for (int64_t unit = 0; unit < inside; ++unit, x += step) {
          for (int64_t p = 0; p < count; ++p) {
            const uint8_t* codes = from + p * panel_bytes + at.codes + unit * Code::BYTES;
            add_unit<Code, PARTS>(codes, x, step, shifted, scales[p].scale + unit * PARTS, scales[p].minimum + unit * PARTS, totals + p * step * PANEL);
          }
        }
      }
      for (int64_t p = 0; p < count; ++p) {
        for (int64_t row = 0; row < step; ++row)
          store_row(weight, totals + (p * step + row) * PANEL, (panel + p) * PANEL, base + row, bias, y, y_dtype, y_stride);
      }
    }
  }
}

template <class Code>
inline void run_code(const BlockWeight& weight, const void* input, int64_t rows, int64_t first, int64_t last, const void* bias, void* y, int32_t y_dtype,
                     int64_t y_stride) {
  if (parts_of(weight.format) == 2) return run_panels<Code, 2>(weight, input, rows, first, last, bias, y, y_dtype, y_stride);
  return run_panels<Code, 1>(weight, input, rows, first, last, bias, y, y_dtype, y_stride);
}

}  // namespace
}  // namespace bitgrain
