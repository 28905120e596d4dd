// AVX-512 (F, BW, VL, DQ) with VNNI: sixteen lanes, one panel.
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

struct Nibble {
  static constexpr int64_t BYTES = 64;
  // A lookup by lane index reads the low four bits only, so the nibble needs no mask.
  template <int J>
  static V value(const uint8_t* unit, int) {
    const __m512 table = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
    return {_mm512_permutexvar_ps(_mm512_srli_epi32(load64(unit), 4 * J), table)};
  }
};

struct Byte {
  static constexpr int64_t BYTES = 128;
  template <int J>
  static V value(const uint8_t* unit, int) {
    const __m512i lanes = load64(unit + 64 * (J / 4));
    return {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(lanes, 24 - 8 * (J % 4)), 24))};
  }
};

struct Float4 {
  static constexpr int64_t BYTES = 128;
  template <int J>
  static V value(const uint8_t* unit, int) {
    const __m256i codes = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(unit + 16 * J)));
    // the sign extends over the upper bits: one mask keeps sign and magnitude of the half
    const __m256i bits = _mm256_and_si256(_mm256_slli_epi16(codes, 7), _mm256_set1_epi16(int16_t(0xbf80)));
    return {_mm512_cvtph_ps(bits)};
  }
};

struct Float5 {
  static constexpr int64_t BYTES = 128;
  template <int J>
  static V value(const uint8_t* unit, int) {
    const __m256i codes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(unit + 16 * J)));
    return {_mm512_cvtph_ps(_mm256_slli_epi16(codes, 8))};
  }
};

}  // namespace
}  // namespace bitgrain

#include "grouped.hpp"
#include "quantize.hpp"

namespace bitgrain {
namespace {

void grouped(const GroupedArgs& args) { grouped_by_kind<Nibble, Byte, Float4, Float5>(args); }

// In place: the compiler's intrinsic copies every accumulator before the instruction (GCC 12).
inline void dot_in_place(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}

template <int ROWS>
inline void integer_tile(const IntegerArgs& args, const uint8_t* codes, int64_t panel, int64_t row) {
  __m512i sum[ROWS][2];
  const uint8_t* a[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    sum[r][0] = sum[r][1] = _mm512_setzero_si512();
    a[r] = args.a + (row + r) * args.quads * 4;
  }
  for (int64_t q = 0; q < args.quads; q += 2) {  // quads is even
    const __m512i w0 = load64(codes + q * 64), w1 = load64(codes + q * 64 + 64);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      int32_t four[2];
      __builtin_memcpy(four, a[r] + q * 4, 8);
      dot_in_place(sum[r][0], _mm512_set1_epi32(four[0]), w0);
      dot_in_place(sum[r][1], _mm512_set1_epi32(four[1]), w1);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    alignas(64) int32_t dots[PANEL];
    _mm512_store_si512(dots, _mm512_add_epi32(sum[r][0], sum[r][1]));
    store_integer(args, row + r, panel * PANEL, dots);
  }
}

void integer_rows(const IntegerArgs& args, int64_t panel, int64_t row, int64_t end) {
  const uint8_t* codes = args.codes + panel * args.quads * 64;
  for (; row + 8 <= end; row += 8) integer_tile<8>(args, codes, panel, row);
  for (; row + 2 <= end; row += 2) integer_tile<2>(args, codes, panel, row);
  for (; row < end; ++row) integer_tile<1>(args, codes, panel, row);
}

void integer(const IntegerArgs& args) { integer_blocks(args, integer_rows); }

void quantize(const QuantizeArgs& args) { quantize_rows(args); }

}  // namespace

const Kernels& avx512_kernels() {
  static const Kernels table = {"avx512", grouped, integer, quantize};
  return table;
}

}  // namespace bitgrain
