// Loops over registers alone, which measure what an instruction set's arithmetic does at best.
#pragma once
#include <cstdint>

namespace bitgrain {

// One loop; `operations` are the multiplications and additions of one round.  run is null where the set has no such arithmetic.
struct Peak {
  void (*run)(int64_t rounds);
  int64_t operations;
};

// FLOAT32  fused multiplications and additions
// BFLOAT16 products of bfloat16, added up in float32
// INT8     products of whole bytes, added up in int32
// INT4     products of four-bit codes and bytes whose sums stay in 16 bits for a while; null where that is not faster than INT8
struct Peaks {
  Peak float32, bfloat16, int8, int4;
};

const Peaks& portable_peaks();
#ifdef BITGRAIN_X86
const Peaks& avx2_peaks();
const Peaks& avx512_peaks();
#endif
#ifdef BITGRAIN_BF16
const Peaks& avx512bf16_peaks();
const Peaks& amx_peaks();
#endif

}  // namespace bitgrain

// Twelve independent accumulators hide the latency of every instruction that is measured here; the compiler must neither
// drop nor copy them, so each instruction is written as it is.
#define BITGRAIN_TWELVE(STEP) STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9) STEP(10) STEP(11)
