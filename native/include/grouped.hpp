// Linear with grouped scales, written once over a vector type `V` that the including file defines before:
//   V::LANES, V::zero(), V::broadcast(const float*), V::set(float), V::fma(a, b, c) = a * b + c, V::load(const float*),
//   V::load_half, V::load_bf16(const uint16_t*), V::load_int16(const int16_t*), store(float*), operators + - *
// and over decoders with BYTES (per unit) and value<j>(unit, half), the LANES weights of in feature j.
// Everything has internal linkage.
//
// The order of summation of one output does not depend on the tile, the thread or the other rows: each group has two
// partial sums (even and odd in features), groups are added in order.
#pragma once
#include <algorithm>

#include "scalar.hpp"

namespace bitgrain {
namespace {

constexpr int64_t ROW_BLOCK_BYTES = 1 << 20;
constexpr int HALVES = int(PANEL) / V::LANES;

inline V load_scale(const GroupedArgs& args, int64_t at) {
  if (args.scale_dtype == F32) return V::load(static_cast<const float*>(args.scale) + at);
  const uint16_t* raw = static_cast<const uint16_t*>(args.scale) + at;
  return args.scale_dtype == F16 ? V::load_half(raw) : V::load_bf16(raw);
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

template <class Decoder, int ROWS, int J>
inline void accumulate(const uint8_t* unit, int half, const float* const* x, V (&sum)[ROWS][2]) {
  const V w = Decoder::template value<J>(unit, half);
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) sum[r][J & 1] = V::fma(w, V::broadcast(x[r] + J), sum[r][J & 1]);
}

template <class Decoder, int ROWS>
inline void tile(const GroupedArgs& args, int64_t panel, int half, int64_t row) {
  const uint8_t* codes = args.codes + panel * args.units * Decoder::BYTES;
  const int64_t stride = args.units * UNIT;
  V total[ROWS];
  for (int r = 0; r < ROWS; ++r) total[r] = V::zero();
  const float* x[ROWS];
  for (int r = 0; r < ROWS; ++r) x[r] = args.x + (row + r) * stride;
  const bool sums = args.x_sums != nullptr;
  int64_t unit = 0;
  for (int64_t g = 0; g < args.groups; ++g) {
    V sum[ROWS][2];
    for (int r = 0; r < ROWS; ++r) sum[r][0] = sum[r][1] = V::zero();
    for (const int64_t end = args.group_ends[g]; unit < end; ++unit) {
      const uint8_t* at = codes + unit * Decoder::BYTES;
      accumulate<Decoder, ROWS, 0>(at, half, x, sum);
      accumulate<Decoder, ROWS, 1>(at, half, x, sum);
      accumulate<Decoder, ROWS, 2>(at, half, x, sum);
      accumulate<Decoder, ROWS, 3>(at, half, x, sum);
      accumulate<Decoder, ROWS, 4>(at, half, x, sum);
      accumulate<Decoder, ROWS, 5>(at, half, x, sum);
      accumulate<Decoder, ROWS, 6>(at, half, x, sum);
      accumulate<Decoder, ROWS, 7>(at, half, x, sum);
      for (int r = 0; r < ROWS; ++r) x[r] += UNIT;
    }
    const int64_t place = (panel * args.groups + g) * PANEL + half * V::LANES;
    const V scale = load_scale(args, place);
    for (int r = 0; r < ROWS; ++r) {
      V dot = sum[r][0] + sum[r][1];
      if (sums) dot = dot - load_zero(args, place) * V::set(args.x_sums[(row + r) * args.groups + g]);
      total[r] = V::fma(scale, dot, total[r]);
    }
  }
  const int64_t first = panel * PANEL + half * V::LANES, count = std::min<int64_t>(V::LANES, args.n - first);
  for (int r = 0; r < ROWS; ++r) {
    alignas(64) float values[V::LANES];
    total[r].store(values);
    if (count > 0) store_outputs(args, row + r, first, values, count);
  }
}

template <class Decoder>
inline void panel_rows(const GroupedArgs& args, int64_t panel, int64_t row, int64_t end) {
  while (row < end) {
    const int64_t left = end - row;
    const int step = left >= 8 && V::LANES == 16 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    for (int half = 0; half < HALVES; ++half) {
      if (step == 8) tile<Decoder, 8>(args, panel, half, row);
      else if (step == 4) tile<Decoder, 4>(args, panel, half, row);
      else if (step == 2) tile<Decoder, 2>(args, panel, half, row);
      else tile<Decoder, 1>(args, panel, half, row);
    }
    row += step;
  }
}

template <class Decoder>
inline void all_panels(const GroupedArgs& args) {
  const int64_t panels = (args.n + PANEL - 1) / PANEL;
  // as many rows of x as the second-level cache keeps while all panels pass over them
  const int64_t block = std::max<int64_t>(8, (ROW_BLOCK_BYTES / (args.units * UNIT * int64_t(sizeof(float)))) & ~int64_t(7));
#pragma omp parallel num_threads(args.threads) if (panels > 1)
  for (int64_t row = 0; row < args.rows; row += block) {
#pragma omp for schedule(static) nowait
    for (int64_t panel = 0; panel < panels; ++panel) panel_rows<Decoder>(args, panel, row, std::min(args.rows, row + block));
  }
}

template <class Nibble, class Byte, class Float4, class Float5>
inline void grouped_by_kind(const GroupedArgs& args) {
  switch (args.code_kind) {
    case NIBBLE: return all_panels<Nibble>(args);
    case BYTE: return all_panels<Byte>(args);
    case E4M3: return all_panels<Float4>(args);
    default: return all_panels<Float5>(args);
  }
}

}  // namespace
}  // namespace bitgrain
