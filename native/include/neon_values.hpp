// Eight lanes of NEON in two registers: floats and unsigned numbers of 32 bits.  Internal linkage.
#pragma once
#include <arm_neon.h>

#include "scalar.hpp"

namespace bitgrain {
namespace {

struct I;

struct V {
  static constexpr int LANES = 8;
  float32x4_t low, high;

  static V set(float value) { return {vdupq_n_f32(value), vdupq_n_f32(value)}; }
  static V zero() { return set(0.0f); }
  static V broadcast(const float* from) { return {vld1q_dup_f32(from), vld1q_dup_f32(from)}; }
  static V load(const float* from) { return {vld1q_f32(from), vld1q_f32(from + 4)}; }
  static V widen_half(uint16x8_t bits) { return {vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(bits))), vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(bits)))}; }
  static V widen_bf16(uint16x8_t bits) { return of_bits(vshll_n_u16(vget_low_u16(bits), 16), vshll_n_u16(vget_high_u16(bits), 16)); }
  static V of_bits(uint32x4_t low, uint32x4_t high) { return {vreinterpretq_f32_u32(low), vreinterpretq_f32_u32(high)}; }
  static V of_signed(int32x4_t low, int32x4_t high) { return {vcvtq_f32_s32(low), vcvtq_f32_s32(high)}; }
  static V of_unsigned(uint16x8_t numbers) { return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(numbers))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(numbers)))}; }
  static V of_signed(int16x8_t numbers) { return of_signed(vmovl_s16(vget_low_s16(numbers)), vmovl_s16(vget_high_s16(numbers))); }
  static V load_half(const uint16_t* from) { return widen_half(vld1q_u16(from)); }
  static V load_bf16(const uint16_t* from) { return widen_bf16(vld1q_u16(from)); }
  static V load_int16(const int16_t* from) { return of_signed(vld1q_s16(from)); }
  template <int DTYPE>
  static V load_as(const void* from, int64_t at) {
    if (DTYPE == F32) return load(static_cast<const float*>(from) + at);
    const uint16_t* raw = static_cast<const uint16_t*>(from) + at;
    return DTYPE == F16 ? load_half(raw) : load_bf16(raw);
  }
  static V load_any(const void* from, int64_t at, int32_t dtype) {
    return dtype == F32 ? load_as<F32>(from, at) : dtype == F16 ? load_as<F16>(from, at) : load_as<BF16>(from, at);
  }
  // from bytes at any address
  static V load_float(const uint8_t* from) { return of_bits(vreinterpretq_u32_u8(vld1q_u8(from)), vreinterpretq_u32_u8(vld1q_u8(from + 16))); }
  static V load_half(const uint8_t* from) { return widen_half(vreinterpretq_u16_u8(vld1q_u8(from))); }
  static V load_bf16(const uint8_t* from) { return widen_bf16(vreinterpretq_u16_u8(vld1q_u8(from))); }
  static V load_bytes(const uint8_t* from) { return of_unsigned(vmovl_u8(vld1_u8(from))); }
  static V load_signed(const uint8_t* from) { return of_signed(vmovl_s8(vreinterpret_s8_u8(vld1_u8(from)))); }
  static V load_nibbles(const uint8_t* from, bool high) {
    const uint8x8_t bytes = vld1_u8(from);
    return of_unsigned(vmovl_u8(high ? vshr_n_u8(bytes, 4) : vand_u8(bytes, vdup_n_u8(15))));
  }
  static V load_exponents(const uint8_t* from) {  // 2^(byte - 127); the byte 0 is a subnormal number
    const uint16x8_t bytes = vmovl_u8(vld1_u8(from));
    const uint32x4_t least = vdupq_n_u32(0x00400000);
    return of_bits(vmaxq_u32(vshlq_n_u32(vmovl_u16(vget_low_u16(bytes)), 23), least), vmaxq_u32(vshlq_n_u32(vmovl_u16(vget_high_u16(bytes)), 23), least));
  }
  static V load_e4m3(const uint8_t* from) {  // a half of another bias
    return widen_half(vshlq_n_u16(vmovl_u8(vld1_u8(from)), 7)) * set(256.0f);
  }
  static V fma(const V& a, const V& b, const V& c) { return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)}; }
  static V gather(const float* table, const I& index);
  static V gather_pairs(const float* table, const I& row);
  static V look_up16(const I& index, const float* table);
  struct Nibbles;
  template <int DTYPE>
  static V gather_as(const void* table, const I& index);
  V flip(const I& signs) const;
  void store(float* to) const {
    vst1q_f32(to, low);
    vst1q_f32(to + 4, high);
  }
  void store_any(void* to, int64_t at, int32_t dtype) const {
    if (dtype == F32) return store(static_cast<float*>(to) + at);
    uint16_t* const out = static_cast<uint16_t*>(to) + at;
    if (dtype == F16) return vst1q_u16(out, vcombine_u16(vreinterpret_u16_f16(vcvt_f16_f32(low)), vreinterpret_u16_f16(vcvt_f16_f32(high))));
    vst1q_u16(out, vcombine_u16(rounded_bf16(low), rounded_bf16(high)));
  }
  static uint16x4_t rounded_bf16(float32x4_t values) {  // nearest, ties to even; NaN stays NaN
    const uint32x4_t bits = vreinterpretq_u32_f32(values), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t moved = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(values, values), moved, vorrq_u32(bits, vdupq_n_u32(0x400000))), 16);
  }
  float sum() const {
    const float32x4_t four = vaddq_f32(low, high);
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
  }
  static void transpose4(float32x4_t& a, float32x4_t& b, float32x4_t& c, float32x4_t& d) {
    const float64x2_t ab = vreinterpretq_f64_f32(vtrn1q_f32(a, b)), ab_odd = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
    const float64x2_t cd = vreinterpretq_f64_f32(vtrn1q_f32(c, d)), cd_odd = vreinterpretq_f64_f32(vtrn2q_f32(c, d));
    a = vreinterpretq_f32_f64(vtrn1q_f64(ab, cd));
    b = vreinterpretq_f32_f64(vtrn1q_f64(ab_odd, cd_odd));
    c = vreinterpretq_f32_f64(vtrn2q_f64(ab, cd));
    d = vreinterpretq_f32_f64(vtrn2q_f64(ab_odd, cd_odd));
  }
  static void transpose(V (&a)[8]) {
    transpose4(a[0].low, a[1].low, a[2].low, a[3].low);
    transpose4(a[0].high, a[1].high, a[2].high, a[3].high);
    transpose4(a[4].low, a[5].low, a[6].low, a[7].low);
    transpose4(a[4].high, a[5].high, a[6].high, a[7].high);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const float32x4_t kept = a[i].high;
      a[i].high = a[i + 4].low;
      a[i + 4].low = kept;
    }
  }
  // sums and differences of lanes 1, 2 and 4 apart
  V butterflies() const {
    const float32x4_t ones = {1, -1, 1, -1}, twos = {1, 1, -1, -1};
    const float32x4_t a = vfmaq_f32(vrev64q_f32(low), low, ones), b = vfmaq_f32(vrev64q_f32(high), high, ones);
    const float32x4_t c = vfmaq_f32(vextq_f32(a, a, 2), a, twos), d = vfmaq_f32(vextq_f32(b, b, 2), b, twos);
    return {vaddq_f32(c, d), vsubq_f32(c, d)};
  }
  friend V operator+(const V& a, const V& b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
  friend V operator-(const V& a, const V& b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
  friend V operator*(const V& a, const V& b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
};

struct I {
  uint32x4_t low, high;

  static I set(uint32_t value) { return {vdupq_n_u32(value), vdupq_n_u32(value)}; }
  static I load_unsigned(const uint32_t* from) { return {vld1q_u32(from), vld1q_u32(from + 4)}; }
  static I load(const int32_t* from) { return {vreinterpretq_u32_s32(vld1q_s32(from)), vreinterpretq_u32_s32(vld1q_s32(from + 4))}; }
  static I load_raw(const uint8_t* from) { return {vreinterpretq_u32_u8(vld1q_u8(from)), vreinterpretq_u32_u8(vld1q_u8(from + 16))}; }
  static I load_words(const uint16_t* from) { return widened(vld1q_u16(from)); }
  static I load_bytes(const uint8_t* from) { return widened(vmovl_u8(vld1_u8(from))); }
  static I widened(uint16x8_t words) { return {vmovl_u16(vget_low_u16(words)), vmovl_u16(vget_high_u16(words))}; }
  template <class At>
  static I read(const uint8_t* stream, const At& at) {
    const uint8x16_t first = vqtbl1q_u8(vld1q_u8(stream + at.low), vld1q_u8(at.bytes)), second = vqtbl1q_u8(vld1q_u8(stream + at.high), vld1q_u8(at.bytes + 16));
    return I{vreinterpretq_u32_u8(first), vreinterpretq_u32_u8(second)}.shifted(load_unsigned(at.shift));
  }
  // four bytes in every lane, shifted
  static I read_word(const uint8_t* from, const I& shifts) {
    uint32_t word;
    __builtin_memcpy(&word, from, 4);
    return set(word).shifted(shifts);
  }
  void store(uint32_t* to) const {
    vst1q_u32(to, low);
    vst1q_u32(to + 4, high);
  }
  I shifted(const I& bits) const {
    return {vshlq_u32(low, vnegq_s32(vreinterpretq_s32_u32(bits.low))), vshlq_u32(high, vnegq_s32(vreinterpretq_s32_u32(bits.high)))};
  }
  I shifted(int bits) const { return {vshlq_u32(low, vdupq_n_s32(-bits)), vshlq_u32(high, vdupq_n_s32(-bits))}; }
  I raised(int bits) const { return {vshlq_u32(low, vdupq_n_s32(bits)), vshlq_u32(high, vdupq_n_s32(bits))}; }
  I where_zero(const I& other) const { return {vandq_u32(low, vceqzq_u32(other.low)), vandq_u32(high, vceqzq_u32(other.high))}; }
  static uint32x4_t high_words(uint32x4_t a, uint32_t factor) {
    const uint32x4_t by = vdupq_n_u32(factor);
    return vuzp2q_u32(vreinterpretq_u32_u64(vmull_u32(vget_low_u32(a), vget_low_u32(by))), vreinterpretq_u32_u64(vmull_high_u32(a, by)));
  }
  I times_high(uint32_t factor) const { return {high_words(low, factor), high_words(high, factor)}; }
  I byte_sums() const { return {vpaddlq_u16(vpaddlq_u8(vreinterpretq_u8_u32(low))), vpaddlq_u16(vpaddlq_u8(vreinterpretq_u8_u32(high)))}; }
  V minus(int value) const {
    const int32x4_t by = vdupq_n_s32(value);
    return V::of_signed(vsubq_s32(vreinterpretq_s32_u32(low), by), vsubq_s32(vreinterpretq_s32_u32(high), by));
  }
  // low plus high half, rounded to a half
  static float32x4_t sum_of_halves(uint32x4_t pairs) {
    const float32x4_t sum = vaddq_f32(vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(pairs))), vcvt_f32_f16(vreinterpret_f16_u16(vshrn_n_u32(pairs, 16))));
    return vcvt_f32_f16(vcvt_f16_f32(sum));
  }
  V half_sums() const { return {sum_of_halves(low), sum_of_halves(high)}; }
  friend I operator+(const I& a, const I& b) { return {vaddq_u32(a.low, b.low), vaddq_u32(a.high, b.high)}; }
  friend I operator*(const I& a, const I& b) { return {vmulq_u32(a.low, b.low), vmulq_u32(a.high, b.high)}; }
  friend I operator&(const I& a, const I& b) { return {vandq_u32(a.low, b.low), vandq_u32(a.high, b.high)}; }
  friend I operator^(const I& a, const I& b) { return {veorq_u32(a.low, b.low), veorq_u32(a.high, b.high)}; }
};

inline V V::gather(const float* table, const I& index) {
  alignas(16) uint32_t at[8];
  index.store(at);
  alignas(16) const float values[8] = {table[at[0]], table[at[1]], table[at[2]], table[at[3]], table[at[4]], table[at[5]], table[at[6]], table[at[7]]};
  return load(values);
}

// rows of two entries; lanes 0, 2, 4 and 6 of `row` count
inline V V::gather_pairs(const float* table, const I& row) {
  alignas(16) uint32_t at[8];
  row.store(at);
  const auto pair = [&](int i) { return vld1_f32(table + 2 * int64_t(at[i])); };
  return {vcombine_f32(pair(0), pair(2)), vcombine_f32(pair(4), pair(6))};
}

// A lookup by bytes in the 64 of the table.
inline V V::look_up16(const I& index, const float* table) {
  const uint8_t* const from = reinterpret_cast<const uint8_t*>(table);
  const uint8x16x4_t entries = {{vld1q_u8(from), vld1q_u8(from + 16), vld1q_u8(from + 32), vld1q_u8(from + 48)}};
  const I bytes = index * I::set(0x04040404) + I::set(0x03020100);
  return of_bits(vreinterpretq_u32_u8(vqtbl4q_u8(entries, vreinterpretq_u8_u32(bytes.low))), vreinterpretq_u32_u8(vqtbl4q_u8(entries, vreinterpretq_u8_u32(bytes.high))));
}

// A table of sixteen floats, its four bytes apart: one lookup finds a byte of 16 codes.
struct V::Nibbles {
  uint8x16x4_t byte;

  void set(const float* table) { byte = vld4q_u8(reinterpret_cast<const uint8_t*>(table)); }

  // Entries of the 32 codes in 16 bytes, the low half of a byte first.
  void look_up(const uint8_t* from, V (&to)[4]) const {
    const uint8x16_t raw = vld1q_u8(from), even = vandq_u8(raw, vdupq_n_u8(15)), odd = vshrq_n_u8(raw, 4);
    entries(vzip1q_u8(even, odd), to[0], to[1]);
    entries(vzip2q_u8(even, odd), to[2], to[3]);
  }

 private:
  void entries(uint8x16_t codes, V& first, V& second) const {
    const uint8x16_t a = vqtbl1q_u8(byte.val[0], codes), b = vqtbl1q_u8(byte.val[1], codes), c = vqtbl1q_u8(byte.val[2], codes), d = vqtbl1q_u8(byte.val[3], codes);
    const uint16x8_t low = vreinterpretq_u16_u8(vzip1q_u8(a, b)), high = vreinterpretq_u16_u8(vzip1q_u8(c, d));
    const uint16x8_t low_after = vreinterpretq_u16_u8(vzip2q_u8(a, b)), high_after = vreinterpretq_u16_u8(vzip2q_u8(c, d));
    first = of_bits(vreinterpretq_u32_u16(vzip1q_u16(low, high)), vreinterpretq_u32_u16(vzip2q_u16(low, high)));
    second = of_bits(vreinterpretq_u32_u16(vzip1q_u16(low_after, high_after)), vreinterpretq_u32_u16(vzip2q_u16(low_after, high_after)));
  }
};

template <int DTYPE>
inline V V::gather_as(const void* table, const I& index) {
  if (DTYPE == F32) return gather(static_cast<const float*>(table), index);
  alignas(16) uint32_t at[8];
  index.store(at);
  const uint16_t* from = static_cast<const uint16_t*>(table);
  alignas(16) const uint16_t bits[8] = {from[at[0]], from[at[1]], from[at[2]], from[at[3]], from[at[4]], from[at[5]], from[at[6]], from[at[7]]};
  return load_as<DTYPE>(bits, 0);
}

inline V V::flip(const I& signs) const {
  return of_bits(veorq_u32(vreinterpretq_u32_f32(low), signs.low), veorq_u32(vreinterpretq_u32_f32(high), signs.high));
}

}  // namespace
}  // namespace bitgrain
