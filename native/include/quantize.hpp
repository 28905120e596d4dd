// Activation quantization to int8, one row at a time; plain loops that the including file's flags vectorize.
// Formulas, order and rounding are those of weights/activation.py, so codes agree bit for bit.
#pragma once
#include <algorithm>
#include <limits>

#include "scalar.hpp"

namespace bitgrain {
namespace {

constexpr int64_t INTEGER_BLOCK_BYTES = 1 << 20;

struct Range {
  float low = 0.0f, high = 0.0f;  // zero is always inside
  bool nan = false;

  void include(const float* x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      low = x[i] < low ? x[i] : low;
      high = x[i] > high ? x[i] : high;
      nan |= x[i] != x[i];
    }
  }
};

struct Grid {
  float scale, zero;
};

inline Grid make_grid(const QuantizeArgs& args, const Range& range) {
  if (args.dynamic == STATIC) return {args.static_scale, float(args.static_zero)};
  float scale = args.symmetric ? std::max(-range.low, range.high) / args.top : (range.high - range.low) / 255.0f;
  if (scale == 0.0f) scale = std::numeric_limits<float>::epsilon();
  if (args.symmetric) return {scale, 0.0f};
  return {scale, __builtin_rintf(std::min(std::max(-128.0f - range.low / scale, -128.0f), 127.0f))};
}

// `whole` is the range of all rows, and is read for PER_TENSOR only.
inline void quantize_row(const QuantizeArgs& args, int64_t row, const Range& whole) {
  const float* x = args.x + row * args.k;
  uint8_t* out = args.a + row * args.quads * 4;
  Range range = whole;
  if (args.dynamic != PER_TENSOR) range.include(x, args.k);
  const Grid grid = make_grid(args, range);
  if (range.nan || !(grid.scale <= std::numeric_limits<float>::max())) {
    // a NaN, or an infinite scale: no code stands for the row, so all of its outputs become NaN
    args.scale[row] = std::numeric_limits<float>::quiet_NaN();
    args.zero[row] = 128;
    std::fill(out, out + args.quads * 4, uint8_t(128));
    return;
  }
  args.scale[row] = grid.scale;
  args.zero[row] = int32_t(grid.zero) + 128;
  for (int64_t i = 0; i < args.k; ++i) {
    const float moved = x[i] / grid.scale + grid.zero;
    const float limited = std::min(std::max(moved, -128.0f), 127.0f);
    out[i] = uint8_t(int32_t(__builtin_rintf(limited)) + 128);
  }
  // beyond K the weights are zero, so any code will do; a fixed one keeps memory checkers quiet
  for (int64_t i = args.k; i < args.quads * 4; ++i) out[i] = 128;
}

inline void quantize_rows(const QuantizeArgs& args) {
  Range whole;
  if (args.dynamic == PER_TENSOR) whole.include(args.x, args.rows * args.k);
#pragma omp parallel for schedule(static) num_threads(args.threads) if (args.rows > 3)
  for (int64_t row = 0; row < args.rows; ++row) quantize_row(args, row, whole);
}

inline void store_integer(const IntegerArgs& args, int64_t row, int64_t first, const int32_t* dots) {
  const int64_t count = std::min<int64_t>(PANEL, args.n - first);
  for (int64_t i = 0; i < count; ++i) {
    const int32_t dot = dots[i] - args.a_zero[row] * args.column_sums[first + i];
    const float value = float(dot) * (args.a_scale[row] * args.w_scale[first + i]);
    const float bias = args.bias ? load_scalar(args.bias, first + i, args.y_dtype) : 0.0f;
    store_scalar(args.y, row * args.n + first + i, args.y_dtype, value + bias);
  }
}

// Calls rows(args, panel, first row, end row) for all panels, block of rows by block of rows, so that the rows stay in cache.
template <class Rows>
inline void integer_blocks(const IntegerArgs& args, Rows rows) {
  const int64_t panels = (args.n + PANEL - 1) / PANEL;
  const int64_t block = std::max<int64_t>(8, (INTEGER_BLOCK_BYTES / (args.quads * 4)) & ~int64_t(7));
#pragma omp parallel num_threads(args.threads) if (panels > 1)
  for (int64_t row = 0; row < args.rows; row += block) {
#pragma omp for schedule(static) nowait
    for (int64_t panel = 0; panel < panels; ++panel) rows(args, panel, row, std::min(args.rows, row + block));
  }
}

}  // namespace
}  // namespace bitgrain
