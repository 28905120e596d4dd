// The dot product of AVX-VNNI: sum += unsigned bytes . signed bytes, four in each lane, without saturation.  Internal linkage.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace bitgrain {
namespace {

#ifdef BITGRAIN_VNNI_EMULATED

// The same sums without the instruction, for builds that compare these files with others where no processor has it.
inline void add_dots(__m256i& sum, __m256i codes, __m256i digits) {
  alignas(32) int32_t sums[8];
  alignas(32) uint8_t a[32];
  alignas(32) int8_t b[32];
  _mm256_store_si256(reinterpret_cast<__m256i*>(sums), sum);
  _mm256_store_si256(reinterpret_cast<__m256i*>(a), codes);
  _mm256_store_si256(reinterpret_cast<__m256i*>(b), digits);
  for (int i = 0; i < 32; ++i) sums[i / 4] += int32_t(a[i]) * b[i];
  sum = _mm256_load_si256(reinterpret_cast<const __m256i*>(sums));
}

#else

// In place: the compiler's intrinsic copies sums before the instruction (GCC 12).
inline void add_dots(__m256i& sum, __m256i codes, __m256i digits) {
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(digits));
}

#endif

inline __m256i four_bytes(const void* from) {
  int32_t value;
  __builtin_memcpy(&value, from, 4);
  return _mm256_set1_epi32(value);
}

}  // namespace
}  // namespace bitgrain
