// AVX2, FMA and F16C: eight lanes, two halves of a panel.
#include <immintrin.h>

#include "scalar.hpp"

namespace bitgrain {
namespace {

struct V {
  static constexpr int LANES = 8;
  __m256 v;

  static V set(float value) { return {_mm256_set1_ps(value)}; }
  static V zero() { return {_mm256_setzero_ps()}; }
  static V broadcast(const float* from) { return {_mm256_broadcast_ss(from)}; }
  static V load(const float* from) { return {_mm256_loadu_ps(from)}; }
  static V load_half(const uint16_t* from) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))}; }
  static V load_bf16(const uint16_t* from) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static V load_int16(const int16_t* from) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))))};
  }
  static V fma(const V& a, const V& b, const V& c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  void store(float* to) const { _mm256_storeu_ps(to, v); }
  friend V operator+(const V& a, const V& b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend V operator-(const V& a, const V& b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend V operator*(const V& a, const V& b) { return {_mm256_mul_ps(a.v, b.v)}; }
};

// Bytes before their use at which memory is asked for them, where weights are read once.
constexpr int64_t AHEAD = 2048;

inline __m256i load32(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

// A decoder that needs nothing of the arguments.
struct Plain {
  explicit Plain(const GroupedArgs&) {}
};

struct Nibble : Plain {
  using Plain::Plain;
  static constexpr int64_t BYTES = 64;
  template <int J>
  V value(const uint8_t* unit, int half) const {
    const __m256i nibble = _mm256_and_si256(_mm256_srli_epi32(load32(unit + 32 * half), 4 * J), _mm256_set1_epi32(15));
    return {_mm256_cvtepi32_ps(_mm256_sub_epi32(nibble, _mm256_set1_epi32(8)))};
  }
};

struct Byte : Plain {
  using Plain::Plain;
  static constexpr int64_t BYTES = 128;
  template <int J>
  V value(const uint8_t* unit, int half) const {
    const __m256i lanes = load32(unit + 64 * (J / 4) + 32 * half);
    return {_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(lanes, 24 - 8 * (J % 4)), 24))};
  }
};

// float8 as the upper part of a half: E5M2 is one, E4M3 is one of another bias (the factor 2^8 stands in the scale).  Halves of two
// in features stand in one register; the conversion takes subnormal numbers at full speed, which shifting to float32 would not.
template <int J>
inline V one_of_two(__m256i halves) {
  return {_mm256_cvtph_ps(J & 1 ? _mm256_extracti128_si256(halves, 1) : _mm256_castsi256_si128(halves))};
}

// Codes of in features j and j + 1 (j even) and eight out features, each the upper byte of its word.
template <int J>
inline __m256i upper_bytes(const uint8_t* unit, int half) {
  const __m256i two = load32(unit + 16 * (J & ~1)), zero = _mm256_setzero_si256();
  return half ? _mm256_unpackhi_epi8(zero, two) : _mm256_unpacklo_epi8(zero, two);
}

struct Float4 : Plain {
  using Plain::Plain;
  static constexpr int64_t BYTES = 128;
  template <int J>
  V value(const uint8_t* unit, int half) const {
    // the sign extends over the bit below it: one mask keeps sign and magnitude of the half
    return one_of_two<J>(_mm256_and_si256(_mm256_srai_epi16(upper_bytes<J>(unit, half), 1), _mm256_set1_epi16(int16_t(0xbf80))));
  }
};

struct Float5 : Plain {
  using Plain::Plain;
  static constexpr int64_t BYTES = 128;
  template <int J>
  V value(const uint8_t* unit, int half) const {
    return one_of_two<J>(upper_bytes<J>(unit, half));
  }
};

struct Table {
  static constexpr int64_t BYTES = 64;
  __m256 low, high;
  explicit Table(const GroupedArgs& args) : low(_mm256_loadu_ps(args.table)), high(_mm256_loadu_ps(args.table + 8)) {}
  // A lookup by lane index reads the low three bits; the fourth, moved to the sign, chooses the half of the table.
  template <int J>
  V value(const uint8_t* unit, int half) const {
    const __m256i codes = load32(unit + 32 * half), index = _mm256_srli_epi32(codes, 4 * J);
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28 - 4 * J));
    return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), upper)};
  }
};

struct DenseBf16 : Plain {
  using Plain::Plain;
  static constexpr int64_t BYTES = 256;
  template <int J>
  V value(const uint8_t* unit, int half) const {
    const __m256i pair = load32(unit + 64 * (J / 2) + 32 * half);
    return {_mm256_castsi256_ps(J & 1 ? _mm256_and_si256(pair, _mm256_set1_epi32(int(0xffff0000))) : _mm256_slli_epi32(pair, 16))};
  }
};

struct DenseHalf : Plain {
  using Plain::Plain;
  static constexpr int64_t BYTES = 256;
  template <int J>
  V value(const uint8_t* unit, int half) const {
    return V::load_half(reinterpret_cast<const uint16_t*>(unit + 32 * J + 16 * half));
  }
};

struct DenseFloat : Plain {
  using Plain::Plain;
  static constexpr int64_t BYTES = 512;
  template <int J>
  V value(const uint8_t* unit, int half) const {
    return V::load(reinterpret_cast<const float*>(unit + 64 * J + 32 * half));
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

#include "grouped.hpp"
#include "fixed_avx2.hpp"
#include "quantize.hpp"
#include "integer_avx2.hpp"

namespace bitgrain {

const Kernels& avx2_kernels() {
  static const Kernels table = {"avx2", grouped_by_kind<Decoders>, nullptr, fixed_by_kind, split_row, integer, widen_range, quantize_rows, false};
  return table;
}

}  // namespace bitgrain
