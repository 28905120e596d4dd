// One matrix times all rows, shared out over threads.
#pragma once
#include "kernels.hpp"

namespace bitgrain {

// x [rows, k] of x_dtype, columns taken by `gather` where it is given; fills in what args says of x, and computes y.
void run_grouped(const Kernels& kernels, GroupedArgs args, const void* x, int32_t x_dtype, int64_t k, const int32_t* gather, int32_t threads);

// Quantizes the rows of x, k of x_dtype each, and multiplies.  `quantize` and `args` lack what lies between the two.
void run_integer(const Kernels& kernels, QuantizeArgs quantize, IntegerArgs args, const void* x, int32_t x_dtype, int32_t threads);

void run_quantize(const Kernels& kernels, const QuantizeArgs& args, int32_t threads);

}  // namespace bitgrain
