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

INLINE float total(const Pair& part) {
  const Floats eight = part.low + part.high;
  const float a = eight[0] + eight[4], b = eight[1] + eight[5], c = eight[2] + eight[6], d = eight[3] + eight[7];
  return (a + c) + (b + d);
}

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
        sum[i][j].low += low * float_lanes(x[j] + at);
        sum[i][j].high += high * float_lanes(x[j] + at + 8);
      }
    }
  }
  if (whole < args.k) {  // x is zero beyond k
    for (int i = 0; i < NB; ++i) {
      uint8_t rest[DENSE_LANES * 4] = {};
      std::memcpy(rest, weight[i] + whole * bytes, size_t((args.k - whole) * bytes));
      const Floats low = weight_lanes<DTYPE>(rest, 0), high = weight_lanes<DTYPE>(rest, 8);
      for (int j = 0; j < MB; ++j) {
        sum[i][j].low += low * float_lanes(x[j] + whole);
        sum[i][j].high += high * float_lanes(x[j] + whole + 8);
      }
    }
  }
  for (int i = 0; i < NB; ++i) {
    for (int j = 0; j < MB; ++j) {
      float value = total(sum[i][j]);
      if (args.bias != nullptr) value += load_scalar(args.bias, n + i, args.y_dtype);
      store_scalar(args.y, (m + j) * args.n + n + i, args.y_dtype, value);
    }
  }
}

template <int32_t DTYPE>
inline void dense_range(const DenseArgs& args, int64_t first, int64_t last) {
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
