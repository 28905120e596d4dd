// The table of kernels that each instruction set fills, and the plain arguments that they take.
#pragma once
#include <cstdint>

namespace bitgrain {

constexpr int64_t PANEL = 16;  // out features that lie side by side
constexpr int64_t UNIT = 8;    // in features that lie side by side

enum Dtype : int32_t { F32 = 0, F16 = 1, BF16 = 2 };
enum Ranges : int32_t { STATIC = 0, PER_TOKEN = 1, PER_TENSOR = 2 };
enum Codes : int32_t { NIBBLE = 0, BYTE = 1, E4M3 = 2, E5M2 = 3 };

// y[m, n] = row_scale[m] * sum over groups g of scale[n, g] * (dot(code[n, k in g], x[m, k in g]) - zero[n, g] * sum(x[m, k in g])) + bias[n]
//
// Codes of panel p, unit u (16 out features, 8 in features):
//   NIBBLE  64 bytes: one 32-bit lane per out feature, nibble j holds in feature 8u + j; value = nibble - 8
//   BYTE   128 bytes: two vectors of 16 lanes, lane byte j of vector v holds in feature 8u + 4v + j; value = signed byte
//   E4M3   128 bytes: eight rows (in features) of 16 bytes; value = float8 / 256, the scale holds the rest
//   E5M2   128 bytes: likewise; value = float8
struct GroupedArgs {
  const float* x;             // [rows, units * 8], zero beyond K
  const uint16_t* x16;        // grouped16 instead of x: bfloat16 [rows up to 16 or a multiple of it, units * 8 up to a multiple of 32]
  const float* x_sums;        // [rows, groups], for grouped16 [groups, rows]; null when zero points need none
  const uint8_t* codes;       // [panels][units][bytes per unit]
  const void* scale;          // [panels][groups][16] of scale_dtype
  const void* zero;           // [panels][groups][16]: int16 or float32; null: zero_constant
  const int32_t* group_ends;  // [groups], in units, ascending; the last is `units`
  const float* row_scale;     // [rows]; null: 1
  const void* bias;           // [n] of y_dtype, or null
  void* y;                    // [rows, n] of y_dtype
  int64_t rows, n, units, groups;
  int32_t code_kind, scale_dtype, zero_is_float, y_dtype;
  float zero_constant;
  int32_t threads;
};

// y[m, n] = (dot(a[m], w[n]) - a_zero[m] * column_sum[n]) * a_scale[m] * w_scale[n] + bias[n], the dot product in int32
struct IntegerArgs {
  const uint8_t* a;            // [rows, quads * 4]: signed code + 128, 128 beyond K
  const float* a_scale;        // [rows]
  const int32_t* a_zero;       // [rows], zero point + 128
  const uint8_t* codes;        // [panels][quads][16][4], signed
  const float* w_scale;        // [panels * 16]
  const int32_t* column_sums;  // [panels * 16]: sum of a row of w
  const void* bias;
  void* y;
  int64_t rows, n, quads;
  int32_t y_dtype, threads;
};

// Per row: amax or (min, max), scale, zero point, codes; the formulas stand in weights/activation.py.  A row with a NaN, or of
// a tensor with one, gets the scale NaN.
struct QuantizeArgs {
  const float* x;    // [rows, k]
  uint8_t* a;        // [rows, quads * 4]
  float* scale;      // [rows]
  int32_t* zero;     // [rows], + 128
  int64_t rows, k, quads;
  int32_t symmetric, dynamic;  // dynamic: one of Ranges
  float static_scale;
  int32_t static_zero;
  float top;  // symmetric and dynamic: the code that the largest magnitude stands for
  int32_t threads;
};

struct Kernels {
  const char* name;
  void (*grouped)(const GroupedArgs&);
  void (*grouped16)(const GroupedArgs&);  // takes x16, groups of whole 32 in features except the last; null: there is none
  void (*integer)(const IntegerArgs&);
  void (*quantize)(const QuantizeArgs&);
};

const Kernels& portable_kernels();
#ifdef BITGRAIN_X86
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif
#ifdef BITGRAIN_BF16
const Kernels& avx512bf16_kernels();
const Kernels& amx_kernels();
bool request_tiles();  // true when the system lets this process use the tile registers
#endif

}  // namespace bitgrain
