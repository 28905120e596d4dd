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

// float8 as the upper part of a half: E5M2 is one, E4M3 is one of another bias (the factor 2^8 stands in the scale)
inline __m256 halves(__m128i bits) { return _mm256_cvtph_ps(bits); }

struct Float4 : Plain {
  using Plain::Plain;
  static constexpr int64_t BYTES = 128;
  template <int J>
  V value(const uint8_t* unit, int half) const {
    const __m128i codes = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(unit + 16 * J + 8 * half)));
    // the sign extends over the upper bits: one mask keeps sign and magnitude of the half
    return {halves(_mm_and_si128(_mm_slli_epi16(codes, 7), _mm_set1_epi16(int16_t(0xbf80))))};
  }
};

struct Float5 : Plain {
  using Plain::Plain;
  static constexpr int64_t BYTES = 128;
  template <int J>
  V value(const uint8_t* unit, int half) const {
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(unit + 16 * J + 8 * half));
    return {halves(_mm_slli_epi16(_mm_cvtepu8_epi16(codes), 8))};
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

namespace bitgrain {
namespace {

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

inline void integer_rows(const IntegerArgs& args, int64_t panel, int64_t row, int64_t end) {
  const uint8_t* codes = args.codes + panel * args.quads * 64;
  for (; row + 4 <= end; row += 4) integer_tile<4>(args, codes, panel, row);
  for (; row < end; ++row) integer_tile<1>(args, codes, panel, row);
}

void integer(const IntegerArgs& args, int64_t panel, int64_t panel_end, int64_t row, int64_t row_end) {
  for (; panel < panel_end; ++panel) integer_rows(args, panel, row, row_end);
}

}  // namespace

const Kernels& avx2_kernels() {
  static const Kernels table = {"avx2", grouped_by_kind<Decoders>, nullptr, fixed_by_kind, split_row, integer, widen_range, quantize_rows, false};
  return table;
}

}  // namespace bitgrain
