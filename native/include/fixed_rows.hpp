// A row of x cut into chunks of whole numbers in three signed bytes, for the fixed-point kernels.  The including file defines
// largest_bits and split_chunk.  Internal linkage.
#pragma once
#include "scalar.hpp"

namespace bitgrain {
namespace {

constexpr int64_t SPLIT_BYTES = 24;  // of one unit of one row
constexpr uint32_t SMALLEST_EXPONENT = 48;  // biased: rows whose largest magnitude is below 2^-79 would lose to the smallest step

// Bits of the largest magnitude of whole units; those of an infinity or a NaN are 0x7f800000 or more.
inline uint32_t largest_bits(const float* x, int64_t units);

// One chunk, whose largest magnitude has the biased exponent `exponent`.
inline void split_chunk(const float* x, int64_t units, uint32_t exponent, uint8_t* to, Chunk& chunk);

inline void split_row(const float* x, const int32_t* group_ends, int64_t groups, const SplitRows& out, int64_t row) {
  uint8_t* to = out.bytes + row * out.row_bytes;
  Chunk* chunk = out.chunks + row * out.chunk_count;
  int64_t unit = 0;
  uint32_t top = 0;
  out.whole[row] = 0;
  for (int64_t g = 0; g < groups; ++g) {
    while (unit < group_ends[g]) {
      const int64_t left = group_ends[g] - unit, units = left < CHUNK_UNITS ? left : CHUNK_UNITS;
      const uint32_t largest = largest_bits(x + unit * UNIT, units), exponent = largest >> 23;
      if (exponent == 255) return;
      top = largest > top ? largest : top;
      // steps stay at 2^-126 or above, where float32 has its full precision
      split_chunk(x + unit * UNIT, units, exponent < 22 ? 22 : exponent, to + unit * SPLIT_BYTES, *chunk++);
      unit += units;
    }
  }
  out.whole[row] = top == 0 || top >> 23 >= SMALLEST_EXPONENT;
}

}  // namespace
}  // namespace bitgrain
