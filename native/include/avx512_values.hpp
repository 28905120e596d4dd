// Sixteen lanes of AVX-512 (F, BW, VL, DQ), and the codes of one panel as float32 vectors.  Internal linkage.
#pragma once
#include <immintrin.h>

#include "scalar.hpp"

namespace bitgrain {
namespace {

struct V {
  static constexpr int LANES = 16;
  __m512 v;

  static V set(float value) { return {_mm512_set1_ps(value)}; }
  static V zero() { return {_mm512_setzero_ps()}; }
  static V broadcast(const float* from) { return {_mm512_set1_ps(*from)}; }
  static V load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static V load_half(const uint16_t* from) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))}; }
  static V load_bf16(const uint16_t* from) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  static V load_int16(const int16_t* from) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))))};
  }
  static V fma(const V& a, const V& b, const V& c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  void store(float* to) const { _mm512_storeu_ps(to, v); }
  friend V operator+(const V& a, const V& b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend V operator-(const V& a, const V& b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend V operator*(const V& a, const V& b) { return {_mm512_mul_ps(a.v, b.v)}; }
};

inline __m512i load64(const uint8_t* from) { return _mm512_loadu_si512(from); }

// A decoder that needs nothing of the arguments.
struct Plain {
  explicit Plain(const GroupedArgs&) {}
};

struct Nibble : Plain {
  using Plain::Plain;
  static constexpr int64_t BYTES = 64;
  // A lookup by lane index reads the low four bits only, so the nibble needs no mask.
  template <int J>
  V value(const uint8_t* unit, int) const {
    const __m512 table = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
    return {_mm512_permutexvar_ps(_mm512_srli_epi32(load64(unit), 4 * J), table)};
  }
};

struct Byte : Plain {
  using Plain::Plain;
  static constexpr int64_t BYTES = 128;
  template <int J>
  V value(const uint8_t* unit, int) const {
    const __m512i lanes = load64(unit + 64 * (J / 4));
    return {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(lanes, 24 - 8 * (J % 4)), 24))};
  }
};

struct Float4 : Plain {
  using Plain::Plain;
  static constexpr int64_t BYTES = 128;
  template <int J>
  V value(const uint8_t* unit, int) const {
    const __m256i codes = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(unit + 16 * J)));
    // the sign extends over the upper bits: one mask keeps sign and magnitude of the half
    const __m256i bits = _mm256_and_si256(_mm256_slli_epi16(codes, 7), _mm256_set1_epi16(int16_t(0xbf80)));
    return {_mm512_cvtph_ps(bits)};
  }
};

struct Float5 : Plain {
  using Plain::Plain;
  static constexpr int64_t BYTES = 128;
  template <int J>
  V value(const uint8_t* unit, int) const {
    const __m256i codes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(unit + 16 * J)));
    return {_mm512_cvtph_ps(_mm256_slli_epi16(codes, 8))};
  }
};

struct Table {
  static constexpr int64_t BYTES = 64;
  __m512 table;
  explicit Table(const GroupedArgs& args) : table(_mm512_loadu_ps(args.table)) {}
  template <int J>
  V value(const uint8_t* unit, int) const {
    return {_mm512_permutexvar_ps(_mm512_srli_epi32(load64(unit), 4 * J), table)};
  }
};

struct DenseBf16 : Plain {
  using Plain::Plain;
  static constexpr int64_t BYTES = 256;
  template <int J>
  V value(const uint8_t* unit, int) const {
    const __m512i pair = load64(unit + 64 * (J / 2));
    return {_mm512_castsi512_ps(J & 1 ? _mm512_and_si512(pair, _mm512_set1_epi32(int(0xffff0000))) : _mm512_slli_epi32(pair, 16))};
  }
};

struct DenseHalf : Plain {
  using Plain::Plain;
  static constexpr int64_t BYTES = 256;
  template <int J>
  V value(const uint8_t* unit, int) const {
    return V::load_half(reinterpret_cast<const uint16_t*>(unit + 32 * J));
  }
};

struct DenseFloat : Plain {
  using Plain::Plain;
  static constexpr int64_t BYTES = 512;
  template <int J>
  V value(const uint8_t* unit, int) const {
    return V::load(reinterpret_cast<const float*>(unit + 64 * J));
  }
};

struct Decoders {
  using Nibble = bitgrain::Nibble;
  using Byte = bitgrain::Byte;
  using Float4 = bitgrain::Float4;
  using Float5 = bitgrain::Float5;
  using Table = bitgrain::Table;
  using DenseBf16 = bitgrain::DenseBf16;
  using DenseHalf = bitgrain::DenseHalf;
  using DenseFloat = bitgrain::DenseFloat;
};

}  // namespace
}  // namespace bitgrain
