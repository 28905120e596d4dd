// Digits of 32 integers and their sums through AVX2, for block_input.hpp.  Internal linkage.
#pragma once
#include <immintrin.h>

#include "block_layout.hpp"

namespace bitgrain {
namespace {

// bytes[0..3] of value = ((bytes[0] * 256 + bytes[1]) * 256 + bytes[2]) * 256 + bytes[3], all signed; |value| <= 0x7f7f7f7f.
// Adding 128 to the lower three carries as the signs ask; the same bits are turned back afterwards.
inline void split_bytes(const int32_t (&values)[BLOCK_UNIT], UnitInput& to) {
  const __m256i bias = _mm256_set1_epi32(0x00808080);
  const __m256i by_digit = _mm256_broadcastsi128_si256(_mm_setr_epi8(3, 7, 11, 15, 2, 6, 10, 14, 1, 5, 9, 13, 0, 4, 8, 12));
  const __m256i in_turn = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  __m256i v[4];
  for (int i = 0; i < 4; ++i) {
    const __m256i value = _mm256_load_si256(reinterpret_cast<const __m256i*>(values + 8 * i));
    v[i] = _mm256_shuffle_epi8(_mm256_xor_si256(_mm256_add_epi32(value, bias), bias), by_digit);
  }
  const __m256i low01 = _mm256_unpacklo_epi32(v[0], v[1]), low23 = _mm256_unpacklo_epi32(v[2], v[3]);
  const __m256i high01 = _mm256_unpackhi_epi32(v[0], v[1]), high23 = _mm256_unpackhi_epi32(v[2], v[3]);
  const __m256i digits[4] = {_mm256_unpacklo_epi64(low01, low23), _mm256_unpackhi_epi64(low01, low23), _mm256_unpacklo_epi64(high01, high23),
                             _mm256_unpackhi_epi64(high01, high23)};
  for (int i = 0; i < 4; ++i) _mm256_store_si256(reinterpret_cast<__m256i*>(to.bytes[i]), _mm256_permutevar8x32_epi32(digits[i], in_turn));
}

// sums[part][digit] over 16 in features each
inline void sum_bytes(const UnitInput& x, int32_t (&sums)[2][DIGITS]) {
  __m256i quads[4];
  for (int i = 0; i < 4; ++i) {
    const __m256i digits = _mm256_load_si256(reinterpret_cast<const __m256i*>(x.bytes[i]));
    quads[i] = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), digits), _mm256_set1_epi16(1));
  }
  const __m256i both = _mm256_hadd_epi32(_mm256_hadd_epi32(quads[0], quads[1]), _mm256_hadd_epi32(quads[2], quads[3]));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), both);
}

}  // namespace
}  // namespace bitgrain
