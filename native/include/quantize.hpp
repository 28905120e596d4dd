// Activation quantization to int8, one row at a time; plain loops that the including file's flags vectorize.
// Formulas, order and rounding are those of weights/activation.py, so codes agree bit for bit.
#pragma once
#include "scalar.hpp"

namespace bitgrain {
namespace {

constexpr float LARGEST = __FLT_MAX__, EPSILON = __FLT_EPSILON__;

inline float larger(float a, float b) { return a < b ? b : a; }
inline float smaller(float a, float b) { return b < a ? b : a; }

inline void widen_range(const float* x, int64_t count, Range& range) {
  float low = range.low, high = range.high;
  bool nan = range.nan;
  for (int64_t i = 0; i < count; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
    nan |= x[i] != x[i];
  }
  range = {low, high, nan};
}

struct Grid {
  float scale, zero;
};

inline Grid make_grid(const QuantizeArgs& args, const Range& range) {
  if (args.dynamic == STATIC) return {args.static_scale, float(args.static_zero)};
  float scale = args.symmetric ? larger(-range.low, range.high) / args.top : (range.high - range.low) / 255.0f;
  if (scale == 0.0f) scale = EPSILON;
  if (args.symmetric) return {scale, 0.0f};
  return {scale, __builtin_rintf(smaller(larger(-128.0f - range.low / scale, -128.0f), 127.0f))};
}

inline void quantize_row(const QuantizeArgs& args, int64_t row, const Range& whole) {
  const float* x = args.x + row * args.k;
  uint8_t* out = args.a + row * args.quads * 4;
  Range range = whole;
  if (args.dynamic != PER_TENSOR) widen_range(x, args.k, range);
  const Grid grid = make_grid(args, range);
  if (range.nan || !(grid.scale <= LARGEST)) {
    // a NaN, or an infinite scale: no code stands for the row, so all of its outputs become NaN
    args.scale[row] = __builtin_nanf("");
    args.zero[row] = 128;
    __builtin_memset(out, 128, size_t(args.quads) * 4);
    return;
  }
  args.scale[row] = grid.scale;
  args.zero[row] = int32_t(grid.zero) + 128;
  const float inverse = 1.0f / grid.scale;
  for (int64_t i = 0; i < args.k; ++i) {
    const float moved = args.reciprocal ? __builtin_rintf(x[i] * inverse) + grid.zero : x[i] / grid.scale + grid.zero;
    // zero times the infinite reciprocal of a subnormal scale is a NaN; it stands for zero
    const float limited = moved == moved ? smaller(larger(moved, -128.0f), 127.0f) : 0.0f;
    out[i] = uint8_t(int32_t(__builtin_rintf(limited)) + 128);
  }
  // beyond K the weights are zero, so any code will do; a fixed one keeps memory checkers quiet
  for (int64_t i = args.k; i < args.quads * 4; ++i) out[i] = 128;
}

inline void quantize_rows(const QuantizeArgs& args, const Range& whole, int64_t row, int64_t row_end) {
  for (; row < row_end; ++row) quantize_row(args, row, whole);
}

inline void store_integer(const IntegerArgs& args, int64_t row, int64_t first, const int32_t* dots) {
  const int64_t left = args.n - first, count = left < PANEL ? left : PANEL;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t dot = dots[i] - args.a_zero[row] * args.column_sums[first + i];
    const float value = float(dot) * (args.a_scale[row] * args.w_scale[first + i]);
    const float bias = args.bias ? load_scalar(args.bias, first + i, args.y_dtype) : 0.0f;
    store_scalar(args.y, row * args.n + first + i, args.y_dtype, value + bias);
  }
}

}  // namespace
}  // namespace bitgrain
