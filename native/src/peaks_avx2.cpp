// See peaks.hpp.
#include <immintrin.h>

#include "peaks.hpp"

namespace bitgrain {
namespace {

#define ACCUMULATOR(i) __m256i sum##i = _mm256_setzero_si256();

void float32(int64_t rounds) {
  __m256i x = _mm256_setzero_si256();
  BITGRAIN_TWELVE(ACCUMULATOR)
  for (int64_t round = 0; round < rounds; ++round) {
#define STEP(i) asm volatile("vfmadd231ps %1, %1, %0" : "+x"(sum##i) : "x"(x));
    BITGRAIN_TWELVE(STEP)
#undef STEP
  }
}

// 32 products of bytes make 16 sums of two, then 8 of four, which are added up in 32 bits.
void int8(int64_t rounds) {
  __m256i x = _mm256_setzero_si256(), ones = _mm256_set1_epi16(1);
  BITGRAIN_TWELVE(ACCUMULATOR)
  for (int64_t round = 0; round < rounds; ++round) {
#define STEP(i) \
  { \
    __m256i pairs; \
    asm volatile("vpmaddubsw %2, %2, %1\n\tvpmaddwd %3, %1, %1\n\tvpaddd %1, %0, %0" : "+x"(sum##i), "=&x"(pairs) : "x"(x), "x"(ones)); \
  }
    BITGRAIN_TWELVE(STEP)
#undef STEP
  }
}

// Sums of two products stay in 16 bits; what widening them now and then costs is left out: it is the kernel's to make small.
void int4(int64_t rounds) {
  __m256i x = _mm256_setzero_si256();
  BITGRAIN_TWELVE(ACCUMULATOR)
  for (int64_t round = 0; round < rounds; ++round) {
#define STEP(i) \
  { \
    __m256i pairs; \
    asm volatile("vpmaddubsw %2, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum##i), "=&x"(pairs) : "x"(x)); \
  }
    BITGRAIN_TWELVE(STEP)
#undef STEP
  }
}

}  // namespace

const Peaks& avx2_peaks() {
  static const Peaks peaks = {{float32, 12 * 8 * 2}, {nullptr, 0}, {int8, 12 * 32 * 2}, {int4, 12 * 32 * 2}};
  return peaks;
}

}  // namespace bitgrain
