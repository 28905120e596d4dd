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

template <class Decoder, int ROWS, int J>
inline void accumulate(const Decoder& decoder, const uint8_t* unit, int half, const float* const* x, V (&sum)[ROWS][2]) {
  const V w = decoder.template value<J>(unit, half);
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) sum[r][J & 1] = V::fma(w, V::broadcast(x[r] + J), sum[r][J & 1]);
}

template <class Decoder, int ROWS>
inline void tile(const GroupedArgs& args, int64_t panel, int half, int64_t row) {
  const uint8_t* codes = args.codes + panel * args.units * Decoder::BYTES;
  const int64_t stride = args.units * UNIT, first = panel * PANEL + half * V::LANES;
  const Decoder decoder(args);
  V total[ROWS];
  const float *x[ROWS], *x_sums[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    const int64_t from = args.x_rows ? args.x_rows[row + r] : row + r;
    total[r] = V::zero();
    x[r] = args.x + from * stride;
    x_sums[r] = args.x_sums + from * args.groups;
  }
  const bool sums = args.x_sums != nullptr;
  int64_t unit = 0;
  for (int64_t g = 0; g < args.groups; ++g) {
    V sum[ROWS][2];
    for (int r = 0; r < ROWS; ++r) sum[r][0] = sum[r][1] = V::zero();
    for (const int64_t end = args.group_ends[g]; unit < end; ++unit) {
      const uint8_t* at = codes + unit * Decoder::BYTES;
      accumulate<Decoder, ROWS, 0>(decoder, at, half, x, sum);
      accumulate<Decoder, ROWS, 1>(decoder, at, half, x, sum);
      accumulate<Decoder, ROWS, 2>(decoder, at, half, x, sum);
      accumulate<Decoder, ROWS, 3>(decoder, at, half, x, sum);
      accumulate<Decoder, ROWS, 4>(decoder, at, half, x, sum);
      accumulate<Decoder, ROWS, 5>(decoder, at, half, x, sum);
      accumulate<Decoder, ROWS, 6>(decoder, at, half, x, sum);
      accumulate<Decoder, ROWS, 7>(decoder, at, half, x, sum);
      for (int r = 0; r < ROWS; ++r) x[r] += UNIT;
    }
    const int64_t place = (panel * args.groups + g) * PANEL + half * V::LANES;
    const V scale = load_scale(args, place, first);
    for (int r = 0; r < ROWS; ++r) {
      V dot = sum[r][0] + sum[r][1];
      if (sums) dot = dot - load_zero(args, place) * V::set(x_sums[r][g]);
      total[r] = V::fma(scale, dot, total[r]);
    }
  }
  const int64_t left = args.n - first, count = left < V::LANES ? left : V::LANES;
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
inline void panels_of(const GroupedArgs& args, int64_t panel, int64_t panel_end, int64_t row, int64_t row_end) {
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
