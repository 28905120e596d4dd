// One step of many sequences, one new token each, as a list of operations over buffers.  A buffer has a row per sequence; an
// operation reads and writes columns of buffers.  Structures as kernels/cpu/decode_step.py lays them out.
#pragma once
#include <cstdint>

namespace bitgrain {

enum StepKind : int64_t { STEP_NORM, STEP_ROTATE, STEP_APPEND, STEP_ATTEND, STEP_GATE, STEP_ADD, STEP_BLOCK, STEP_DENSE, STEP_GROUPED, STEP_INTEGER };

struct StepPlace {
  int64_t buffer, column;  // `column` in elements
};

struct StepOperation {
  int64_t kind;
  StepPlace source, second, target;
  const void* call;  // the structure below that belongs to the kind
};

// target = norm(source) for each of `heads` neighbours of `size` entries; may be in place
struct NormCall {
  const void* weight;
  const void* bias;
  int64_t size, heads, wide, weight_dtype;
  double eps;
};

// turns `heads` heads of `source` in place, by angles `angles`
struct RotateCall {
  int64_t size, heads, interleaved, angles;
};

// source: keys, second: values, of one token each, behind the earlier ones of a layer
struct AppendCall {
  int64_t layer, key_width, value_width;
};

// source: queries
struct AttendCall {
  const float* sinks;
  int64_t layer, heads, groups, size, value_size, window;
  double scale, cap;
};

// target = join(source, second); ADD: target += source
struct WidthCall {
  int64_t width;
};

// The matrices: what the functions of the same name in the C interface take.
struct BlockCall {
  const int32_t* format;
  const void* data;
  const float* factor;
  const void* bias;
  int64_t n, k, precision;
};

struct DenseCall {
  const void* weight;
  const void* bias;
  int64_t n, k, weight_dtype;
};

struct GroupedCall {
  const int32_t* gather;
  const void* codes;
  const void* scale;
  const float* second;
  const float* table;
  const int8_t* whole_table;
  const void* zero;
  const int32_t* group_ends;
  const void* bias;
  int64_t n, k, code_kind, scale_dtype, zero_is_float, groups, units;
  double zero_constant, whole_step;
};

struct IntegerCall {
  const void* codes;
  const float* scale;
  const int32_t* column_sums;
  const void* bias;
  int64_t n, k, quads, rules, ranges, static_zero;
  double static_scale, top;
};

struct Angles {
  const void* cosine;  // [rows, turned] of the dtype of the buffers
  const void* sine;
  int64_t turned;
};

struct StepState {
  void* const* buffers;
  const int64_t* widths;            // of a buffer's row, in elements
  const Angles* angles;             // [2]: of all layers, and of those with a window where they have their own
  void* const* const* stores;       // [rows]: per layer keys [capacity, groups, size] and values [capacity, groups, value_size]
  const int64_t* lengths;           // [rows]: tokens before this one, each below its capacity
  int64_t rows, dtype, threads;
};

}  // namespace bitgrain
