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

inline __m256i load32(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

struct Nibble {
  static constexpr int64_t BYTES = 64;
  template <int J>
  static V value(const uint8_t* unit, int half) {
    const __m256i nibble = _mm256_and_si256(_mm256_srli_epi32(load32(unit + 32 * half), 4 * J), _mm256_set1_epi32(15));
    return {_mm256_cvtepi32_ps(_mm256_sub_epi32(nibble, _mm256_set1_epi32(8)))};
  }
};

struct Byte {
  static constexpr int64_t BYTES = 128;
  template <int J>
  static V value(const uint8_t* unit, int half) {
    const __m256i lanes = load32(unit + 64 * (J / 4) + 32 * half);
    return {_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(lanes, 24 - 8 * (J % 4)), 24))};
  }
};

// float8 as the upper part of a half: E5M2 is one, E4M3 is one of another bias (the factor 2^8 stands in the scale)
inline __m256 halves(__m128i bits) { return _mm256_cvtph_ps(bits); }

struct Float4 {
  static constexpr int64_t BYTES = 128;
  template <int J>
  static V value(const uint8_t* unit, int half) {
    const __m128i codes = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(unit + 16 * J + 8 * half)));
    const __m128i sign = _mm_slli_epi16(_mm_and_si128(codes, _mm_set1_epi16(0x80)), 8);
    const __m128i magnitude = _mm_slli_epi16(_mm_and_si128(codes, _mm_set1_epi16(0x7f)), 7);
    return {halves(_mm_or_si128(sign, magnitude))};
  }
};

struct Float5 {
  static constexpr int64_t BYTES = 128;
  template <int J>
  static V value(const uint8_t* unit, int half) {
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(unit + 16 * J + 8 * half));
    return {halves(_mm_slli_epi16(_mm_cvtepu8_epi16(codes), 8))};
  }
};

}  // namespace
}  // namespace bitgrain

#include "grouped.hpp"
#include "quantize.hpp"

namespace bitgrain {
namespace {

void grouped(const GroupedArgs& args) { grouped_by_kind<Nibble, Byte, Float4, Float5>(args); }

// Four rows at most share the widened weights.  Products of 16-bit numbers are exact in 32 bits: the 8-bit multiply-add
// of this instruction set saturates and is not used.
template <int ROWS>
inline void integer_tile(const IntegerArgs& args, const uint8_t* codes, int64_t panel, int64_t row) {
  alignas(32) int32_t dots[ROWS][PANEL];
  for (int part = 0; part < 4; ++part) {  // four out features each
    __m256i sum[ROWS];
    for (int r = 0; r < ROWS; ++r) sum[r] = _mm256_setzero_si256();
    for (int64_t q = 0; q < args.quads; ++q) {
      const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + q * 64 + part * 16));
      const __m256i w = _mm256_cvtepi8_epi16(raw);
      for (int r = 0; r < ROWS; ++r) {
        int32_t four;
        __builtin_memcpy(&four, args.a + (row + r) * args.quads * 4 + q * 4, 4);
        const __m256i a = _mm256_cvtepu8_epi16(_mm_set1_epi32(four));
        sum[r] = _mm256_add_epi32(sum[r], _mm256_madd_epi16(w, a));
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      alignas(32) int32_t pairs[8];
      _mm256_store_si256(reinterpret_cast<__m256i*>(pairs), sum[r]);
      for (int c = 0; c < 4; ++c) dots[r][part * 4 + c] = pairs[2 * c] + pairs[2 * c + 1];
    }
  }
  for (int r = 0; r < ROWS; ++r) store_integer(args, row + r, panel * PANEL, dots[r]);
}

void integer_rows(const IntegerArgs& args, int64_t panel, int64_t row, int64_t end) {
  const uint8_t* codes = args.codes + panel * args.quads * 64;
  for (; row + 4 <= end; row += 4) integer_tile<4>(args, codes, panel, row);
  for (; row < end; ++row) integer_tile<1>(args, codes, panel, row);
}

void integer(const IntegerArgs& args) { integer_blocks(args, integer_rows); }

void quantize(const QuantizeArgs& args) { quantize_rows(args); }

}  // namespace

const Kernels& avx2_kernels() {
  static const Kernels table = {"avx2", grouped, nullptr, integer, quantize};
  return table;
}

}  // namespace bitgrain
