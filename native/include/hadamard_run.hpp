// Butterflies and the product with the base, over the vector type `V` of the including file.  Internal linkage.
//
// Every output is the same tree of float32 sums whatever the threads and the other blocks: butterflies of width 1, 2, 4, ...,
// then the base's columns in order, then one product with the factor.
#pragma once
#include <omp.h>

#include "hadamard.hpp"

namespace bitgrain {
namespace {

constexpr int64_t LANES = 8;

inline void butterfly_pass(float* x, int64_t size, int64_t width) {
  for (int64_t first = 0; first < size; first += 2 * width)
    for (int64_t i = first; i < first + width; i += LANES) {
      const V a = V::load(x + i), b = V::load(x + i + width);
      (a + b).store(x + i);
      (a - b).store(x + i + width);
    }
}

// passes of width and 2 width at once
inline void butterfly_two_passes(float* x, int64_t size, int64_t width) {
  for (int64_t first = 0; first < size; first += 4 * width)
    for (int64_t i = first; i < first + width; i += LANES) {
      const V a = V::load(x + i), b = V::load(x + i + width), c = V::load(x + i + 2 * width), d = V::load(x + i + 3 * width);
      const V ab = a + b, cd = c + d, a_b = a - b, c_d = c - d;
      (ab + cd).store(x + i);
      (a_b + c_d).store(x + i + width);
      (ab - cd).store(x + i + 2 * width);
      (a_b - c_d).store(x + i + 3 * width);
    }
}

// Fewer entries than lanes.
inline void butterfly_short(float* x, int64_t size) {
  for (int64_t width = 1; width < size; width *= 2)
    for (int64_t first = 0; first < size; first += 2 * width)
      for (int64_t i = first; i < first + width; ++i) {
        const float a = x[i], b = x[i + width];
        x[i] = a + b;
        x[i + width] = a - b;
      }
}

// [size] entries of x from `from` on, widened and transformed in place of `to`; size is a power of two
inline void transform_power(const HadamardArgs& args, int64_t from, int64_t size, float* to) {
  if (size < LANES) {
    for (int64_t i = 0; i < size; ++i) to[i] = load_scalar(args.x, from + i, args.dtype);
    return butterfly_short(to, size);
  }
  for (int64_t i = 0; i < size; i += LANES) V::load_any(args.x, from + i, args.dtype).butterflies().store(to + i);
  int64_t width = LANES;
  for (; 4 * width <= size; width *= 4) butterfly_two_passes(to, size, width);
  if (width < size) butterfly_pass(to, size, width);
}

// ROWS rows of the base by VECTORS vectors of columns
template <int ROWS, int VECTORS>
inline void base_tile(const HadamardArgs& args, const float* x, int64_t width, int64_t row, int64_t column, int64_t to) {
  V sum[ROWS][VECTORS];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) sum[r][v] = V::zero();
  for (int64_t b = 0; b < args.order; ++b) {
    V values[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) values[v] = V::load(x + b * width + column + v * LANES);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const V sign = V::set(args.base[(row + r) * args.order + b]);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = V::fma(sign, values[v], sum[r][v]);
    }
  }
  const V factor = V::set(args.factor);
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) (sum[r][v] * factor).store_any(args.y, to + (row + r) * width + column + v * LANES, args.dtype);
}

template <int VECTORS>
inline void base_columns(const HadamardArgs& args, const float* x, int64_t width, int64_t column, int64_t to) {
  int64_t row = 0;
  for (; row + 3 <= args.order; row += 3) base_tile<3, VECTORS>(args, x, width, row, column, to);
  for (; row < args.order; ++row) base_tile<1, VECTORS>(args, x, width, row, column, to);
}

inline void base_product(const HadamardArgs& args, const float* x, int64_t width, int64_t to) {
  int64_t column = 0;
  for (; column + 4 * LANES <= width; column += 4 * LANES) base_columns<4>(args, x, width, column, to);
  for (; column + LANES <= width; column += LANES) base_columns<1>(args, x, width, column, to);
  for (int64_t row = 0; row < args.order; ++row)
    for (int64_t i = column; i < width; ++i) {
      float sum = 0.0f;
      for (int64_t b = 0; b < args.order; ++b) sum += args.base[row * args.order + b] * x[b * width + i];
      store_scalar(args.y, to + row * width + i, args.dtype, sum * args.factor);
    }
}

inline void hadamard_block(const HadamardArgs& args, int64_t block, float* scratch) {
  const int64_t width = args.size / args.order, at = block * args.size;
  for (int64_t b = 0; b < args.order; ++b) transform_power(args, at + b * width, width, scratch + b * width);
  if (args.base != nullptr) return base_product(args, scratch, width, at);
  const V factor = V::set(args.factor);
  int64_t i = 0;
  for (; i + LANES <= args.size; i += LANES) (V::load(scratch + i) * factor).store_any(args.y, at + i, args.dtype);
  for (; i < args.size; ++i) store_scalar(args.y, at + i, args.dtype, scratch[i] * args.factor);
}

inline void run_hadamard(const HadamardArgs& args) {
#pragma omp parallel for schedule(static) num_threads(args.threads) if (args.blocks * args.size >= 1 << 15)
  for (int64_t block = 0; block < args.blocks; ++block) hadamard_block(args, block, args.scratch + omp_get_thread_num() * args.size);
}

}  // namespace
}  // namespace bitgrain
