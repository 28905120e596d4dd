// Activations as integers: per row and unit of 32 in features, a power of two times up to four signed bytes or two signed words.
// These digits are bits of x: those that are all zero are left out, and an x of few bits, such as bfloat16, needs two or three
// bytes.  What lies 31 bits below the largest magnitude of the unit is rounded.
// Plain loops that the including file's flags vectorize; it defines before: `widen(from, dtype, to)` for 32 values,
// `parts_of(format)`, the groups that a unit is summed in, `takes_words(format)`, `split_bytes(values, to)` and
// `sum_bytes(x, sums)`, see block_digits_avx2.hpp.  Internal linkage.
#pragma once
#include <cstring>

#include "block_layout.hpp"
#include "scalar.hpp"

namespace bitgrain {
namespace {

inline uint32_t largest_magnitude(const float* x) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < BLOCK_UNIT; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// A NaN makes every output NaN; an infinity those whose weight is not zero, and NaN the others.
inline void set_special(const float* x, uint32_t largest, int32_t (&values)[BLOCK_UNIT], UnitInput& to) {
  to.scale = bits_to_float(largest > 0x7f800000 ? 0x7fc00000 : 0x7f800000);
  to.count = 1;
  for (int64_t i = 0; i < BLOCK_UNIT; ++i) {
    const float magnitude = x[i] < 0 ? -x[i] : x[i];
    values[i] = magnitude == bits_to_float(0x7f800000) ? (x[i] < 0 ? -1 : 1) : 0;
  }
}

// Values of 32 bits, the largest from 2^30 on where four signed digits reach that far; 1 is `step`.
inline float set_exact(const float* x, uint32_t largest, int32_t (&values)[BLOCK_UNIT]) {
  constexpr float REACH = 2139062016.0f;  // the largest float32 that is at most 127 (2^24 + 2^16 + 2^8 + 1)
  // below 2^-96 a value keeps the absolute precision that 2^-96 has
  const int exponent = int(largest >> 23) - 127 < -96 ? -96 : int(largest >> 23) - 127;
  const bool beyond = bits_to_float(largest) * bits_to_float(uint32_t(30 - exponent + 127) << 23) > REACH;
  const int shift = 30 - exponent - (beyond ? 1 : 0);
  const float factor = bits_to_float(uint32_t(shift + 127) << 23);
  for (int64_t i = 0; i < BLOCK_UNIT; ++i) values[i] = int32_t(__builtin_rintf(x[i] * factor));
  return bits_to_float(uint32_t(127 - shift) << 23);
}

// Values of `top` at most; returns the step, or 0 where float32 cannot divide by the largest magnitude.
inline float set_rounded(const float* x, uint32_t largest, float top, int32_t (&values)[BLOCK_UNIT]) {
  const float inverse = top / bits_to_float(largest);
  if (inverse > bits_to_float(0x7f7fffff)) return 0.0f;
  for (int64_t i = 0; i < BLOCK_UNIT; ++i) values[i] = int32_t(__builtin_rintf(x[i] * inverse));
  return bits_to_float(largest) / top;
}

inline int32_t union_of(const int32_t (&values)[BLOCK_UNIT]) {
  int32_t all = 0;
  for (int64_t i = 0; i < BLOCK_UNIT; ++i) all |= values[i];
  return all;
}

// `step` becomes that of the first digit.
inline void set_bytes(const int32_t (&values)[BLOCK_UNIT], float step, UnitInput& to) {
  const int32_t all = union_of(values);
  to.count = all & 0xff ? 4 : all & 0xffff ? 3 : all & 0xffffff ? 2 : 1;
  to.scale = step * 16777216.0f;
  split_bytes(values, to);
}

inline void set_words(const int32_t (&values)[BLOCK_UNIT], float step, UnitInput& to) {
  to.count = union_of(values) & 0xffff ? 2 : 1;
  to.scale = step * 65536.0f;
  for (int64_t i = 0; i < BLOCK_UNIT; i += 4) {
    for (int64_t j = 0; j < 4; ++j) {
      const int32_t value = values[i + (j & 1) * 2 + (j >> 1)], last = int16_t(value);
      to.words[1][i + j] = int16_t(last);
      to.words[0][i + j] = int16_t((value - last) >> 16);
    }
  }
}

// Sums of the digits of each part, times -zero, and of x; `step` is that of one digit.
template <int MOST>
inline void set_totals(int32_t (&sums)[2][MOST], float step, int32_t zero, int parts, UnitInput& to) {
  for (int part = 0; part < parts; ++part) {
    float total = 0.0f;
    for (int digit = MOST - 1; digit >= 0; --digit) {
      const int32_t sum = sums[part][digit] + (parts == 1 ? sums[1][digit] : 0);
      to.correction[part][digit] = -zero * sum;
      total = total * step + float(sum);
    }
    to.sum[part] = total * to.scale;
    if constexpr (MOST == DIGITS) {
      for (int i = 0; i < 2; ++i) to.joined[part][i] = 256 * to.correction[part][i + 1] + to.correction[part][i + 2];
    }
  }
}

inline void set_sums(bool words, int32_t zero, int parts, UnitInput& to) {
  if (!words) {
    int32_t sums[2][DIGITS];
    sum_bytes(to, sums);
    return set_totals(sums, 1.0f / 256, zero, parts, to);
  }
  constexpr int64_t SIZE = BLOCK_UNIT / 2;
  int32_t sums[2][DIGITS / 2] = {};
  for (int digit = 0; digit < DIGITS / 2; ++digit)
    for (int part = 0; part < 2; ++part)
      for (int64_t i = 0; i < SIZE; ++i) sums[part][digit] += to.words[digit][part * SIZE + i];
  set_totals(sums, 1.0f / 65536, zero, parts, to);
}

inline void prepare_unit(const BlockFormat& format, int32_t precision, const float* x, UnitInput& to) {
  const uint32_t largest = largest_magnitude(x);
  const bool words = takes_words(format);
  const int parts = parts_of(format);
  alignas(64) int32_t values[BLOCK_UNIT];
  float step = 0.0f;
  std::memset(static_cast<void*>(&to), 0, sizeof to);
  if (largest > 0 && largest < 0x7f800000) {
    if (precision == EXACT_INPUT) step = set_exact(x, largest, values);
    else step = set_rounded(x, largest, words ? 32767.0f : 127.0f, values);
  }
  if (step == 0.0f) {
    if (largest < 0x7f800000) return;
    set_special(x, largest, values, to);
  } else if (precision != EXACT_INPUT) {
    to.count = 1;
    to.scale = step;
  } else {
    words ? set_words(values, step, to) : set_bytes(values, step, to);
    return set_sums(words, format.zero, parts, to);
  }
  for (int64_t i = 0; i < BLOCK_UNIT; ++i) {
    if (words) to.words[0][i] = int16_t(values[(i & ~int64_t(3)) + (i & 1) * 2 + (i >> 1 & 1)]);
    else to.bytes[0][i] = int8_t(values[i]);
  }
  set_sums(words, format.zero, parts, to);
}

inline void prepare_rows(const BlockFormat& format, const void* x, int32_t x_dtype, int64_t x_stride, int64_t k, int64_t rows, int64_t first, int64_t last,
                         int32_t precision, void* input) {
  const int64_t units = k / BLOCK_UNIT, size = x_dtype == F32 ? 4 : 2;
  for (int64_t row = first; row < last; ++row) {
    UnitInput* to = aligned_input(input) + unit_place(row, units);
    const int64_t step = rows_in_block(row, rows);
    const uint8_t* from = static_cast<const uint8_t*>(x) + row * x_stride * size;
    for (int64_t unit = 0; unit < units; ++unit, to += step, from += BLOCK_UNIT * size) {
      alignas(64) float values[BLOCK_UNIT];
      widen(from, x_dtype, values);
      prepare_unit(format, precision, values, *to);
    }
  }
}

}  // namespace
}  // namespace bitgrain
