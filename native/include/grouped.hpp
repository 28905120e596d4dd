// Linear with grouped scales, written once over a vector type `V` that the including file defines before:
//   V::LANES, V::zero(), V::broadcast(const float*), V::set(float), V::fma(a, b, c) = a * b + c, V::load(const float*),
//   V::load_half, V::load_bf16(const uint16_t*), V::load_int16(const int16_t*), store(float*), operators + - *
// and over decoders, made of the arguments, with BYTES (per unit) and value<j>(unit, half), the LANES weights of in feature j.
// Everything has internal linkage.
//
// The order of summation of one output does not depend on the tile, the thread or the other rows: each group has two
// partial sums (even and odd in features), groups are added in order.
#pragma once
#include "scalar.hpp"

namespace bitgrain {
namespace {

constexpr int HALVES = int(PANEL) / V::LANES;

inline V stored_scale(const GroupedArgs& args, int64_t at) {
  if (args.scale_dtype == F32) return V::load(static_cast<const float*>(args.scale) + at);
  const uint16_t* raw = static_cast<const uint16_t*>(args.scale) + at;
  return args.scale_dtype == F16 ? V::load_half(raw) : V::load_bf16(raw);
}

// Scales of the LANES out features at `first`, in one group; `at` is their place among the scales.
inline V load_scale(const GroupedArgs& args, int64_t at, int64_t first) {
  if (args.scale == nullptr) return V::set(1.0f);
  const V scale = stored_scale(args, at);
  return args.second == nullptr ? scale : scale * V::load(args.second + first);
}

inline V load_zero(const GroupedArgs& args, int64_t at) {
  if (args.zero == nullptr) return V::set(args.zero_constant);
  if (args.zero_is_float) return V::load(static_cast<const float*>(args.zero) + at);
  return V::load_int16(static_cast<const int16_t*>(args.zero) + at);
}

inline void store_outputs(const GroupedArgs& args, int64_t row, int64_t first, const float* values, int64_t count) {
  const float row_scale = args.row_scale ? args.row_scale[row] : 1.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float bias = args.bias ? load_scalar(args.bias, first + i, args.y_dtype) : 0.0f;
    store_scalar(args.y, row * args.n + first + i, args.y_dtype, values[i] * row_scale + bias);
  }
}

inline void store_total(const GroupedArgs& args, int64_t row, int64_t first, const V& total) {
  alignas(64) float values[V::LANES];
  total.store(values);
  const int64_t left = args.n - first, count = left < V::LANES ? left : V::LANES;
  if (count > 0) store_outputs(args, row, first, values, count);
}

// ---------------------------------------------------------------- many rows: weights are decoded once for all of them

constexpr int64_t DECODED_UNITS = 32;  // whose weights are decoded at once: 16 KB of float32 in the first-level cache
constexpr int64_t DECODED_ROWS = 96;   // that share them
constexpr int64_t DECODED_FROM = 3;    // rows from which on it is faster
constexpr int64_t PREFETCHED = 2048;   // bytes before their use at which codes that are read once are asked for

struct RowInput {
  const float *x, *x_sums;
};

// What a row has added up: in the group that is open, and over the groups before.
struct Running {
  V sum[HALVES][2], total[HALVES];
};

struct GroupEnd {
  V scale[HALVES], zero[HALVES];
  int64_t group;
  bool shifted;
};

template <class Decoder>
inline void decode_units(const Decoder& decoder, const uint8_t* codes, int64_t units, float* to) {
  for (int64_t unit = 0; unit < units; ++unit, codes += Decoder::BYTES, to += UNIT * PANEL) {
    // the next units of this panel, which are decoded after these have been multiplied
    for (int64_t line = 0; line < Decoder::BYTES; line += 64) __builtin_prefetch(codes + DECODED_UNITS * Decoder::BYTES + line, 0, 2);
    for (int half = 0; half < HALVES; ++half) {
      float* lanes = to + half * V::LANES;
      decoder.template value<0>(codes, half).store(lanes);
      decoder.template value<1>(codes, half).store(lanes + PANEL);
      decoder.template value<2>(codes, half).store(lanes + 2 * PANEL);
      decoder.template value<3>(codes, half).store(lanes + 3 * PANEL);
      decoder.template value<4>(codes, half).store(lanes + 4 * PANEL);
      decoder.template value<5>(codes, half).store(lanes + 5 * PANEL);
      decoder.template value<6>(codes, half).store(lanes + 6 * PANEL);
      decoder.template value<7>(codes, half).store(lanes + 7 * PANEL);
    }
  }
}

// Adds `columns` in features from `at` on, an even number, to ROWS rows; `end` is null where the group goes on.
template <int ROWS>
__attribute__((noinline)) void add_decoded(const float* weights, int64_t columns, const RowInput* input, int64_t at, bool opens, const GroupEnd* end, Running* running) {
  V sum[ROWS][HALVES][2];
  const float* x[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    x[r] = input[r].x + at;
#pragma GCC unroll 2
    for (int half = 0; half < HALVES; ++half) {
      sum[r][half][0] = opens ? V::zero() : running[r].sum[half][0];
      sum[r][half][1] = opens ? V::zero() : running[r].sum[half][1];
    }
  }
  for (int64_t k = 0; k < columns; k += 2) {
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      V w[HALVES];
#pragma GCC unroll 2
      for (int half = 0; half < HALVES; ++half) w[half] = V::load(weights + (k + odd) * PANEL + half * V::LANES);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const V value = V::broadcast(x[r] + k + odd);
#pragma GCC unroll 2
        for (int half = 0; half < HALVES; ++half) sum[r][half][odd] = V::fma(w[half], value, sum[r][half][odd]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int half = 0; half < HALVES; ++half) {
      running[r].sum[half][0] = sum[r][half][0];
      running[r].sum[half][1] = sum[r][half][1];
      if (end == nullptr) continue;
      V dot = sum[r][half][0] + sum[r][half][1];
      if (end->shifted) dot = dot - end->zero[half] * V::set(input[r].x_sums[end->group]);
      running[r].total[half] = V::fma(end->scale[half], dot, running[r].total[half]);
    }
  }
}

inline void add_decoded_rows(const float* weights, int64_t columns, const RowInput* input, int64_t at, bool opens, const GroupEnd* end, Running* running,
                             int64_t rows) {
  for (int64_t tiles = (rows + 2) / 3; tiles > 0; --tiles) {  // as equal as can be
    const int64_t step = (rows + tiles - 1) / tiles;
    if (step == 3) add_decoded<3>(weights, columns, input, at, opens, end, running);
    else if (step == 2) add_decoded<2>(weights, columns, input, at, opens, end, running);
    else add_decoded<1>(weights, columns, input, at, opens, end, running);
    rows -= step;
    input += step;
    running += step;
  }
}

template <class Decoder>
inline void decoded_rows(const GroupedArgs& args, int64_t panel, int64_t row, int64_t rows) {
  alignas(64) float weights[DECODED_UNITS * UNIT * PANEL];
  Running running[DECODED_ROWS];
  RowInput input[DECODED_ROWS];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t from = args.x_rows ? args.x_rows[row + r] : row + r;
    input[r] = {args.x + from * args.units * UNIT, args.x_sums + from * args.groups};
    for (int half = 0; half < HALVES; ++half) running[r].total[half] = V::zero();
  }
  const Decoder decoder(args);
  const uint8_t* codes = args.codes + panel * args.units * Decoder::BYTES;
  GroupEnd close;
  close.shifted = args.x_sums != nullptr;
  int64_t unit = 0, decoded = 0, base = 0;
  for (int64_t g = 0; g < args.groups; ++g) {
    close.group = g;
    for (int half = 0; half < HALVES; ++half) {
      const int64_t place = (panel * args.groups + g) * PANEL + half * V::LANES;
      close.scale[half] = load_scale(args, place, panel * PANEL + half * V::LANES);
      close.zero[half] = close.shifted ? load_zero(args, place) : V::zero();
    }
    bool opens = true;
    do {  // once for a group without columns
      if (unit == decoded && unit < args.group_ends[g]) {
        base = unit;
        decoded = unit + DECODED_UNITS < args.units ? unit + DECODED_UNITS : args.units;
        decode_units(decoder, codes + unit * Decoder::BYTES, decoded - unit, weights);
      }
      const int64_t last = args.group_ends[g] < decoded ? args.group_ends[g] : decoded;
      add_decoded_rows(weights + (unit - base) * UNIT * PANEL, (last - unit) * UNIT, input, unit * UNIT, opens, last == args.group_ends[g] ? &close : nullptr, running,
                       rows);
      opens = false;
      unit = last;
    } while (unit < args.group_ends[g]);
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int half = 0; half < HALVES; ++half) store_total(args, row + r, panel * PANEL + half * V::LANES, running[r].total[half]);
}

template <class Decoder>
inline void decoded_panels(const GroupedArgs& args, int64_t panel, int64_t panel_end, int64_t row, int64_t row_end) {
  for (; row < row_end; row += DECODED_ROWS) {
    const int64_t left = row_end - row, rows = left < DECODED_ROWS ? left : DECODED_ROWS;
    for (int64_t at = panel; at < panel_end; ++at) decoded_rows<Decoder>(args, at, row, rows);
  }
}

// ---------------------------------------------------------------- few rows: weights are decoded in registers

template <class Decoder, int ROWS, int SIDES, int J>
inline void accumulate(const Decoder& decoder, const uint8_t* unit, int half, const float* const* x, V (&sum)[ROWS][SIDES][2]) {
#pragma GCC unroll 2
  for (int side = 0; side < SIDES; ++side) {
    const V w = decoder.template value<J>(unit, half + side);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) sum[r][side][J & 1] = V::fma(w, V::broadcast(x[r] + J), sum[r][side][J & 1]);
  }
}

// SIDES halves of a panel from `half` on; weights are decoded in registers.
template <class Decoder, int ROWS, int SIDES>
inline void tile(const GroupedArgs& args, int64_t panel, int half, int64_t row) {
  const uint8_t* codes = args.codes + panel * args.units * Decoder::BYTES;
  const int64_t stride = args.units * UNIT, first = panel * PANEL + half * V::LANES;
  const Decoder decoder(args);
  V total[ROWS][SIDES];
  const float *x[ROWS], *x_sums[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    const int64_t from = args.x_rows ? args.x_rows[row + r] : row + r;
    for (int side = 0; side < SIDES; ++side) total[r][side] = V::zero();
    x[r] = args.x + from * stride;
    x_sums[r] = args.x_sums + from * args.groups;
  }
  const bool sums = args.x_sums != nullptr;
  int64_t unit = 0;
  for (int64_t g = 0; g < args.groups; ++g) {
    V sum[ROWS][SIDES][2];
    for (int r = 0; r < ROWS; ++r)
      for (int side = 0; side < SIDES; ++side) sum[r][side][0] = sum[r][side][1] = V::zero();
    for (const int64_t end = args.group_ends[g]; unit < end; ++unit) {
      const uint8_t* at = codes + unit * Decoder::BYTES;
      if (V::LANES == 8) {
        for (int64_t line = 0; line < Decoder::BYTES; line += 64) __builtin_prefetch(at + PREFETCHED + line);
      }
      accumulate<Decoder, ROWS, SIDES, 0>(decoder, at, half, x, sum);
      accumulate<Decoder, ROWS, SIDES, 1>(decoder, at, half, x, sum);
      accumulate<Decoder, ROWS, SIDES, 2>(decoder, at, half, x, sum);
      accumulate<Decoder, ROWS, SIDES, 3>(decoder, at, half, x, sum);
      accumulate<Decoder, ROWS, SIDES, 4>(decoder, at, half, x, sum);
      accumulate<Decoder, ROWS, SIDES, 5>(decoder, at, half, x, sum);
      accumulate<Decoder, ROWS, SIDES, 6>(decoder, at, half, x, sum);
      accumulate<Decoder, ROWS, SIDES, 7>(decoder, at, half, x, sum);
      for (int r = 0; r < ROWS; ++r) x[r] += UNIT;
    }
    for (int side = 0; side < SIDES; ++side) {
      const int64_t place = (panel * args.groups + g) * PANEL + (half + side) * V::LANES;
      const V scale = load_scale(args, place, first + side * V::LANES);
      for (int r = 0; r < ROWS; ++r) {
        V dot = sum[r][side][0] + sum[r][side][1];
        if (sums) dot = dot - load_zero(args, place) * V::set(x_sums[r][g]);
        total[r][side] = V::fma(scale, dot, total[r][side]);
      }
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int side = 0; side < SIDES; ++side) store_total(args, row + r, first + side * V::LANES, total[r][side]);
}

template <class Decoder>
inline void panel_rows(const GroupedArgs& args, int64_t panel, int64_t row, int64_t end) {
  constexpr int SIDES = HALVES, TALL = V::LANES == 16 ? 8 : 4;
  while (row < end) {
    const int64_t left = end - row;
    const int step = left >= TALL ? TALL : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    if (step == 1) tile<Decoder, 1, SIDES>(args, panel, 0, row);
    else if (step == 2) tile<Decoder, 2, SIDES>(args, panel, 0, row);
    else
      for (int half = 0; half < HALVES; ++half) {
        if (step == 4) tile<Decoder, 4, 1>(args, panel, half, row);
        else tile<Decoder, TALL, 1>(args, panel, half, row);
      }
    row += step;
  }
}

template <class Decoder>
inline void panels_of(const GroupedArgs& args, int64_t panel, int64_t panel_end, int64_t row, int64_t row_end) {
  if constexpr (V::LANES == 8) {
    if (row_end - row >= DECODED_FROM) return decoded_panels<Decoder>(args, panel, panel_end, row, row_end);
  }
  for (; panel < panel_end; ++panel) panel_rows<Decoder>(args, panel, row, row_end);
}

// Decoders is a list of types by the names below.
template <class Decoders>
inline void grouped_by_kind(const GroupedArgs& args, int64_t panel, int64_t panel_end, int64_t row, int64_t row_end) {
  switch (args.code_kind) {
    case NIBBLE: return panels_of<typename Decoders::Nibble>(args, panel, panel_end, row, row_end);
    case BYTE: return panels_of<typename Decoders::Byte>(args, panel, panel_end, row, row_end);
    case E4M3: return panels_of<typename Decoders::Float4>(args, panel, panel_end, row, row_end);
    case E5M2: return panels_of<typename Decoders::Float5>(args, panel, panel_end, row, row_end);
    case TABLE4: return panels_of<typename Decoders::Table>(args, panel, panel_end, row, row_end);
    case DENSE_BF16: return panels_of<typename Decoders::DenseBf16>(args, panel, panel_end, row, row_end);
    case DENSE_F16: return panels_of<typename Decoders::DenseHalf>(args, panel, panel_end, row, row_end);
    default: return panels_of<typename Decoders::DenseFloat>(args, panel, panel_end, row, row_end);
  }
}

}  // namespace
}  // namespace bitgrain
