// The kernel of dense.hpp over vectors of eight floats, which the compiler maps to the instruction set that the including file is
// compiled for.  Internal linkage.
#pragma once
#if defined(__AVX2__) && defined(__F16C__)
#include <immintrin.h>
#endif

#include "dense.hpp"
#include "scalar.hpp"

namespace bitgrain {
namespace {

constexpr int64_t DENSE_LANES = 16;

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed to inlined functions only
typedef float Floats __attribute__((vector_size(32)));

// Always inlined: the two vectors stay in registers.
#define INLINE inline __attribute__((always_inline))

struct Pair {
  Floats low, high;
};

INLINE Floats float_lanes(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <int32_t DTYPE>
INLINE Floats weight_lanes(const void* from, int64_t at) {
  if (DTYPE == F32) return float_lanes(static_cast<const float*>(from) + at);
  const uint16_t* const raw = static_cast<const uint16_t*>(from) + at;
#if defined(__AVX2__) && defined(__F16C__)
  const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(raw));
  return Floats(DTYPE == F16 ? _mm256_cvtph_ps(eight) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16)));
#else
  Floats value;
  for (int lane = 0; lane < 8; ++lane) value[lane] = DTYPE == F16 ? half_to_float(raw[lane]) : bf16_to_float(raw[lane]);
  return value;
#endif
}

INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__FMA__)
  return Floats(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#else
  return a * b + c;
#endif
}

INLINE float total(const Pair& part) {
  const Floats eight = part.low + part.high;
  const float a = eight[0] + eight[4], b = eight[1] + eight[5], c = eight[2] + eight[6], d = eight[3] + eight[7];
  return (a + c) + (b + d);
}

INLINE void store_product(const DenseArgs& args, int64_t n, int64_t m, const Pair& sum) {
  float value = total(sum);
  if (args.bias != nullptr) value += load_scalar(args.bias, n, args.y_dtype);
  store_scalar(args.y, m * args.n + n, args.y_dtype, value);
}

// ---------------------------------------------------------------- few rows

// NB out features times MB rows.
template <int32_t DTYPE, int NB, int MB>
INLINE void dense_tile(const DenseArgs& args, int64_t n, int64_t m) {
  const int64_t bytes = DTYPE == F32 ? 4 : 2, whole = args.k / DENSE_LANES * DENSE_LANES;
  const uint8_t* weight[NB];
  const float* x[MB];
  Pair sum[NB][MB];
  for (int i = 0; i < NB; ++i) weight[i] = static_cast<const uint8_t*>(args.weight) + (n + i) * args.k * bytes;
  for (int j = 0; j < MB; ++j) x[j] = args.x + (m + j) * args.width;
  for (int i = 0; i < NB; ++i) {
    for (int j = 0; j < MB; ++j) sum[i][j] = {Floats{}, Floats{}};
  }
  for (int64_t at = 0; at < whole; at += DENSE_LANES) {
#pragma GCC unroll 4
    for (int i = 0; i < NB; ++i) {
      const Floats low = weight_lanes<DTYPE>(weight[i], at), high = weight_lanes<DTYPE>(weight[i], at + 8);
#pragma GCC unroll 4
      for (int j = 0; j < MB; ++j) {
        sum[i][j].low = multiply_add(low, float_lanes(x[j] + at), sum[i][j].low);
        sum[i][j].high = multiply_add(high, float_lanes(x[j] + at + 8), sum[i][j].high);
      }
    }
  }
  if (whole < args.k) {  // x is zero beyond k
    for (int i = 0; i < NB; ++i) {
      uint8_t rest[DENSE_LANES * 4] = {};
      std::memcpy(rest, weight[i] + whole * bytes, size_t((args.k - whole) * bytes));
      const Floats low = weight_lanes<DTYPE>(rest, 0), high = weight_lanes<DTYPE>(rest, 8);
      for (int j = 0; j < MB; ++j) {
        sum[i][j].low = multiply_add(low, float_lanes(x[j] + whole), sum[i][j].low);
        sum[i][j].high = multiply_add(high, float_lanes(x[j] + whole + 8), sum[i][j].high);
      }
    }
  }
  for (int i = 0; i < NB; ++i) {
    for (int j = 0; j < MB; ++j) store_product(args, n + i, m + j, sum[i][j]);
  }
}

// ---------------------------------------------------------------- many rows: weights are widened once for all of them

constexpr int64_t WIDE_FROM = 6;  // rows from which on it is faster
constexpr int64_t WIDE_FEATURES = 16;  // out features, and in features, whose weights are wide at once: 16 KB of the first-level cache
constexpr int64_t WIDE_CHUNK = 256;
constexpr int64_t WIDE_ROWS = 48;  // that share them

struct WideTile {
  alignas(64) float weights[WIDE_FEATURES][WIDE_CHUNK];
  Pair sums[WIDE_FEATURES][WIDE_ROWS];
};

// Weights of `features` out features from n on, `columns` in features from `first` on, zeros up to a multiple of DENSE_LANES.
template <int32_t DTYPE>
inline void widen_weights(const DenseArgs& args, int64_t n, int64_t features, int64_t first, int64_t columns, WideTile& tile) {
  constexpr int64_t BYTES = DTYPE == F32 ? 4 : 2;
  const int64_t whole = columns / 8 * 8;
  for (int64_t i = 0; i < features; ++i) {
    const uint8_t* const from = static_cast<const uint8_t*>(args.weight) + ((n + i) * args.k + first) * BYTES;
    float* const to = tile.weights[i];
    for (int64_t at = 0; at < whole; at += 8) {
      const Floats eight = weight_lanes<DTYPE>(from, at);
      std::memcpy(to + at, &eight, sizeof eight);
    }
    for (int64_t at = whole; at < columns; ++at) to[at] = load_scalar(from, at, DTYPE);
    for (int64_t at = columns; at % DENSE_LANES; ++at) to[at] = 0.0f;
  }
}

// Read once for several products: compilers would read it again for each, and loads bound the loop then.
INLINE Floats read_once(const float* from) {
  Floats value = float_lanes(from);
#if defined(__AVX__)
  asm("" : "+x"(value));
#endif
  return value;
}

// The products of `columns` in features with NB out features and MB rows; as dense_tile adds them up.
template <int NB, int MB>
INLINE void add_columns(WideTile& tile, int64_t feature, const float* x, int64_t stride, int64_t row, int64_t columns) {
  Pair sum[NB][MB];
#pragma GCC unroll 4
  for (int i = 0; i < NB; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < MB; ++j) sum[i][j] = tile.sums[feature + i][row + j];
  }
  for (int64_t at = 0; at < columns; at += DENSE_LANES) {
    Floats weight[NB];
#pragma GCC unroll 4
    for (int i = 0; i < NB; ++i) weight[i] = read_once(tile.weights[feature + i] + at);
#pragma GCC unroll 4
    for (int j = 0; j < MB; ++j) {
      const Floats value = read_once(x + j * stride + at);
#pragma GCC unroll 4
      for (int i = 0; i < NB; ++i) sum[i][j].low = multiply_add(weight[i], value, sum[i][j].low);
    }
#pragma GCC unroll 4
    for (int i = 0; i < NB; ++i) weight[i] = read_once(tile.weights[feature + i] + at + 8);
#pragma GCC unroll 4
    for (int j = 0; j < MB; ++j) {
      const Floats value = read_once(x + j * stride + at + 8);
#pragma GCC unroll 4
      for (int i = 0; i < NB; ++i) sum[i][j].high = multiply_add(weight[i], value, sum[i][j].high);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < NB; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < MB; ++j) tile.sums[feature + i][row + j] = sum[i][j];
  }
}

// Two out features and three rows keep twelve sums and what they are multiplied with in sixteen registers.
template <int MB>
inline void add_features(WideTile& tile, int64_t features, const float* x, int64_t stride, int64_t row, int64_t columns) {
  int64_t feature = 0;
  for (; feature + 2 <= features; feature += 2) add_columns<2, MB>(tile, feature, x, stride, row, columns);
  if (feature < features) add_columns<1, MB>(tile, feature, x, stride, row, columns);
}

template <int32_t DTYPE>
inline void wide_rows(const DenseArgs& args, int64_t n, int64_t features, int64_t m, int64_t rows, WideTile& tile) {
  for (int64_t i = 0; i < features; ++i) std::memset(static_cast<void*>(tile.sums[i]), 0, size_t(rows) * sizeof(Pair));
  for (int64_t first = 0; first < args.k; first += WIDE_CHUNK) {
    const int64_t columns = args.k - first < WIDE_CHUNK ? args.k - first : WIDE_CHUNK, padded = (columns + DENSE_LANES - 1) / DENSE_LANES * DENSE_LANES;
    widen_weights<DTYPE>(args, n, features, first, columns, tile);
    const float* const x = args.x + m * args.width + first;
    int64_t row = 0;
    for (; row + 3 <= rows; row += 3) add_features<3>(tile, features, x + row * args.width, args.width, row, padded);
    for (; row < rows; ++row) add_features<1>(tile, features, x + row * args.width, args.width, row, padded);
  }
  for (int64_t i = 0; i < features; ++i) {
    for (int64_t row = 0; row < rows; ++row) store_product(args, n + i, m + row, tile.sums[i][row]);
  }
}

template <int32_t DTYPE>
inline void wide_range(const DenseArgs& args, int64_t first, int64_t last) {
  WideTile tile;
  for (int64_t n = first; n < last; n += WIDE_FEATURES) {
    const int64_t features = last - n < WIDE_FEATURES ? last - n : WIDE_FEATURES;
    for (int64_t m = 0; m < args.rows; m += WIDE_ROWS) wide_rows<DTYPE>(args, n, features, m, args.rows - m < WIDE_ROWS ? args.rows - m : WIDE_ROWS, tile);
  }
}

template <int32_t DTYPE>
inline void dense_range(const DenseArgs& args, int64_t first, int64_t last) {
  if (args.rows >= WIDE_FROM) return wide_range<DTYPE>(args, first, last);
  int64_t n = first;
  for (; n + 4 <= last; n += 4) {  // their weights stay in the first-level cache while the rows pass
    int64_t m = 0;
    for (; m + 2 <= args.rows; m += 2) {
      dense_tile<DTYPE, 2, 2>(args, n, m);
      dense_tile<DTYPE, 2, 2>(args, n + 2, m);
    }
    if (m < args.rows) dense_tile<DTYPE, 4, 1>(args, n, m);
  }
  for (; n < last; ++n) {
    for (int64_t m = 0; m < args.rows; ++m) dense_tile<DTYPE, 1, 1>(args, n, m);
  }
}

inline void run_dense(const DenseArgs& args, int64_t first, int64_t last) {
  if (args.weight_dtype == BF16) return dense_range<BF16>(args, first, last);
  if (args.weight_dtype == F16) return dense_range<F16>(args, first, last);
  dense_range<F32>(args, first, last);
}

}  // namespace
}  // namespace bitgrain
