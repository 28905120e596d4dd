// Eight outputs of one row, from float32 to y's dtype, bias added before the one rounding.  Needs AVX2 and F16C; internal linkage.
#pragma once
#include <immintrin.h>

#include "scalar.hpp"

namespace bitgrain {
namespace {

inline __m128i to_bf16(__m256 values) {  // nearest, ties to even, NaN stays NaN
  const __m256i bits = _mm256_castps_si256(values), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  const __m256i chosen = _mm256_blendv_epi8(rounded, nan, _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q)));
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(chosen, chosen), 0x08));
}

inline __m256 load_eight(const void* from, int64_t at, int32_t dtype) {
  if (dtype == F32) return _mm256_loadu_ps(static_cast<const float*>(from) + at);
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(from) + at));
  return dtype == F16 ? _mm256_cvtph_ps(raw) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}

// Out features [first, first + 8) of `row`, as far as there are so many.
template <class Args>
inline void store_eight(const Args& args, int64_t row, int64_t first, __m256 values) {
  const int64_t at = row * args.n + first, left = args.n - first;
  if (left < 8) {
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, values);
    for (int64_t i = 0; i < left; ++i) store_scalar(args.y, at + i, args.y_dtype, lanes[i] + (args.bias ? load_scalar(args.bias, first + i, args.y_dtype) : 0.0f));
    return;
  }
  values = _mm256_add_ps(values, args.bias ? load_eight(args.bias, first, args.y_dtype) : _mm256_setzero_ps());
  if (args.y_dtype == F32) return _mm256_storeu_ps(static_cast<float*>(args.y) + at, values);
  const __m128i narrow = args.y_dtype == F16 ? _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC) : to_bf16(values);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(args.y) + at), narrow);
}

}  // namespace
}  // namespace bitgrain
