// Blocks through AVX2, FMA and F16C: eight out features, half a panel.
//
// The multiply-add of unsigned and signed bytes adds pairs with saturation at 16 bits.  Codes below 128 stay under it, and as many
// pairs are added in 16 bits as their LIMIT says; codes of eight bits are multiplied as words.
#include "block_digits_avx2.hpp"
#include "block_values_avx2.hpp"
#include "unrolled.hpp"

namespace bitgrain {
namespace {

constexpr bool takes_words(const BlockFormat& format) { return format.code == CODE_8 || format.code == LEVELS_4; }

constexpr int parts_of(const BlockFormat& format) { return format.group == 16 ? 2 : 1; }

constexpr int HALVES = 2;

// Sums in place and in the written order: the compiler collects all products before it adds them, in memory (GCC 12).
BITGRAIN_INLINE void add_words(__m256i& sum, const __m256i& product) { __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(product)); }
BITGRAIN_INLINE void add_longs(__m256i& sum, const __m256i& product) { __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(product)); }

inline __m256i all(const int32_t& value) { return four(&value); }

template <class Code>
constexpr int MOST_DIGITS = Code::WIDE ? 2 : 4;

// vectors whose products may be added in 16 bits
template <class Code, int COUNT>
constexpr int RUN = Code::LIMIT < COUNT ? Code::LIMIT : COUNT;

// Sixteen registers hold the sums of two rows, two halves and three digits, or half of that where runs are short.
template <class Code, int COUNT>
constexpr int DIGIT_ROWS = Code::WIDE || RUN<Code, COUNT> == COUNT ? 2 : 1;

// Codes times bytes: 16-bit sums of up to RUN products of pairs, then 32 bits.
template <class Code, int COUNT, int PART, int DIGITS_USED, int ROWS>
BITGRAIN_INLINE void byte_dots(const uint8_t* unit, const UnitInput* x, V (&to)[ROWS][HALVES]) {
  constexpr int STEPS = RUN<Code, COUNT>;
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i sum[ROWS][HALVES][DIGITS_USED], total[ROWS][HALVES][DIGITS_USED];
  each<COUNT>([&](auto v) BITGRAIN_INLINE_LAMBDA {
    constexpr int vector = PART * COUNT + v;
    const __m256i codes[HALVES] = {Code::value(unit, 0, vector).v, Code::value(unit, 1, vector).v};
    each<ROWS>([&](auto row) BITGRAIN_INLINE_LAMBDA {
      each<DIGITS_USED>([&](auto digit) BITGRAIN_INLINE_LAMBDA {
        const __m256i digits = four(x[row].bytes[digit] + 4 * vector);
        each<HALVES>([&](auto half) BITGRAIN_INLINE_LAMBDA {
          const __m256i product = _mm256_maddubs_epi16(codes[half], digits);
          __m256i& into = sum[row][half][digit];
          if constexpr (v % STEPS == 0) into = product;
          else add_words(into, product);
          if constexpr (STEPS < COUNT && v % STEPS == STEPS - 1) {
            const __m256i wide = _mm256_madd_epi16(into, ones);
            if constexpr (v < STEPS) total[row][half][digit] = wide;
            else add_longs(total[row][half][digit], wide);
          }
        });
      });
    });
  });
  each<ROWS>([&](auto row) BITGRAIN_INLINE_LAMBDA {
    const int32_t* correction = x[row].correction[PART];
    each<HALVES>([&](auto half) BITGRAIN_INLINE_LAMBDA {
      const auto wide = [&](auto digit) BITGRAIN_INLINE_LAMBDA {
        if constexpr (STEPS < COUNT) return total[row][half][digit];
        else return _mm256_madd_epi16(sum[row][half][digit], ones);
      };
      const auto corrected = [&](auto digit) BITGRAIN_INLINE_LAMBDA {
        return _mm256_cvtepi32_ps(_mm256_add_epi32(wide(digit), all(correction[digit])));
      };
      const auto at = [&](auto digit) BITGRAIN_INLINE_LAMBDA { return std::integral_constant<int, digit < DIGITS_USED ? digit : 0>(); };
      const __m256 step = _mm256_set1_ps(1.0f / 256);
      __m256 dot = corrected(at(std::integral_constant<int, DIGITS_USED - 1>()));
      if constexpr (DIGITS_USED > 2 && Code::LIMIT == 8) {
        // 256 times one digit's sum and the next one's are below 2^24: joined, they are as exact
        constexpr int low = DIGITS_USED - 2;
        const __m256i pair = _mm256_add_epi32(_mm256_madd_epi16(sum[row][half][low], _mm256_set1_epi16(256)), wide(at(std::integral_constant<int, low + 1>())));
        dot = _mm256_cvtepi32_ps(_mm256_add_epi32(pair, all(x[row].joined[PART][low - 1])));
        dot = _mm256_fmadd_ps(dot, _mm256_set1_ps(1.0f / 65536), corrected(std::integral_constant<int, low - 1>()));
        if constexpr (low == 2) dot = _mm256_fmadd_ps(dot, step, corrected(std::integral_constant<int, 0>()));
      } else {
        each<DIGITS_USED - 1>([&](auto i) BITGRAIN_INLINE_LAMBDA {
          dot = _mm256_fmadd_ps(dot, step, corrected(std::integral_constant<int, DIGITS_USED - 2 - i>()));
        });
      }
      to[row][half] = {dot};
    });
  });
}

// Codes times words: the sums of 32 products of eight and sixteen bits stay below 2^29.
template <class Code, int COUNT, int PART, int DIGITS_USED, int ROWS>
BITGRAIN_INLINE void word_dots(const uint8_t* unit, const UnitInput* x, V (&to)[ROWS][HALVES]) {
  __m256i sum[ROWS][HALVES][DIGITS_USED];
  each<COUNT>([&](auto v) BITGRAIN_INLINE_LAMBDA {
    constexpr int vector = PART * COUNT + v;
    __m256i even[HALVES], odd[HALVES];
    each<HALVES>([&](auto half) BITGRAIN_INLINE_LAMBDA {
      const __m256i codes = Code::value(unit, half, vector).v;
      even[half] = _mm256_and_si256(codes, _mm256_set1_epi16(255));
      odd[half] = _mm256_srli_epi16(codes, 8);
    });
    each<ROWS>([&](auto row) BITGRAIN_INLINE_LAMBDA {
      each<DIGITS_USED>([&](auto digit) BITGRAIN_INLINE_LAMBDA {
        const int16_t* words = x[row].words[digit] + 4 * vector;
        const __m256i first = four(words), second = four(words + 2);
        each<HALVES>([&](auto half) BITGRAIN_INLINE_LAMBDA {
          __m256i& into = sum[row][half][digit];
          if constexpr (v == 0) into = all(x[row].correction[PART][digit]);
          add_longs(into, _mm256_madd_epi16(even[half], first));
          add_longs(into, _mm256_madd_epi16(odd[half], second));
        });
      });
    });
  });
  each<ROWS>([&](auto row) BITGRAIN_INLINE_LAMBDA {
    each<HALVES>([&](auto half) BITGRAIN_INLINE_LAMBDA {
      to[row][half] = {_mm256_cvtepi32_ps(sum[row][half][DIGITS_USED - 1])};
      if constexpr (DIGITS_USED == 2) to[row][half] = V::fma(to[row][half], V::set(1.0f / 65536), {_mm256_cvtepi32_ps(sum[row][half][0])});
    });
  });
}

template <class Code, int COUNT, int PART, int DIGITS_USED, int ROWS>
BITGRAIN_INLINE void dots(const uint8_t* unit, const UnitInput* x, V (&to)[ROWS][HALVES]) {
  if constexpr (Code::WIDE) word_dots<Code, COUNT, PART, DIGITS_USED, ROWS>(unit, x, to);
  else byte_dots<Code, COUNT, PART, DIGITS_USED, ROWS>(unit, x, to);
}

}  // namespace
}  // namespace bitgrain

#include "block_codes.hpp"

namespace bitgrain {

const BlockKernels& avx2_blocks() {
  static const BlockKernels table = {"avx2", prepare_rows, panels_by_code};
  return table;
}

}  // namespace bitgrain
