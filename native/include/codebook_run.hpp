// The product of x with weights that a decoder makes eight columns at a time, written once over a vector type `V` of eight
// floats that the including file defines before.  Everything has internal linkage.
//
// A decoder has ROWS, and decode(row, unit, end, sink), which calls sink.put(r, unit, weights) for the ROWS out features from
// `row` on; beyond the last out feature it may repeat any.  With one row of x the weights go straight into a product, with
// more into a block of scratch that all rows pass over.
//
// The order of summation of one output does not depend on the tile, the thread or the other rows: per chunk of
// CODE_CHUNK_UNITS units, eight sums, one for each lane; these are added in one order, and chunks in order.
#pragma once
#include "codebook.hpp"
#include "scalar.hpp"

#include <omp.h>

namespace bitgrain {
namespace {

template <int ROWS>
struct Multiply {
  const float* x;
  V sum[ROWS];

  explicit Multiply(const float* x) : x(x) {
    for (int r = 0; r < ROWS; ++r) sum[r] = V::zero();
  }
  inline __attribute__((always_inline)) void put(int r, int64_t unit, const V& w) { sum[r] = V::fma(w, V::load(x + unit * CODE_LANES), sum[r]); }
};

struct Store {
  float* block;  // of the first of the rows
  int64_t first;

  inline __attribute__((always_inline)) void put(int r, int64_t unit, const V& w) { w.store(block + r * CODE_BLOCK_STRIDE + (unit - first) * CODE_LANES); }
};

// ROWS out features by COLUMNS rows of x
template <int ROWS, int COLUMNS>
inline void dot_tile(const float* block, const float* x, int64_t x_stride, int64_t units, float* totals, int64_t rows) {
  V sum[ROWS][COLUMNS];
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COLUMNS; ++c) sum[r][c] = V::zero();
  for (int64_t u = 0; u < units * CODE_LANES; u += CODE_LANES) {
    V values[COLUMNS];
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) values[c] = V::load(x + c * x_stride + u);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const V w = V::load(block + r * CODE_BLOCK_STRIDE + u);
#pragma GCC unroll 8
      for (int c = 0; c < COLUMNS; ++c) sum[r][c] = V::fma(w, values[c], sum[r][c]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COLUMNS; ++c) totals[r * rows + c] += sum[r][c].sum();
}

template <int COLUMNS>
inline void dot_rows(const float* block, int64_t count, const float* x, int64_t x_stride, int64_t units, float* totals, int64_t rows) {
  for (int64_t r = 0; r < count; r += 4) dot_tile<4, COLUMNS>(block + r * CODE_BLOCK_STRIDE, x, x_stride, units, totals + r * rows, rows);
}

inline void dot_block(const float* block, int64_t count, const float* x, int64_t x_stride, int64_t units, float* totals, int64_t rows) {
  int64_t m = 0;
  for (; m + 3 <= rows; m += 3) dot_rows<3>(block, count, x + m * x_stride, x_stride, units, totals + m, rows);
  if (rows - m == 2) dot_rows<2>(block, count, x + m * x_stride, x_stride, units, totals + m, rows);
  if (rows - m == 1) dot_rows<1>(block, count, x + m * x_stride, x_stride, units, totals + m, rows);
}

inline void widen_code_row(const CodeProduct& p, int64_t row, float* out) {
  const int64_t width = p.units * CODE_LANES;
  int64_t i = 0;
  if (p.gather != nullptr) {
    for (; i < width; ++i) {
      const int64_t from = p.gather[i];
      out[i] = from < 0 ? 0.0f : load_scalar(p.x, row * p.k + from, p.x_dtype) * (p.column_scale ? p.column_scale[from] : 1.0f);
    }
    return;
  }
  for (; i + CODE_LANES <= p.k; i += CODE_LANES) {
    V values = V::load_any(p.x, row * p.k + i, p.x_dtype);
    if (p.column_scale != nullptr) values = values * V::load(p.column_scale + i);
    values.store(out + i);
  }
  for (; i < p.k; ++i) out[i] = load_scalar(p.x, row * p.k + i, p.x_dtype) * (p.column_scale ? p.column_scale[i] : 1.0f);
  for (; i < width; ++i) out[i] = 0.0f;
}

inline float code_row_offset(const CodeProduct& p, int64_t row) {
  if (p.column_offset == nullptr) return 0.0f;
  float total = 0.0f;
  int64_t i = 0;
  while (i + CODE_LANES <= p.k) {  // chunks, as in the product
    V sum = V::zero();
    for (int64_t u = 0; u < CODE_CHUNK_UNITS && i + CODE_LANES <= p.k; ++u, i += CODE_LANES)
      sum = V::fma(V::load_any(p.x, row * p.k + i, p.x_dtype), V::load(p.column_offset + i), sum);
    total += sum.sum();
  }
  for (; i < p.k; ++i) total += load_scalar(p.x, row * p.k + i, p.x_dtype) * p.column_offset[i];
  return total;
}

template <class Decoder>
inline void code_section(const Decoder& decoder, int64_t units, const float* x, int64_t x_stride, int64_t rows, int64_t first, int64_t count, float* block,
                         float* totals) {
  for (int64_t unit = 0; unit < units; unit += CODE_CHUNK_UNITS) {
    const int64_t end = unit + CODE_CHUNK_UNITS < units ? unit + CODE_CHUNK_UNITS : units;
    if (rows == 1) {
      for (int64_t r = 0; r < count; r += Decoder::ROWS) {
        Multiply<Decoder::ROWS> sink(x);
        decoder.decode(first + r, unit, end, sink);
        for (int i = 0; i < Decoder::ROWS; ++i) totals[r + i] += sink.sum[i].sum();
      }
      continue;
    }
    for (int64_t r = 0; r < count; r += Decoder::ROWS) {
      Store sink = {block + r * CODE_BLOCK_STRIDE, unit};
      decoder.decode(first + r, unit, end, sink);
    }
    dot_block(block, count, x + unit * CODE_LANES, x_stride, end - unit, totals, rows);
  }
}

inline void store_code_outputs(const CodeProduct& p, int64_t first, int64_t count, const float* totals, const float* offsets) {
  for (int64_t r = 0; r < count; ++r) {
    const int64_t n = first + r;
    const float scale = (p.scale ? load_scalar(p.scale, n / p.scale_rows, p.scale_dtype) : 1.0f) * p.factor;
    const float bias = p.bias ? load_scalar(p.bias, n, p.y_dtype) : 0.0f;
    for (int64_t m = 0; m < p.rows; ++m) store_scalar(p.y, m * p.n + n, p.y_dtype, totals[r * p.rows + m] * scale + offsets[m] + bias);
  }
}

// units[i]: of section i; sections stand side by side in x'
template <class Decoder>
inline void multiply_codes(const CodeProduct& p, const Decoder* decoders, const int64_t* units, int sections) {
  const int64_t stride = p.units * CODE_LANES + CODE_SKEW, blocks = (p.n + CODE_ROW_BLOCK - 1) / CODE_ROW_BLOCK;
  float* const x = p.scratch;
  float* const offsets = x + p.rows * stride;
  float* const shared_end = offsets + p.rows;
#pragma omp parallel num_threads(p.threads) if (p.rows > 7 || blocks > 1)
  {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.rows; ++row) {
      widen_code_row(p, row, x + row * stride);
      offsets[row] = code_row_offset(p, row);
    }
    float* const block = shared_end + omp_get_thread_num() * codebook_thread_floats(p.rows);
    float* const totals = block + CODE_ROW_BLOCK * CODE_BLOCK_STRIDE;
#pragma omp for schedule(dynamic)
    for (int64_t at = 0; at < blocks; ++at) {
      const int64_t first = at * CODE_ROW_BLOCK, count = p.n - first < CODE_ROW_BLOCK ? p.n - first : CODE_ROW_BLOCK;
      for (int64_t i = 0; i < CODE_ROW_BLOCK * p.rows; ++i) totals[i] = 0.0f;
      int64_t before = 0;
      for (int section = 0; section < sections; ++section) {
        code_section(decoders[section], units[section], x + before * CODE_LANES, stride, p.rows, first, count, block, totals);
        before += units[section];
      }
      store_code_outputs(p, first, count, totals, offsets);
    }
  }
}

}  // namespace
}  // namespace bitgrain
