// Products with dense weights as they are stored.
#pragma once
#include "kernels.hpp"

namespace bitgrain {

// y[m, n] = sum over k of x[m, k] * weight[n, k] + bias[n] in float32, in sixteen sums over k mod 16 that are added in pairs.
struct DenseArgs {
  const float* x;      // [rows, width], width = k rounded up to 16, zero beyond k
  const void* weight;  // [n, k] of weight_dtype
  const void* bias;    // [n] of y_dtype, or null
  void* y;             // [rows, n] of y_dtype
  int64_t rows, n, k, width;
  int32_t weight_dtype, y_dtype;
};

constexpr int64_t DENSE_TASK = 32;  // out features that one thread takes at a time

// Out features [first, last); an output has the same bits whatever the range and the rows beside it, and of weights and rows of 16 bits
// also whatever the instruction set.
using DenseKernel = void (*)(const DenseArgs&, int64_t first, int64_t last);

void portable_dense(const DenseArgs& args, int64_t first, int64_t last);
#ifdef BITGRAIN_X86
void avx2_dense(const DenseArgs& args, int64_t first, int64_t last);
#endif
DenseKernel dense_kernel();  // of the instruction set in use

}  // namespace bitgrain
