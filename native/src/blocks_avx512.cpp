// Blocks through AVX-512 (F, BW, VL, DQ) with VNNI: sixteen out features, one panel; products of bytes are added in 32 bits.
// GCC 12's own AVX-512 header trips the warning once everything is inlined
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "block_digits_avx2.hpp"
#include "block_layout.hpp"
#include "scalar.hpp"
#include "unrolled.hpp"

namespace bitgrain {
namespace {

struct V {
  static constexpr int LANES = 16;
  __m512 v;

  static V zero() { return {_mm512_setzero_ps()}; }
  static V set(float value) { return {_mm512_set1_ps(value)}; }
  static V load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static __m256i load_words(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
  static V load_float(const uint8_t* from) { return {_mm512_loadu_ps(from)}; }
  static V load_half(const uint8_t* from) { return {_mm512_cvtph_ps(load_words(from))}; }
  static V load_bf16(const uint8_t* from) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_words(from)), 16))}; }
  static __m128i load16(const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }
  static V load_bytes(const uint8_t* from) { return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load16(from)))}; }
  static V load_signed(const uint8_t* from) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load16(from)))}; }
  static V load_nibbles(const uint8_t* from, bool high) {
    const __m512i bytes = _mm512_cvtepu8_epi32(load16(from));
    return {_mm512_cvtepi32_ps(high ? _mm512_srli_epi32(bytes, 4) : _mm512_and_si512(bytes, _mm512_set1_epi32(15)))};
  }
  static V load_exponents(const uint8_t* from) {  // 2^(byte - 127); the byte 0 is a subnormal number
    const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu8_epi32(load16(from)), 23);
    return {_mm512_castsi512_ps(_mm512_max_epi32(bits, _mm512_set1_epi32(0x00400000)))};
  }
  static V load_e4m3(const uint8_t* from) {  // a half of another bias
    return {_mm512_mul_ps(_mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(load16(from)), 7)), _mm512_set1_ps(256.0f))};
  }
  static V fma(const V& a, const V& b, const V& c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  void store(float* to) const { _mm512_storeu_ps(to, v); }
  friend V operator*(const V& a, const V& b) { return {_mm512_mul_ps(a.v, b.v)}; }
};

struct Bytes {
  static constexpr int SIZE = 64;
  __m512i v;

  static Bytes load(const uint8_t* from) { return {_mm512_loadu_si512(from)}; }
  void store(uint8_t* to) const { _mm512_storeu_si512(to, v); }
  Bytes masked(int byte) const { return {_mm512_and_si512(v, _mm512_set1_epi8(char(byte)))}; }
  Bytes up(int bits) const { return bits ? Bytes{_mm512_slli_epi16(v, unsigned(bits))} : *this; }
  Bytes down(int bits) const { return bits ? Bytes{_mm512_srli_epi16(v, unsigned(bits))} : *this; }
  Bytes looked_up(const uint8_t (&table)[16]) const {
    return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table))), v)};
  }
  friend Bytes operator|(const Bytes& a, const Bytes& b) { return {_mm512_or_si512(a.v, b.v)}; }
};

inline void widen(const uint8_t* from, int32_t dtype, float* to) {
  for (int i = 0; i < 32; i += 16) {
    const V values = dtype == F32 ? V{_mm512_castsi512_ps(_mm512_loadu_si512(from + 4 * i))} : dtype == F16 ? V::load_half(from + 2 * i) : V::load_bf16(from + 2 * i);
    values.store(to + i);
  }
}

constexpr bool takes_words(const BlockFormat&) { return false; }

constexpr int parts_of(const BlockFormat& format) { return format.group == 16 ? 2 : 1; }

// sum += codes . four digits; in place, and the digits from memory: the compiler's intrinsic copies every sum before (GCC 12).
inline void add_dots(__m512i& sum, __m512i codes, const int8_t* digits) {
#ifdef BITGRAIN_AVX512_EMULATED
  int32_t value;
  __builtin_memcpy(&value, digits, 4);
  sum = _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(value));
#else
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*reinterpret_cast<const int8_t(*)[4]>(digits)));
#endif
}

constexpr int HALVES = 1;

template <class Code>
constexpr int MOST_DIGITS = 4;

template <class Code, int COUNT>
constexpr int DIGIT_ROWS = 4;

template <class Code, int COUNT, int PART, int DIGITS_USED, int ROWS>
BITGRAIN_INLINE void dots(const uint8_t* unit, const UnitInput* x, V (&to)[ROWS][HALVES]) {
  __m512i sum[ROWS][DIGITS_USED];
  each<ROWS>([&](auto row) BITGRAIN_INLINE_LAMBDA {
    each<DIGITS_USED>([&](auto digit) BITGRAIN_INLINE_LAMBDA { sum[row][digit] = _mm512_set1_epi32(x[row].correction[PART][digit]); });
  });
  each<COUNT>([&](auto v) BITGRAIN_INLINE_LAMBDA {
    constexpr int vector = PART * COUNT + v;
    const __m512i codes = Code::value(unit, 0, vector).v;
    each<ROWS>([&](auto row) BITGRAIN_INLINE_LAMBDA {
      each<DIGITS_USED>([&](auto digit) BITGRAIN_INLINE_LAMBDA { add_dots(sum[row][digit], codes, x[row].bytes[digit] + 4 * vector); });
    });
  });
  each<ROWS>([&](auto row) BITGRAIN_INLINE_LAMBDA {
    __m512 dot = _mm512_cvtepi32_ps(sum[row][DIGITS_USED - 1]);
    each<DIGITS_USED - 1>([&](auto i) BITGRAIN_INLINE_LAMBDA {
      dot = _mm512_fmadd_ps(dot, _mm512_set1_ps(1.0f / 256), _mm512_cvtepi32_ps(sum[row][DIGITS_USED - 2 - i]));
    });
    to[row][0] = {dot};
  });
}

}  // namespace
}  // namespace bitgrain

#include "block_codes.hpp"

namespace bitgrain {

const BlockKernels& avx512_blocks() {
  static const BlockKernels table = {"avx512", prepare_rows, panels_by_code};
  return table;
}

}  // namespace bitgrain
