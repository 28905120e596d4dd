// Blocks through NEON: eight out features in two registers, half a panel.  What block_panels.hpp asks for, for the files of NEON
// alone and of NEON with dot products of bytes.  Internal linkage.
//
// Codes are multiplied as signed bytes.  Those of eight bits first lose 128, and 128 times the sum of the digits is added again.
#pragma once
#include <utility>

#include "block_layout.hpp"
#include "neon_values.hpp"
#include "unrolled.hpp"

namespace bitgrain {
namespace {

struct Bytes {
  static constexpr int SIZE = 32;
  uint8x16_t low, high;

  static Bytes load(const uint8_t* from) { return {vld1q_u8(from), vld1q_u8(from + 16)}; }
  static Bytes set(int byte) { return {vdupq_n_u8(uint8_t(byte)), vdupq_n_u8(uint8_t(byte))}; }
  void store(uint8_t* to) const {
    vst1q_u8(to, low);
    vst1q_u8(to + 16, high);
  }
  Bytes masked(int byte) const { return {vandq_u8(low, vdupq_n_u8(uint8_t(byte))), vandq_u8(high, vdupq_n_u8(uint8_t(byte)))}; }
  Bytes up(int bits) const { return {vshlq_u8(low, vdupq_n_s8(int8_t(bits))), vshlq_u8(high, vdupq_n_s8(int8_t(bits)))}; }
  Bytes down(int bits) const { return up(-bits); }
  Bytes looked_up(const uint8_t (&table)[16]) const {
    const uint8x16_t entries = vld1q_u8(table);
    return {vqtbl1q_u8(entries, low), vqtbl1q_u8(entries, high)};
  }
  friend Bytes operator|(const Bytes& a, const Bytes& b) { return {vorrq_u8(a.low, b.low), vorrq_u8(a.high, b.high)}; }
};

inline void widen(const uint8_t* from, int32_t dtype, float* to) {
  for (int i = 0; i < 32; i += 8) {
    const V values = dtype == F32 ? V::load_float(from + 4 * i) : dtype == F16 ? V::load_half(from + 2 * i) : V::load_bf16(from + 2 * i);
    values.store(to + i);
  }
}

constexpr bool takes_words(const BlockFormat&) { return false; }

constexpr int parts_of(const BlockFormat& format) { return format.group == 16 ? 2 : 1; }

// Digits of 32 integers, see block_digits_avx2.hpp: adding 128 to the lower three carries as the signs ask, and the same bits are
// turned back afterwards.
inline void split_bytes(const int32_t (&values)[BLOCK_UNIT], UnitInput& to) {
  const uint32x4_t bias = vdupq_n_u32(0x00808080);
  uint32_t turned[BLOCK_UNIT];
  for (int i = 0; i < BLOCK_UNIT; i += 4) vst1q_u32(turned + i, veorq_u32(vaddq_u32(vreinterpretq_u32_s32(vld1q_s32(values + i)), bias), bias));
  for (int i = 0; i < BLOCK_UNIT; i += 16) {
    const uint8x16x4_t digits = vld4q_u8(reinterpret_cast<const uint8_t*>(turned + i));  // the lowest of each first
    for (int digit = 0; digit < DIGITS; ++digit) vst1q_s8(to.bytes[DIGITS - 1 - digit] + i, vreinterpretq_s8_u8(digits.val[digit]));
  }
}

// sums[part][digit] over 16 in features each
inline void sum_bytes(const UnitInput& x, int32_t (&sums)[2][DIGITS]) {
  for (int part = 0; part < 2; ++part)
    for (int digit = 0; digit < DIGITS; ++digit) sums[part][digit] = vaddlvq_s8(vld1q_s8(x.bytes[digit] + part * BLOCK_UNIT / 2));
}

constexpr int HALVES = 2;

template <class Code>
constexpr int MOST_DIGITS = 4;

// Codes of one half take half of the registers; sums are finished one after another, so rows need no more of them.
template <class Code, int COUNT>
constexpr int DIGIT_ROWS = 4;

#ifdef __ARM_FEATURE_DOTPROD

// sums of four products each
struct Totals {
  int32x4_t low, high;
};

template <class Code, int COUNT, int... AT>
inline Totals products(const int8x16_t (&low)[COUNT], const int8x16_t (&high)[COUNT], const int8x16_t* digits, Totals total, std::integer_sequence<int, AT...>) {
  ((total.low = vdotq_laneq_s32(total.low, low[AT], digits[AT / 4], AT % 4)), ...);
  ((total.high = vdotq_laneq_s32(total.high, high[AT], digits[AT / 4], AT % 4)), ...);
  return total;
}

template <class Code, int COUNT>
inline V dot_codes(const int8x16_t (&low)[COUNT], const int8x16_t (&high)[COUNT], const int8x16_t* digits, int32_t start) {
  const Totals total = products<Code, COUNT>(low, high, digits, {vdupq_n_s32(start), vdupq_n_s32(start)}, std::make_integer_sequence<int, COUNT>());
  return V::of_signed(total.low, total.high);
}

#else

// Products of a code and a digit, 16 bits each, of one register: pairs are added without overflow for up to LIMIT vectors.
template <class Code, int COUNT>
inline int32x4_t products(const int8x16_t (&codes)[COUNT], const int8x8_t (&digits)[COUNT], int32_t start) {
  if (Code::WIDE) {
    int32x4_t low = {start, 0, start, 0}, high = low;  // two lanes for each sum
#pragma GCC unroll 8
    for (int v = 0; v < COUNT; ++v) {
      low = vpadalq_s16(low, vmull_s8(vget_low_s8(codes[v]), digits[v]));
      high = vpadalq_s16(high, vmull_s8(vget_high_s8(codes[v]), digits[v]));
    }
    return vpaddq_s32(low, high);
  }
  constexpr int RUN = Code::WIDE ? 1 : Code::LIMIT < COUNT ? Code::LIMIT : COUNT;
  int32x4_t total = vdupq_n_s32(start);
#pragma GCC unroll 8
  for (int from = 0; from < COUNT; from += RUN) {
    int16x8_t low = vmull_s8(vget_low_s8(codes[from]), digits[from]), high = vmull_s8(vget_high_s8(codes[from]), digits[from]);
#pragma GCC unroll 8
    for (int v = from + 1; v < from + RUN; ++v) {
      low = vmlal_s8(low, vget_low_s8(codes[v]), digits[v]);
      high = vmlal_s8(high, vget_high_s8(codes[v]), digits[v]);
    }
    total = vpadalq_s16(total, vpaddq_s16(low, high));
  }
  return total;
}

template <class Code, int COUNT>
inline V dot_codes(const int8x16_t (&low)[COUNT], const int8x16_t (&high)[COUNT], const int8x16_t* digits, int32_t start) {
  alignas(16) int32_t quads[COUNT];
  for (int i = 0; i < COUNT / 4; ++i) vst1q_s32(quads + 4 * i, vreinterpretq_s32_s8(digits[i]));
  int8x8_t four[COUNT];
#pragma GCC unroll 8
  for (int v = 0; v < COUNT; ++v) four[v] = vreinterpret_s8_s32(vdup_n_s32(quads[v]));
  return V::of_signed(products<Code, COUNT>(low, four, start), products<Code, COUNT>(high, four, start));
}

#endif

// Codes of one half.
template <class Code, int COUNT>
struct Vectors {
  int8x16_t low[COUNT], high[COUNT];

  Vectors(const uint8_t* unit, int half, int first) {
#pragma GCC unroll 8
    for (int v = 0; v < COUNT; ++v) {
      const Bytes codes = Code::value(unit, half, first + v), flip = Bytes::set(Code::WIDE ? 0x80 : 0);
      low[v] = vreinterpretq_s8_u8(veorq_u8(codes.low, flip.low));
      high[v] = vreinterpretq_s8_u8(veorq_u8(codes.high, flip.high));
    }
  }
  V dot(const int8_t* from, int32_t correction) const {
    int8x16_t digits[COUNT / 4];
    int32_t sum = 0;
#pragma GCC unroll 2
    for (int i = 0; i < COUNT / 4; ++i) {
      digits[i] = vld1q_s8(from + 16 * i);
      if (Code::WIDE) sum += vaddlvq_s8(digits[i]);
    }
    return dot_codes<Code, COUNT>(low, high, digits, correction + 128 * sum);
  }
};

// Sums are integers and below 2^22, so the order of their parts does not matter.
template <class Code, int COUNT, int PART, int DIGITS_USED, int ROWS>
inline void dots(const uint8_t* unit, const UnitInput* x, V (&to)[ROWS][HALVES]) {
  each<HALVES>([&](auto half) BITGRAIN_INLINE_LAMBDA {
    const Vectors<Code, COUNT> vectors(unit, half, PART * COUNT);
    each<ROWS>([&](auto row) BITGRAIN_INLINE_LAMBDA {
      const auto digit_dot = [&](int digit) BITGRAIN_INLINE_LAMBDA { return vectors.dot(x[row].bytes[digit] + 4 * PART * COUNT, x[row].correction[PART][digit]); };
      V dot = digit_dot(DIGITS_USED - 1);
      each<DIGITS_USED - 1>([&](auto i) BITGRAIN_INLINE_LAMBDA { dot = V::fma(dot, V::set(1.0f / 256), digit_dot(DIGITS_USED - 2 - i)); });
      to[row][half] = dot;
    });
  });
}

}  // namespace
}  // namespace bitgrain

#include "block_codes.hpp"
