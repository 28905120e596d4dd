// Weights stored as small codes with one or two levels of scales, in panels of 16 out features: what callers outside of
// blocks_*.cpp may use.  A caller prepares its rows once per weight, then runs any panels in any order on any threads:
//
//   const BlockKernels& kernels = block_kernels();             // of the instruction set in use
//   std::vector<uint8_t> input(block_input_bytes(rows, k));    // any alignment
//   kernels.prepare(weight.format, x, x_dtype, k, rows, 0, rows, EXACT_INPUT, input.data());   // rows may be shared out
//   kernels.panels(weight, input.data(), rows, first, last, bias, y, y_dtype, y_stride);
//
// Single-threaded, without allocations (20 KB of stack).  Four panels per call or more share passes over the rows.  A row's result
// depends on that row alone: not on the others, on their number, or on the range of panels.
#pragma once
#include <cstdint>

#include "kernels.hpp"

namespace bitgrain {

constexpr int64_t BLOCK_UNIT = 32;     // in features of one unit
constexpr int64_t RECORD_UNITS = 8;    // units of one record; the last record of a panel may have fewer

// What a stored code means: an unsigned number u, whose `zero` is taken away.
enum BlockCode : int32_t { CODE_1, CODE_2, CODE_3, CODE_4, CODE_5, CODE_6, CODE_8, LEVELS_4, FLOAT_4, BLOCK_CODES };

// The one-byte scale of a group: none, an integer, an integer and a minimum as low and high nibble, or a small float.
enum SubScale : int32_t { NO_SUB, UNSIGNED_SUB, SIGNED_SUB, NIBBLE_SUB, E8M0_SUB, E4M3_SUB };

// What is added to every weight of a group: nothing, a number of its span, minus that times a byte of the group, or minus the scale
// times a byte or a number of the span.
enum Minimum : int32_t { NO_MINIMUM, ADDED_MINIMUM, SCALED_MINIMUM, ZERO_POINT, FLOAT_POINT };

// A record (16 out features, up to 256 in features) holds in this order, every value for 16 out features side by side:
//   scales     16 or 32 bits of scale_dtype, one per span            (span > 0)
//   minima     of scale_dtype, one per span                          (ADDED_MINIMUM, SCALED_MINIMUM, FLOAT_POINT)
//   points     bytes, one per span                                   (ZERO_POINT)
//   sub        bytes, one per group                                  (sub != NO_SUB)
//   sub minima bytes, one per group                                  (SCALED_MINIMUM, sub != NIBBLE_SUB)
//   codes      per unit of 32 in features, planes of 4, 2 or 1 bits or bytes (5 = 4 + 1, 6 = 4 + 2, 3 = 2 + 1).  A unit is
//              eight vectors of 64 bytes, byte 4 c + j of vector v for out feature c and in feature 4 v + j; a plane of b bits
//              keeps 8 / b consecutive vectors in 64 bytes, the first at the lowest bits.
// weight = scale * sub * (u - zero) + minimum.  CODE_1 counts 0 and 2; LEVELS_4 are the sixteen levels of the non-linear
// four-bit types, FLOAT_4 those of E2M1 doubled; both with `zero` in them (128 and 12).
struct BlockFormat {
  int32_t code, sub, minimum, scale_dtype;
  int32_t group;  // in features of one scale inside a unit: 16 or 32
  int32_t span;   // in features of one scale of scale_dtype: a multiple of 32 up to 256; 0: there is none
  int32_t zero;
};

struct BlockWeight {
  BlockFormat format;
  const uint8_t* data;  // [panels][records]
  const float* factor;  // [n], multiplies an out feature's sum; null: 1
  int64_t n, k;         // k is a multiple of 32
};

// EXACT_INPUT: x to 31 bits below the largest magnitude of 32 neighbours, which is all of it but in extreme cases.
// INT8_INPUT:  x rounded to eight bits of that magnitude; a quarter to a half of the work, and another result.
enum InputPrecision : int32_t { EXACT_INPUT = 0, INT8_INPUT = 1 };

struct BlockKernels {
  const char* name;
  // Rows [first, last) of x [rows, k]; x_stride in elements.
  void (*prepare)(const BlockFormat& format, const void* x, int32_t x_dtype, int64_t x_stride, int64_t k, int64_t rows, int64_t first, int64_t last,
                  int32_t precision, void* input);
  // y[:, 16 first : 16 last] of all prepared rows; y_stride in elements; bias [n] of y_dtype or null.
  void (*panels)(const BlockWeight& weight, const void* input, int64_t rows, int64_t first, int64_t last, const void* bias, void* y, int32_t y_dtype,
                 int64_t y_stride);
};

int64_t block_input_bytes(int64_t rows, int64_t k);
int64_t block_panel_bytes(const BlockFormat& format, int64_t k);  // of one panel
const BlockKernels& block_kernels();

const BlockKernels& portable_blocks();
#ifdef BITGRAIN_X86
const BlockKernels& avx2_blocks();
const BlockKernels& avx512_blocks();
#endif
#ifdef BITGRAIN_VNNI
const BlockKernels& avxvnni_blocks();
#endif
#ifdef BITGRAIN_NEON
const BlockKernels& neon_blocks();
const BlockKernels& neondot_blocks();
#endif

}  // namespace bitgrain
