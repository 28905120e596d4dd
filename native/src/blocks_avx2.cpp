// Blocks through AVX2, FMA and F16C: eight out features, half a panel.
//
// The multiply-add of unsigned and signed bytes adds pairs with saturation at 16 bits.  Codes below 128 stay under it, and as many
// pairs are added in 16 bits as their LIMIT says; codes of eight bits are multiplied as words.
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

constexpr bool takes_words(const BlockFormat& format) { return format.code == CODE_8 || format.code == LEVELS_4; }

// Eight vectors of words are more than the registers hold: a unit is summed in halves.
constexpr int parts_of(const BlockFormat& format) { return format.group == 16 || takes_words(format) ? 2 : 1; }

inline __m256i four(const void* from) {
  int32_t value;
  __builtin_memcpy(&value, from, 4);
  return _mm256_set1_epi32(value);
}

// Codes times bytes: 16-bit sums of up to LIMIT products, then 32 bits.
template <class Code, int COUNT, bool WORDS = Code::WIDE>
struct Vectors {
  static constexpr float STEP = 1.0f / 256;
  static constexpr int RUN = Code::LIMIT < COUNT ? Code::LIMIT : COUNT;
  __m256i codes[COUNT];

  void read(const uint8_t* unit, int half, int first) {
#pragma GCC unroll 8
    for (int v = 0; v < COUNT; ++v) codes[v] = Code::value(unit, half, first + v).v;
  }
  V dot(const UnitInput& x, int digit, int first, int32_t correction) const {
    const int8_t* digits = x.bytes[digit] + first;
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i total = _mm256_set1_epi32(correction);
#pragma GCC unroll 8
    for (int start = 0; start < COUNT; start += RUN) {
      __m256i sum = _mm256_maddubs_epi16(codes[start], four(digits + 4 * start));
#pragma GCC unroll 8
      for (int v = start + 1; v < start + RUN; ++v) sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes[v], four(digits + 4 * v)));
      total = _mm256_add_epi32(total, _mm256_madd_epi16(sum, ones));
    }
    return {_mm256_cvtepi32_ps(total)};
  }
};

// Codes times words: the sums of 32 products of eight and sixteen bits stay below 2^29.
template <class Code, int COUNT>
struct Vectors<Code, COUNT, true> {
  static constexpr float STEP = 1.0f / 65536;
  __m256i even[COUNT], odd[COUNT];

  void read(const uint8_t* unit, int half, int first) {
    const __m256i low = _mm256_set1_epi16(255);
#pragma GCC unroll 8
    for (int v = 0; v < COUNT; ++v) {
      const __m256i code = Code::value(unit, half, first + v).v;
      even[v] = _mm256_and_si256(code, low);
      odd[v] = _mm256_srli_epi16(code, 8);
    }
  }
  V dot(const UnitInput& x, int digit, int first, int32_t correction) const {
    const int16_t* digits = x.words[digit] + first;
    __m256i total = _mm256_set1_epi32(correction);
#pragma GCC unroll 8
    for (int v = 0; v < COUNT; ++v) {
      total = _mm256_add_epi32(total, _mm256_madd_epi16(even[v], four(digits + 4 * v)));
      total = _mm256_add_epi32(total, _mm256_madd_epi16(odd[v], four(digits + 4 * v + 2)));
    }
    return {_mm256_cvtepi32_ps(total)};
  }
};

}  // namespace
}  // namespace bitgrain

#include "block_codes.hpp"

namespace bitgrain {

const BlockKernels& avx2_blocks() {
  static const BlockKernels table = {"avx2", prepare_rows, panels_by_code};
  return table;
}

}  // namespace bitgrain
