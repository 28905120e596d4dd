// Four-bit codes times x in fixed point, in bytes: three signed bytes per in feature stand for 23 bits below the largest value
// of a chunk, so the sums lose less than float32 sums do; SplitRows in kernels.hpp.  Needs NEON's dot products; signed codes need
// no corrections.  Bits are those of AVX2.  Internal linkage.
#pragma once
#include "fixed_rows.hpp"
#include "grouped.hpp"

namespace bitgrain {
namespace {

struct NibbleCodes {
  explicit NibbleCodes(const GroupedArgs&) {}
  int8x16_t look_up(uint8x16_t nibbles) const { return vsubq_s8(vreinterpretq_s8_u8(nibbles), vdupq_n_s8(8)); }
  static float step(const GroupedArgs&) { return 1.0f; }
};

struct TableCodes {
  int8x16_t table;
  explicit TableCodes(const GroupedArgs& args) : table(vld1q_s8(args.whole_table)) {}
  int8x16_t look_up(uint8x16_t nibbles) const { return vqtbl1q_s8(table, nibbles); }
  static float step(const GroupedArgs& args) { return args.whole_step; }
};

struct Sums {
  int32x4_t low[3], high[3];  // lowest, middle and top bytes
};

// Even in features of a unit stand in the low nibbles, odd ones in the high nibbles.
template <class Codes>
inline void decode_unit(const Codes& decoder, const uint8_t* codes, int8x16_t& even, int8x16_t& odd) {
  const uint8x16_t raw = vld1q_u8(codes);
  even = decoder.look_up(vandq_u8(raw, vdupq_n_u8(15)));
  odd = decoder.look_up(vshrq_n_u8(raw, 4));
}

inline void add_products(Sums& sum, const int8x16_t (&even)[2], const int8x16_t (&odd)[2], const uint8_t* x) {
  const int8x16_t first = vreinterpretq_s8_u8(vld1q_u8(x));
  const int8x8_t rest = vreinterpret_s8_u8(vld1_u8(x + 16));
  sum.low[0] = vdotq_laneq_s32(vdotq_laneq_s32(sum.low[0], even[0], first, 0), odd[0], first, 3);
  sum.low[1] = vdotq_lane_s32(vdotq_laneq_s32(sum.low[1], even[0], first, 1), odd[0], rest, 0);
  sum.low[2] = vdotq_lane_s32(vdotq_laneq_s32(sum.low[2], even[0], first, 2), odd[0], rest, 1);
  sum.high[0] = vdotq_laneq_s32(vdotq_laneq_s32(sum.high[0], even[1], first, 0), odd[1], first, 3);
  sum.high[1] = vdotq_lane_s32(vdotq_laneq_s32(sum.high[1], even[1], first, 1), odd[1], rest, 0);
  sum.high[2] = vdotq_lane_s32(vdotq_laneq_s32(sum.high[2], even[1], first, 2), odd[1], rest, 1);
}

inline float32x4_t joined(const int32x4_t (&sums)[3]) {
  const float32x4_t high = vcvtq_f32_s32(vaddq_s32(vshlq_n_s32(sums[2], 8), sums[1]));
  return vfmaq_f32(vcvtq_f32_s32(sums[0]), high, vdupq_n_f32(256.0f));
}

template <class Codes, int ROWS>
inline void fixed_tile(const GroupedArgs& args, int64_t panel, int half, int64_t row) {
  const SplitRows& split = *args.split;
  const Codes decoder(args);
  const float step = Codes::step(args);
  const uint8_t *codes = args.codes + panel * args.units * 64 + 32 * half, *x[ROWS];
  const Chunk* chunk[ROWS];
  const float* x_sums[ROWS];
  V total[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    const int64_t from = args.x_rows ? args.x_rows[row + r] : row + r;
    x[r] = split.bytes + from * split.row_bytes;
    chunk[r] = split.chunks + from * split.chunk_count;
    x_sums[r] = args.x_sums + from * args.groups;
    total[r] = V::zero();
  }
  const bool sums = args.x_sums != nullptr;
  const int64_t first = panel * PANEL + half * V::LANES;
  int64_t unit = 0;
  for (int64_t g = 0; g < args.groups; ++g) {
    V dot[ROWS];
    for (int r = 0; r < ROWS; ++r) dot[r] = V::zero();
    while (unit < args.group_ends[g]) {
      const int64_t left = args.group_ends[g] - unit, end = unit + (left < CHUNK_UNITS ? left : CHUNK_UNITS);
      Sums sum[ROWS] = {};
      for (; unit < end; ++unit) {
        int8x16_t even[2], odd[2];
        decode_unit(decoder, codes + unit * 64, even[0], odd[0]);
        decode_unit(decoder, codes + unit * 64 + 16, even[1], odd[1]);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
          add_products(sum[r], even, odd, x[r]);
          x[r] += SPLIT_BYTES;
        }
      }
      for (int r = 0; r < ROWS; ++r) {
        const V power = V::set(chunk[r]->step * step);
        dot[r] = V::fma({joined(sum[r].low), joined(sum[r].high)}, power, dot[r]);
        ++chunk[r];
      }
    }
    const int64_t at = (panel * args.groups + g) * PANEL + half * V::LANES;
    const V scale = load_scale(args, at, first), zero = sums ? load_zero(args, at) : V::zero();
    for (int r = 0; r < ROWS; ++r) total[r] = V::fma(scale, sums ? dot[r] - zero * V::set(x_sums[r][g]) : dot[r], total[r]);
  }
  const int64_t left = args.n - first, count = left < V::LANES ? left : V::LANES;
  for (int r = 0; r < ROWS; ++r) {
    float values[V::LANES];
    total[r].store(values);
    if (count > 0) store_outputs(args, row + r, first, values, count);
  }
}

template <class Codes>
inline void fixed_panels(const GroupedArgs& args, int64_t panel, int64_t panel_end, int64_t row, int64_t row_end) {
  for (; panel < panel_end; ++panel) {
    for (int half = 0; half < HALVES; ++half) {
      int64_t at = row;
      for (; at + 3 <= row_end; at += 3) fixed_tile<Codes, 3>(args, panel, half, at);
      for (; at < row_end; ++at) fixed_tile<Codes, 1>(args, panel, half, at);
    }
  }
}

inline void fixed_by_kind(const GroupedArgs& args, int64_t panel, int64_t panel_end, int64_t row, int64_t row_end) {
  if (args.code_kind == NIBBLE) return fixed_panels<NibbleCodes>(args, panel, panel_end, row, row_end);
  fixed_panels<TableCodes>(args, panel, panel_end, row, row_end);
}

// Bits of the largest magnitude of whole units; those of an infinity or a NaN are 0x7f800000 or more.
inline uint32_t largest_bits(const float* x, int64_t units) {
  uint32x4_t top = vdupq_n_u32(0);
  for (int64_t i = 0; i < units * UNIT; i += 4) top = vmaxq_u32(top, vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x + i)), vdupq_n_u32(0x7fffffff)));
  return vmaxvq_u32(top);
}

struct Parts {
  int32x4_t upper, lower;  // 256 * upper + lower, the lower part from -128 to 127
  uint32x4_t bytes;        // lowest, middle, top
};

inline Parts split_numbers(float32x4_t x, float32x4_t factor) {
  const int32x4_t number = vcvtnq_s32_f32(vmulq_f32(x, factor)), half = vdupq_n_s32(128);
  const int32x4_t middle = vshrq_n_s32(vaddq_s32(number, half), 8), top = vshrq_n_s32(vaddq_s32(middle, half), 8);
  const uint32x4_t low = vdupq_n_u32(255), number_bits = vreinterpretq_u32_s32(number), middle_bits = vreinterpretq_u32_s32(middle);
  const uint32x4_t two = vorrq_u32(vandq_u32(number_bits, low), vshlq_n_u32(vandq_u32(middle_bits, low), 8));
  const uint32x4_t bytes = vorrq_u32(two, vshlq_n_u32(vandq_u32(vreinterpretq_u32_s32(top), low), 16));
  return {middle, vsubq_s32(number, vshlq_n_s32(middle, 8)), bytes};
}

// One chunk, whose largest magnitude has the biased exponent `exponent`.
inline void split_chunk(const float* x, int64_t units, uint32_t exponent, uint8_t* to, Chunk& chunk) {
  const float32x4_t factor = vdupq_n_f32(bits_to_float((275 - exponent) << 23));  // 2^22 over the next power of two
  // bytes 0, 1 and 2 of the even numbers, then those of the odd ones
  alignas(16) static constexpr uint8_t ORDER[24] = {0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30};
  const uint8x16_t first_order = vld1q_u8(ORDER);
  const uint8x8_t rest_order = vld1_u8(ORDER + 16);
  int32x4_t upper = vdupq_n_s32(0), lower = upper;
  for (int64_t i = 0; i < units; ++i, to += SPLIT_BYTES) {
    const Parts a = split_numbers(vld1q_f32(x + i * UNIT), factor), b = split_numbers(vld1q_f32(x + i * UNIT + 4), factor);
    upper = vaddq_s32(upper, vaddq_s32(a.upper, b.upper));
    lower = vaddq_s32(lower, vaddq_s32(a.lower, b.lower));
    const uint8x16x2_t bytes = {{vreinterpretq_u8_u32(a.bytes), vreinterpretq_u8_u32(b.bytes)}};
    vst1q_u8(to, vqtbl2q_u8(bytes, first_order));
    vst1_u8(to + 16, vqtbl2_u8(bytes, rest_order));
  }
  chunk = {bits_to_float((exponent - 21) << 23), -vaddvq_s32(upper), -vaddvq_s32(lower)};
}

}  // namespace
}  // namespace bitgrain
