// What a step computes between its matrix products, one row or head at a time: norms, rotary embedding, gates, and the
// attention of few rows.  Each function works on a range of items by itself; step_interface.cpp shares ranges among threads.
#pragma once
#include "kernels.hpp"

namespace bitgrain {

// y = weight * round(x / sqrt(mean(x^2) + eps)) + bias, rounded after each; wide: weight * x / sqrt(..) in float32, rounded once
struct NormArgs {
  const void* x;       // [rows, size], `stride` elements apart
  const void* weight;  // [size] of weight_dtype
  const void* bias;    // [size] of dtype, or null
  void* y;             // [rows, size]
  int64_t rows, size, stride;
  float eps;
  int32_t wide, weight_dtype, dtype;
};

// The first `turned` entries of each head by their row's angles; products and sums rounded as torch rounds them.
struct RotateArgs {
  const void* x;       // [rows, heads, size], rows `stride` elements apart
  const void* cosine;  // [rows, turned]
  const void* sine;    // [rows, turned]
  void* y;             // [rows, heads, size]
  int64_t rows, heads, size, turned, stride;
  int32_t interleaved, dtype;
};

// y = round(act(gate)) * up; act is silu
struct GateArgs {
  const void* gate;  // [rows, size], `stride` elements apart, as up
  const void* up;
  void* y;           // [rows, size]
  int64_t rows, size, stride;
  int32_t dtype;
};

// Causal attention of the last `rows` of `total` tokens, in float32; scores are scale * q k, capped if cap > 0.
struct AttendArgs {
  const void* q;       // [rows, heads, size], rows `q_stride` elements apart
  const void* keys;    // [total, groups, size], tokens `key_stride` elements apart
  const void* values;  // [total, groups, value_size], tokens `value_stride` elements apart
  const float* sinks;  // [heads] or null
  void* y;             // [rows, heads, value_size]
  int64_t rows, heads, groups, size, value_size, total, window;  // window: tokens seen, itself included; 0: all
  int64_t q_stride, key_stride, value_stride;
  float scale, cap;
  int32_t dtype;
};

struct StepKernels {
  void (*norm)(const NormArgs&, int64_t first, int64_t last);      // rows
  void (*rotate)(const RotateArgs&, int64_t first, int64_t last);  // rows
  void (*gate)(const GateArgs&, int64_t first, int64_t last);      // rows * size, cut anywhere
  // pairs of a row and a group; scratch: (heads / groups) * (total + size + value_size) + size + value_size floats
  void (*attend)(const AttendArgs&, int64_t first, int64_t last, float* scratch);
  void (*add)(const void* x, void* y, int64_t count, int32_t dtype);  // y += x, rounded to dtype
};

const StepKernels& step_kernels();  // of the instruction set in use

const StepKernels& portable_step_kernels();
#ifdef BITGRAIN_X86
const StepKernels& avx2_step_kernels();
const StepKernels& avx512_step_kernels();
#endif

}  // namespace bitgrain
