// Walsh-Hadamard transforms of blocks of 2^t m entries.
#pragma once
#include <cstdint>

#include "kernels.hpp"

namespace bitgrain {

// y = factor * x (base kron Sylvester)^T per block of `size` entries; see numerics/hadamard.py
struct HadamardArgs {
  const void* x;      // [blocks, size] of dtype
  void* y;            // likewise
  int32_t dtype;
  int64_t blocks, size;
  const float* base;  // [order, order], or null: order 1
  int64_t order;      // divides size, with a power of two as the quotient
  float factor;
  int32_t threads;
  float* scratch;     // `size` of them for each thread
};

using HadamardKernel = void (*)(const HadamardArgs&);

void portable_hadamard(const HadamardArgs& args);
#ifdef BITGRAIN_X86
void avx2_hadamard(const HadamardArgs& args);  // also where AVX-512 is
#endif
#ifdef BITGRAIN_NEON
void neon_hadamard(const HadamardArgs& args);
#endif

}  // namespace bitgrain
