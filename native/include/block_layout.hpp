// Sizes and places that the block kernels and their interface share.  Internal linkage.
#pragma once
#include <cstdint>

#include "block_kernels.hpp"

namespace bitgrain {
namespace {

constexpr int64_t PANELS_TOGETHER = 4;  // that share the rows' units while these are in the first cache
constexpr int DIGITS = 4;
constexpr int64_t ROWS_TOGETHER = 32;  // rows whose units lie side by side

// x = scale * (d0 + d1 / STEP + d2 / STEP^2 + ...), STEP = 2^8 for bytes and 2^16 for words
struct UnitInput {
  int32_t correction[2][DIGITS];  // -zero times the sum of a digit, per part
  float sum[2];                   // of x, per part
  float scale;
  int32_t count;      // digits that are not all zero; those after them are zero
  int32_t joined[2][2];  // corrections of digits 1 and 2 and of 2 and 3 as one number each, 256 a + b, per part
  union {
    int8_t bytes[DIGITS][BLOCK_UNIT];
    int16_t words[DIGITS / 2][BLOCK_UNIT];  // in features 0, 2, 1, 3 of every four
  };
};
static_assert(sizeof(UnitInput) == 192, "three cache lines");

inline UnitInput* aligned_input(const void* input) {
  return reinterpret_cast<UnitInput*>((reinterpret_cast<uintptr_t>(input) + 63) & ~uintptr_t(63));
}

// Where the first unit of `row` stands: [rows / ROWS_TOGETHER][units][rows together].
inline int64_t unit_place(int64_t row, int64_t units) {
  const int64_t block = row / ROWS_TOGETHER * ROWS_TOGETHER;
  return block * units + row - block;
}

inline int64_t rows_in_block(int64_t row, int64_t rows) {
  const int64_t left = rows - row / ROWS_TOGETHER * ROWS_TOGETHER;
  return left < ROWS_TOGETHER ? left : ROWS_TOGETHER;
}

constexpr int64_t unit_bytes(int32_t code) {
  constexpr int64_t BITS[BLOCK_CODES] = {1, 2, 3, 4, 5, 6, 8, 4, 4};
  return BITS[code] * BLOCK_UNIT * PANEL / 8;
}

// Where the parts of a record with `units` units begin, in bytes.
struct RecordLayout {
  int64_t minima, points, sub, sub_minima, codes, end;

  RecordLayout(const BlockFormat& format, int64_t units) {
    const int64_t spans = format.span ? (units * BLOCK_UNIT + format.span - 1) / format.span : 0, groups = units * BLOCK_UNIT / format.group;
    const int64_t values = spans * PANEL * (format.scale_dtype == F32 ? 4 : 2);
    minima = values;
    points = minima + (format.minimum != NO_MINIMUM && format.minimum != ZERO_POINT ? values : 0);
    sub = points + (format.minimum == ZERO_POINT ? spans * PANEL : 0);
    sub_minima = sub + (format.sub != NO_SUB ? groups * PANEL : 0);
    codes = sub_minima + (format.minimum == SCALED_MINIMUM && format.sub != NIBBLE_SUB ? groups * PANEL : 0);
    end = codes + units * unit_bytes(format.code);
  }
};

}  // namespace
}  // namespace bitgrain
