// Blocks through AVX2, FMA and F16C: eight out features, half a panel.
//
// The multiply-add of unsigned and signed bytes adds pairs with saturation at 16 bits.  Codes below 128 stay under it, and as many
// pairs are added in 16 bits as their LIMIT says; codes of eight bits are multiplied as words.
#include "block_values_avx2.hpp"

namespace bitgrain {
namespace {

constexpr bool takes_words(const BlockFormat& format) { return format.code == CODE_8 || format.code == LEVELS_4; }

// Eight vectors of words are more than the registers hold: a unit is summed in halves.
constexpr int parts_of(const BlockFormat& format) { return format.group == 16 || takes_words(format) ? 2 : 1; }

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
