// Products of prepared rows with panels, written once over what the including file defines before:
//   V       LANES float32 numbers: zero, set, load, load_float, load_half, load_bf16, load_bytes (unsigned), load_signed, load_nibbles,
//           load_exponents, load_e4m3 (all from bytes in memory), store, fma, operator *
//   Bytes   LANES * 4 codes: load(from), store(to)
//   dots<Code, COUNT, PART, DIGITS, ROWS>(unit, x, to)  to[row][half] = the sum over the 4 COUNT in features from 4 COUNT PART on of
//           (u - zero) * (d0 + d1 / STEP + ...), as float32, where no row has more digits than DIGITS
//   MOST_DIGITS<Code>         digits that a unit of x may have
//   DIGIT_ROWS<Code, COUNT>   rows that share the codes in registers: 1, 2 or 4; rows of one digit: 4
//   what block_input.hpp asks for
//
// Sums of a unit (or of its halves) are integers, and exact; digits and units are then added in float32 in the order of K.
// A digit that is zero changes no bit, so how many are left out does not matter.  Internal linkage.
#pragma once
#include "block_input.hpp"

namespace bitgrain {
namespace {

constexpr int64_t PREFETCH_BYTES = 4096;  // ahead of the codes that one row is multiplied with

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
    case FLOAT_POINT:
      read_spans(format, per_span, record + at.minima, parts, to.minimum);
      for (int64_t part = 0; part < parts; ++part)
        for (int64_t lane = 0; lane < PANEL; lane += V::LANES)
          (V::set(-1.0f) * V::load(to.scale[part] + lane) * V::load(to.minimum[part] + lane)).store(to.minimum[part] + lane);
      return;
    default:
      std::memcpy(to.minimum, to.scale, size_t(parts) * sizeof to.scale[0]);
      return multiply_bytes(record + at.points, per_span, parts, -1.0f, to.minimum, bytes);
  }
}

// Products of one unit with ROWS rows of DIGITS digits at most: totals[row][lane] += scale * (unit . x) + minimum * sum(x).
template <class Code, int PARTS, int DIGITS_USED, int ROWS>
[[gnu::noinline]] void add_tile(const uint8_t* codes, const UnitInput* x, bool shifted, const float (*scale)[PANEL], const float (*minimum)[PANEL], float* totals) {
  each<PARTS>([&](auto part) BITGRAIN_INLINE_LAMBDA {
    V dot[ROWS][HALVES];
    dots<Code, 8 / PARTS, part, DIGITS_USED, ROWS>(codes, x, dot);
    each<ROWS>([&](auto row) BITGRAIN_INLINE_LAMBDA {
      each<HALVES>([&](auto half) BITGRAIN_INLINE_LAMBDA {
        constexpr int lane = half * V::LANES;
        float* to = totals + row * PANEL + lane;
        V total = V::fma(dot[row][half], V::load(scale[part] + lane) * V::set(x[row].scale), V::load(to));
        if (shifted) total = V::fma(V::load(minimum[part] + lane), V::set(x[row].sum[part]), total);
        total.store(to);
      });
    });
  });
}

// Under a sanitizer, whose compilation would take minutes, units have all digits: that reads whatever fewer digits read.
#ifdef BITGRAIN_FEW_TILES
constexpr bool FEW_TILES = true;
#else
constexpr bool FEW_TILES = false;
#endif

template <class Code, int PARTS, int ROWS>
inline void add_rows(int digits, const uint8_t* codes, const UnitInput* x, bool shifted, const float (*scale)[PANEL], const float (*minimum)[PANEL],
                              float* totals) {
  constexpr bool SEVERAL = ROWS <= DIGIT_ROWS<Code, 8 / PARTS>;
  if constexpr (!SEVERAL || !FEW_TILES) {
    if (!SEVERAL || digits <= 1) return add_tile<Code, PARTS, 1, ROWS>(codes, x, shifted, scale, minimum, totals);
  }
  if constexpr (SEVERAL && MOST_DIGITS<Code> > 2 && !FEW_TILES) {
    if (digits == 2) return add_tile<Code, PARTS, 2, ROWS>(codes, x, shifted, scale, minimum, totals);
    if (digits == 3) return add_tile<Code, PARTS, 3, ROWS>(codes, x, shifted, scale, minimum, totals);
  }
  if constexpr (SEVERAL) add_tile<Code, PARTS, MOST_DIGITS<Code>, ROWS>(codes, x, shifted, scale, minimum, totals);
}

inline int most_digits(const UnitInput* x, int64_t rows) {
  int most = 0;
  for (int64_t row = 0; row < rows; ++row) most = x[row].count > most ? x[row].count : most;
  return most;
}

// The same for any number of rows; `Code` is one of decoded codes.
template <class Code, int PARTS>
inline void add_unit(const uint8_t* codes, const UnitInput* x, int64_t rows, bool shifted, const float (*scale)[PANEL],
                                const float (*minimum)[PANEL], float* totals) {
  while (rows > 0) {
    int64_t size = rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
    int digits = most_digits(x, size);
    if (digits > 1 && size > DIGIT_ROWS<Code, 8 / PARTS>) {
      size = DIGIT_ROWS<Code, 8 / PARTS>;
      digits = most_digits(x, size);
    }
    if (size == 4) add_rows<Code, PARTS, 4>(digits, codes, x, shifted, scale, minimum, totals);
    else if (size == 2) add_rows<Code, PARTS, 2>(digits, codes, x, shifted, scale, minimum, totals);
    else add_rows<Code, PARTS, 1>(digits, codes, x, shifted, scale, minimum, totals);
    x += size;
    rows -= size;
    totals += size * PANEL;
  }
}

// The unsigned bytes of a unit, for many rows.
template <class Code>
inline void decode_unit(const uint8_t* codes, uint8_t* to) {
  each<8>([&](auto vector) BITGRAIN_INLINE_LAMBDA {
    each<HALVES>([&](auto half) BITGRAIN_INLINE_LAMBDA { Code::value(codes, half, vector).store(to + 64 * vector + half * Bytes::SIZE); });
  });
}

// The units of a record and one row, whose totals stay in registers.
template <class Code, int PARTS>
inline void add_record(const uint8_t* codes, const UnitInput* x, int64_t units, bool shifted, const RecordScales& scales, float* totals) {
  for (int64_t unit = 0; unit < units; ++unit, ++x, codes += Code::BYTES) {
    // what the memory's latency asks for; beyond the end of the weight nothing is read
    for (int64_t line = 0; line < Code::BYTES; line += 64) __builtin_prefetch(codes + PREFETCH_BYTES + line);
    add_rows<Code, PARTS, 1>(x->count, codes, x, shifted, scales.scale + unit * PARTS, scales.minimum + unit * PARTS, totals);
  }
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
  alignas(64) uint8_t decoded[BLOCK_UNIT * PANEL];
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
          add_record<Code, PARTS>(from + at.codes, x, inside, shifted, scales[0], totals);
          x += inside;
          continue;
        }
        for (int64_t unit = 0; unit < inside; ++unit, x += step) {
          for (int64_t p = 0; p < count; ++p) {
            decode_unit<Code>(from + p * panel_bytes + at.codes + unit * Code::BYTES, decoded);
            const int64_t part = unit * PARTS;
            add_unit<Decoded<Code>, PARTS>(decoded, x, step, shifted, scales[p].scale + part, scales[p].minimum + part, totals + p * step * PANEL);
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
