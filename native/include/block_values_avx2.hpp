// Eight out features of AVX2, FMA and F16C, half a panel: `V`, `Bytes` and `widen` of block_panels.hpp and block_input.hpp.  Internal linkage.
#pragma once
#include <immintrin.h>

#include "block_layout.hpp"
#include "scalar.hpp"

namespace bitgrain {
namespace {

inline __m256i load32(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

struct V {
  static constexpr int LANES = 8;
  __m256 v;

  static V zero() { return {_mm256_setzero_ps()}; }
  static V set(float value) { return {_mm256_set1_ps(value)}; }
  static V load(const float* from) { return {_mm256_loadu_ps(from)}; }
  static V load_float(const uint8_t* from) { return {_mm256_loadu_ps(reinterpret_cast<const float*>(from))}; }
  static V load_half(const uint8_t* from) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))}; }
  static V load_bf16(const uint8_t* from) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static __m256i widened(const uint8_t* from) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))); }
  static V load_bytes(const uint8_t* from) { return {_mm256_cvtepi32_ps(widened(from))}; }
  static V load_signed(const uint8_t* from) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))))};
  }
  static V load_nibbles(const uint8_t* from, bool high) {
    const __m256i bytes = widened(from);
    return {_mm256_cvtepi32_ps(high ? _mm256_srli_epi32(bytes, 4) : _mm256_and_si256(bytes, _mm256_set1_epi32(15)))};
  }
  static V load_exponents(const uint8_t* from) {  // 2^(byte - 127); the byte 0 is a subnormal number
    const __m256i bits = _mm256_slli_epi32(widened(from), 23);
    return {_mm256_castsi256_ps(_mm256_max_epi32(bits, _mm256_set1_epi32(0x00400000)))};
  }
  static V load_e4m3(const uint8_t* from) {  // a half of another bias
    const __m128i bits = _mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))), 7);
    return {_mm256_mul_ps(_mm256_cvtph_ps(bits), _mm256_set1_ps(256.0f))};
  }
  static V fma(const V& a, const V& b, const V& c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  void store(float* to) const { _mm256_storeu_ps(to, v); }
  friend V operator*(const V& a, const V& b) { return {_mm256_mul_ps(a.v, b.v)}; }
};

struct Bytes {
  static constexpr int SIZE = 32;
  __m256i v;

  static Bytes load(const uint8_t* from) { return {load32(from)}; }
  void store(uint8_t* to) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v); }
  Bytes masked(int byte) const { return {_mm256_and_si256(v, _mm256_set1_epi8(char(byte)))}; }
  Bytes up(int bits) const { return bits ? Bytes{_mm256_slli_epi16(v, bits)} : *this; }
  Bytes down(int bits) const { return bits ? Bytes{_mm256_srli_epi16(v, bits)} : *this; }
  Bytes looked_up(const uint8_t (&table)[16]) const {
    const __m256i entries = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
    return {_mm256_shuffle_epi8(entries, v)};
  }
  friend Bytes operator|(const Bytes& a, const Bytes& b) { return {_mm256_or_si256(a.v, b.v)}; }
};

inline void widen(const uint8_t* from, int32_t dtype, float* to) {
  for (int i = 0; i < 32; i += 8) {
    const V values = dtype == F32 ? V{_mm256_castsi256_ps(load32(from + 4 * i))} : dtype == F16 ? V::load_half(from + 2 * i) : V::load_bf16(from + 2 * i);
    values.store(to + i);
  }
}

inline __m256i four(const void* from) { return _mm256_castps_si256(_mm256_broadcast_ss(static_cast<const float*>(from))); }

}  // namespace
}  // namespace bitgrain
