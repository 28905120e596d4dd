// The experts of one layer: for each row of x, the sum of a few gated feed-forward networks.
#pragma once
#include "kernels.hpp"

namespace bitgrain {

// Which kernels multiply: grouped (kernels.hpp), integer, or those of block_kernels.hpp.
enum Family : int32_t { GROUPED = 0, INTEGER = 1, BLOCKS = 2 };
enum JoinKind : int32_t { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3, CLAMPED = 4 };

// One matrix of one expert: 16 numbers of 8 bytes, a row of the table that kernels/cpu/expert_tables.py makes.
struct ExpertMatrix {
  const uint8_t* codes;
  const void* scale;    // INTEGER: float32 [panels * 16]; BLOCKS: the seven numbers of BlockFormat
  const void* zero;
  const float* second;  // BLOCKS: the factor of each out feature
  const float* table;
  const int8_t* whole_table;
  const int32_t* group_ends;
  const int32_t* gather;       // [units * 8], or null
  const int32_t* column_sums;  // INTEGER
  const void* bias;            // [n] of x's dtype, or null
  int64_t units;               // INTEGER: quads
  int64_t groups;
  double zero_constant, whole_step;
  double static_scale;  // of the activation
  int64_t static_zero;
};

// What all experts have in common of one of their two matrices: 10 numbers of 8 bytes.
struct ExpertSide {
  int64_t n, k, family, code_kind, scale_dtype, zero_is_float;
  int64_t rules, ranges;  // of the activation: INTEGER, as bg_integer
  double top;
  int64_t gathered;  // some expert has a gather
};

struct ExpertsArgs {
  const ExpertMatrix *gate_up, *down;  // [count]
  const ExpertSide* sides;             // [2]
  const void* x;                       // [rows, hidden] of dtype
  const void* weight;                  // [rows, per_token] of weight_dtype
  const int64_t* chosen;               // [rows, per_token], -1: none
  void* y;                             // [rows, hidden] of dtype
  int64_t count, rows, per_token, size;
  int32_t dtype, weight_dtype, join;
  float join_alpha, join_limit;
  int32_t threads;
};

// y[m] = sum over p of weight[m, p] * down_e(join(gate_e(x[m]), up_e(x[m]))), e = chosen[m, p], in the order of e.
void run_experts(const Kernels& kernels, const ExpertsArgs& args);

// One side alone: x [pairs, k] of dtype in the order of experts, ends [count]; y [pairs, n] of y_dtype, rounded once.
struct ExpertsProductArgs {
  const ExpertMatrix* matrices;
  const ExpertSide* side;
  const void* x;
  const int64_t* ends;
  const float* row_scale;  // [pairs], or null
  void* y;
  int64_t count;
  int32_t dtype, y_dtype, threads;
};

void run_experts_product(const Kernels& kernels, const ExpertsProductArgs& args);

}  // namespace bitgrain
