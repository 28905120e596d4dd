// Blocks through AVX2, FMA and F16C with AVX-VNNI: eight out features, half a panel; products of bytes are added in 32 bits.
#include "block_digits_avx2.hpp"
#include "block_values_avx2.hpp"
#include "dot_avxvnni.hpp"
#include "unrolled.hpp"

namespace bitgrain {
namespace {

constexpr bool takes_words(const BlockFormat&) { return false; }

constexpr int parts_of(const BlockFormat& format) { return format.group == 16 ? 2 : 1; }

constexpr int HALVES = 2;

template <class Code>
constexpr int MOST_DIGITS = 4;

// Sixteen registers hold the sums of two rows, two halves and three digits.
template <class Code, int COUNT>
constexpr int DIGIT_ROWS = 2;

template <class Code, int COUNT, int PART, int DIGITS_USED, int ROWS>
BITGRAIN_INLINE void dots(const uint8_t* unit, const UnitInput* x, V (&to)[ROWS][HALVES]) {
  __m256i sum[ROWS][HALVES][DIGITS_USED];
  each<ROWS>([&](auto row) BITGRAIN_INLINE_LAMBDA {
    each<DIGITS_USED>([&](auto digit) BITGRAIN_INLINE_LAMBDA { sum[row][0][digit] = sum[row][1][digit] = _mm256_set1_epi32(x[row].correction[PART][digit]); });
  });
  each<COUNT>([&](auto v) BITGRAIN_INLINE_LAMBDA {
    constexpr int vector = PART * COUNT + v;
    const __m256i codes[HALVES] = {Code::value(unit, 0, vector).v, Code::value(unit, 1, vector).v};
    each<ROWS>([&](auto row) BITGRAIN_INLINE_LAMBDA {
      each<DIGITS_USED>([&](auto digit) BITGRAIN_INLINE_LAMBDA {
        const __m256i digits = four(x[row].bytes[digit] + 4 * vector);
        each<HALVES>([&](auto half) BITGRAIN_INLINE_LAMBDA { add_dots(sum[row][half][digit], codes[half], digits); });
      });
    });
  });
  each<ROWS>([&](auto row) BITGRAIN_INLINE_LAMBDA {
    each<HALVES>([&](auto half) BITGRAIN_INLINE_LAMBDA {
      __m256 dot = _mm256_cvtepi32_ps(sum[row][half][DIGITS_USED - 1]);
      each<DIGITS_USED - 1>([&](auto i) BITGRAIN_INLINE_LAMBDA {
        dot = _mm256_fmadd_ps(dot, _mm256_set1_ps(1.0f / 256), _mm256_cvtepi32_ps(sum[row][half][DIGITS_USED - 2 - i]));
      });
      to[row][half] = {dot};
    });
  });
}

}  // namespace
}  // namespace bitgrain

#include "block_codes.hpp"

namespace bitgrain {

const BlockKernels& avxvnni_blocks() {
  static const BlockKernels table = {"avxvnni", prepare_rows, panels_by_code};
  return table;
}

}  // namespace bitgrain
