// One instruction on twelve accumulators of 512 bits.  Included by one source file per instruction set.
#pragma once
#include <immintrin.h>

#include "peaks.hpp"

#define BITGRAIN_PEAK_STEP(i) asm volatile(BITGRAIN_PEAK_INSTRUCTION " %1, %1, %0" : "+v"(sum##i) : "v"(x));
#define BITGRAIN_PEAK_SUM(i) __m512i sum##i = _mm512_setzero_si512();
#define BITGRAIN_PEAK_BODY(rounds) \
  __m512i x = _mm512_setzero_si512(); \
  BITGRAIN_TWELVE(BITGRAIN_PEAK_SUM) \
  for (int64_t round = 0; round < rounds; ++round) { \
    BITGRAIN_TWELVE(BITGRAIN_PEAK_STEP) \
  }

namespace bitgrain {
namespace {

#define BITGRAIN_PEAK_INSTRUCTION "vfmadd231ps"
void float32(int64_t rounds) { BITGRAIN_PEAK_BODY(rounds) }
#undef BITGRAIN_PEAK_INSTRUCTION
#define BITGRAIN_PEAK_INSTRUCTION "vpdpbusd"
[[maybe_unused]] void int8(int64_t rounds) { BITGRAIN_PEAK_BODY(rounds) }
#undef BITGRAIN_PEAK_INSTRUCTION

}  // namespace
}  // namespace bitgrain
