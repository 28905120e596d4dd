// Eight lanes of AVX2, FMA and F16C: floats and unsigned numbers of 32 bits.  Internal linkage.
#pragma once
#include <immintrin.h>

#include "scalar.hpp"

namespace bitgrain {
namespace {

struct I;

struct V {
  __m256 v;

  static V set(float value) { return {_mm256_set1_ps(value)}; }
  static V zero() { return {_mm256_setzero_ps()}; }
  static V load(const float* from) { return {_mm256_loadu_ps(from)}; }
  static V fma(const V& a, const V& b, const V& c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static V widen_half(__m128i bits) { return {_mm256_cvtph_ps(bits)}; }
  static V widen_bf16(__m128i bits) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))}; }
  template <int DTYPE>
  static V load_as(const void* from, int64_t at) {
    if (DTYPE == F32) return load(static_cast<const float*>(from) + at);
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(from) + at));
    return DTYPE == F16 ? widen_half(bits) : widen_bf16(bits);
  }
  static V load_any(const void* from, int64_t at, int32_t dtype) {
    return dtype == F32 ? load_as<F32>(from, at) : dtype == F16 ? load_as<F16>(from, at) : load_as<BF16>(from, at);
  }
  static V gather(const float* table, const I& index);
  static V gather_pairs(const float* table, const I& row);
  static V look_up16(const I& index, const float* table);
  struct Nibbles;
  template <int DTYPE>
  static V gather_as(const void* table, const I& index);
  V flip(const I& signs) const;
  void store(float* to) const { _mm256_storeu_ps(to, v); }
  float sum() const {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static void transpose(V (&a)[8]) {
    __m256 pairs[8], fours[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      pairs[2 * i] = _mm256_unpacklo_ps(a[2 * i].v, a[2 * i + 1].v);
      pairs[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i].v, a[2 * i + 1].v);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
      fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
      fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
      fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      a[i].v = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
      a[i + 4].v = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
    }
  }
  friend V operator+(const V& a, const V& b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend V operator-(const V& a, const V& b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend V operator*(const V& a, const V& b) { return {_mm256_mul_ps(a.v, b.v)}; }
  void store_any(void* to, int64_t at, int32_t dtype) const {
    if (dtype == F32) return store(static_cast<float*>(to) + at);
    __m128i* const out = reinterpret_cast<__m128i*>(static_cast<uint16_t*>(to) + at);
    if (dtype == F16) return _mm_storeu_si128(out, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    const __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
    const __m256i chosen = _mm256_blendv_epi8(rounded, nan, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
    _mm_storeu_si128(out, _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(chosen, chosen), 0x08)));
  }
  // sums and differences of lanes 1, 2 and 4 apart
  V butterflies() const {
    const __m256 one = _mm256_fmadd_ps(v, _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1), _mm256_permute_ps(v, 0xb1));
    const __m256 two = _mm256_fmadd_ps(one, _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1), _mm256_permute_ps(one, 0x4e));
    return {_mm256_fmadd_ps(two, _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1), _mm256_permute2f128_ps(two, two, 0x01))};
  }
};

struct I {
  __m256i v;

  static I set(uint32_t value) { return {_mm256_set1_epi32(int(value))}; }
  static I load(const int32_t* from) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))}; }
  static I load_bytes(const uint8_t* from) { return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))}; }
  static I load_words(const uint16_t* from) { return {_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))}; }
  template <class At>
  static I read(const uint8_t* stream, const At& at) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(stream + at.low));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(stream + at.high));
    const __m256i words = _mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1), load(reinterpret_cast<const int32_t*>(at.bytes)).v);
    return {_mm256_srlv_epi32(words, load(reinterpret_cast<const int32_t*>(at.shift)).v)};
  }
  void store(uint32_t* to) const { _mm256_store_si256(reinterpret_cast<__m256i*>(to), v); }
  // four bytes in every lane, shifted
  static I read_word(const uint8_t* from, const I& shifts) {
    int32_t word;
    __builtin_memcpy(&word, from, 4);
    return {_mm256_srlv_epi32(_mm256_set1_epi32(word), shifts.v)};
  }
  I shifted(int bits) const { return {_mm256_srl_epi32(v, _mm_cvtsi32_si128(bits))}; }
  I raised(int bits) const { return {_mm256_sll_epi32(v, _mm_cvtsi32_si128(bits))}; }
  I where_zero(const I& other) const { return {_mm256_and_si256(v, _mm256_cmpeq_epi32(other.v, _mm256_setzero_si256()))}; }
  I times_high(uint32_t factor) const {
    const __m256i by = _mm256_set1_epi32(int(factor));
    const __m256i even = _mm256_srli_epi64(_mm256_mul_epu32(v, by), 32), odd = _mm256_mul_epu32(_mm256_srli_epi64(v, 32), by);
    return {_mm256_blend_epi32(even, odd, 0xaa)};
  }
  I byte_sums() const { return {_mm256_madd_epi16(_mm256_maddubs_epi16(v, _mm256_set1_epi8(1)), _mm256_set1_epi16(1))}; }
  V minus(int value) const { return {_mm256_cvtepi32_ps(_mm256_sub_epi32(v, _mm256_set1_epi32(value)))}; }
  // low plus high half, rounded to a half
  V half_sums() const {
    const __m256i low = _mm256_and_si256(v, _mm256_set1_epi32(0xffff)), high = _mm256_srli_epi32(v, 16);
    const __m256i packed = _mm256_packus_epi32(low, high);  // low 0-3, high 0-3, low 4-7, high 4-7
    const __m256 first = _mm256_cvtph_ps(_mm256_castsi256_si128(packed)), second = _mm256_cvtph_ps(_mm256_extracti128_si256(packed, 1));
    const __m256 sum = _mm256_add_ps(_mm256_permute2f128_ps(first, second, 0x20), _mm256_permute2f128_ps(first, second, 0x31));
    return {_mm256_cvtph_ps(_mm256_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
  }
  friend I operator+(const I& a, const I& b) { return {_mm256_add_epi32(a.v, b.v)}; }
  friend I operator*(const I& a, const I& b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
  friend I operator&(const I& a, const I& b) { return {_mm256_and_si256(a.v, b.v)}; }
  friend I operator^(const I& a, const I& b) { return {_mm256_xor_si256(a.v, b.v)}; }
};

// Single loads: the gather instruction takes three times as long on some processors and never half as long.
inline V V::gather(const float* table, const I& index) {
  alignas(32) uint32_t at[8];
  index.store(at);
  return {_mm256_setr_ps(table[at[0]], table[at[1]], table[at[2]], table[at[3]], table[at[4]], table[at[5]], table[at[6]], table[at[7]])};
}

// rows of two entries; lanes 0, 2, 4 and 6 of `row` count
inline V V::gather_pairs(const float* table, const I& row) {
  alignas(32) uint32_t at[8];
  row.store(at);
  double pair[4];
  for (int i = 0; i < 4; ++i) __builtin_memcpy(&pair[i], table + 2 * int64_t(at[2 * i]), 8);
  return {_mm256_castpd_ps(_mm256_setr_pd(pair[0], pair[1], pair[2], pair[3]))};
}

inline V V::look_up16(const I& index, const float* table) {
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table), index.v), high = _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8), index.v);
  return {_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index.v, 28)))};
}

// A table of sixteen floats, its four bytes apart: one shuffle finds a byte of 32 codes.
struct V::Nibbles {
  __m256i byte[4];

  void set(const float* table) {
    alignas(16) uint8_t bytes[4][16];
    for (int i = 0; i < 16; ++i) {
      const uint32_t bits = float_to_bits(table[i]);
      for (int j = 0; j < 4; ++j) bytes[j][i] = uint8_t(bits >> (8 * j));
    }
    for (int j = 0; j < 4; ++j) byte[j] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes[j])));
  }

  // Entries of the 32 codes in 16 bytes, the low half of a byte first.
  inline __attribute__((always_inline)) void look_up(const uint8_t* from, V (&to)[4]) const {
    // twice the bytes of the codes that a half holds, so that unpacking leaves the entries in order
    const __m256i twice = _mm256_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13, 2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15);
    const __m256i raw = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))), twice);
    const __m256i even = _mm256_and_si256(raw, _mm256_set1_epi16(0x000f)), odd = _mm256_and_si256(_mm256_srli_epi16(raw, 4), _mm256_set1_epi16(0x0f00));
    const __m256i codes = _mm256_or_si256(even, odd);
    const __m256i first = _mm256_shuffle_epi8(byte[0], codes), second = _mm256_shuffle_epi8(byte[1], codes);
    const __m256i third = _mm256_shuffle_epi8(byte[2], codes), fourth = _mm256_shuffle_epi8(byte[3], codes);
    const __m256i low = _mm256_unpacklo_epi8(first, second), high = _mm256_unpacklo_epi8(third, fourth);
    const __m256i low_after = _mm256_unpackhi_epi8(first, second), high_after = _mm256_unpackhi_epi8(third, fourth);
    to[0].v = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low, high));
    to[1].v = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, high));
    to[2].v = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low_after, high_after));
    to[3].v = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low_after, high_after));
  }
};

template <int DTYPE>
inline V V::gather_as(const void* table, const I& index) {
  if (DTYPE == F32) return gather(static_cast<const float*>(table), index);
  alignas(32) uint32_t at[8];
  index.store(at);
  const short* from = static_cast<const short*>(table);
  const __m128i bits = _mm_setr_epi16(from[at[0]], from[at[1]], from[at[2]], from[at[3]], from[at[4]], from[at[5]], from[at[6]], from[at[7]]);
  return DTYPE == F16 ? widen_half(bits) : widen_bf16(bits);
}

inline V V::flip(const I& signs) const { return {_mm256_xor_ps(v, _mm256_castsi256_ps(signs.v))}; }

}  // namespace
}  // namespace bitgrain
