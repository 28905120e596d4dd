// NEON, as every 64-bit Arm processor has it: eight lanes in two registers, two halves of a panel.
#include "neon_values.hpp"

namespace bitgrain {
namespace {

// A decoder that needs nothing of the arguments.
struct Plain {
  explicit Plain(const GroupedArgs&) {}
};

template <int J>
inline I nibbles(const uint8_t* unit, int half) {
  return I::load_raw(unit + 32 * half).shifted(4 * J) & I::set(15);
}

struct Nibble : Plain {
  using Plain::Plain;
  static constexpr int64_t BYTES = 64;
  template <int J>
  V value(const uint8_t* unit, int half) const {
    return nibbles<J>(unit, half).minus(8);
  }
};

struct Byte : Plain {
  using Plain::Plain;
  static constexpr int64_t BYTES = 128;
  static int32x4_t extended(uint32x4_t lanes, int byte) {
    return vshrq_n_s32(vshlq_s32(vreinterpretq_s32_u32(lanes), vdupq_n_s32(24 - 8 * byte)), 24);
  }
  template <int J>
  V value(const uint8_t* unit, int half) const {
    const I lanes = I::load_raw(unit + 64 * (J / 4) + 32 * half);
    return V::of_signed(extended(lanes.low, J % 4), extended(lanes.high, J % 4));
  }
};

// float8 as the upper part of a half: E5M2 is one, E4M3 is one of another bias (the factor 2^8 stands in the scale)
struct Float4 : Plain {
  using Plain::Plain;
  static constexpr int64_t BYTES = 128;
  template <int J>
  V value(const uint8_t* unit, int half) const {
    const int16x8_t codes = vmovl_s8(vreinterpret_s8_u8(vld1_u8(unit + 16 * J + 8 * half)));
    // the sign extends over the upper bits: one mask keeps sign and magnitude of the half
    return V::widen_half(vandq_u16(vreinterpretq_u16_s16(vshlq_n_s16(codes, 7)), vdupq_n_u16(0xbf80)));
  }
};

struct Float5 : Plain {
  using Plain::Plain;
  static constexpr int64_t BYTES = 128;
  template <int J>
  V value(const uint8_t* unit, int half) const {
    return V::widen_half(vshll_n_u8(vld1_u8(unit + 16 * J + 8 * half), 8));
  }
};

struct Table {
  static constexpr int64_t BYTES = 64;
  const float* table;
  explicit Table(const GroupedArgs& args) : table(args.table) {}
  template <int J>
  V value(const uint8_t* unit, int half) const {
    return V::look_up16(nibbles<J>(unit, half), table);
  }
};

struct DenseBf16 : Plain {
  using Plain::Plain;
  static constexpr int64_t BYTES = 256;
  template <int J>
  V value(const uint8_t* unit, int half) const {
    const I pair = I::load_raw(unit + 64 * (J / 2) + 32 * half), bits = J & 1 ? pair & I::set(0xffff0000) : pair.raised(16);
    return V::of_bits(bits.low, bits.high);
  }
};

struct DenseHalf : Plain {
  using Plain::Plain;
  static constexpr int64_t BYTES = 256;
  template <int J>
  V value(const uint8_t* unit, int half) const {
    return V::load_half(unit + 32 * J + 16 * half);
  }
};

struct DenseFloat : Plain {
  using Plain::Plain;
  static constexpr int64_t BYTES = 512;
  template <int J>
  V value(const uint8_t* unit, int half) const {
    return V::load_float(unit + 64 * J + 32 * half);
  }
};

struct Decoders {
  using Nibble = bitgrain::Nibble;
  using Byte = bitgrain::Byte;
  using Float4 = bitgrain::Float4;
  using Float5 = bitgrain::Float5;
  using Table = bitgrain::Table;
  using DenseBf16 = bitgrain::DenseBf16;
  using DenseHalf = bitgrain::DenseHalf;
  using DenseFloat = bitgrain::DenseFloat;
};

}  // namespace
}  // namespace bitgrain

#include "grouped.hpp"
#include "quantize.hpp"

namespace bitgrain {
namespace {

// Four rows at most share the weights.  Both sides are signed: 128 is taken from the codes of `a`, and 128 times the column sums
// added at the end; products of signed bytes fit in 16 bits, sums of two might not.
template <int ROWS>
inline void integer_tile(const IntegerArgs& args, const uint8_t* codes, int64_t panel, int64_t row) {
  int32_t dots[ROWS][PANEL];
  for (int64_t part = 0; part < 4; ++part) {  // four out features each
    int32x4_t low[ROWS], high[ROWS];          // pairs of in features
    for (int r = 0; r < ROWS; ++r) low[r] = high[r] = vdupq_n_s32(0);
    for (int64_t q = 0; q < args.quads; ++q) {
      const int8x16_t w = vreinterpretq_s8_u8(vld1q_u8(codes + q * 64 + part * 16));
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        uint32_t four;
        __builtin_memcpy(&four, args.a + (row + r) * args.quads * 4 + q * 4, 4);
        const int8x8_t a = vreinterpret_s8_u32(vdup_n_u32(four ^ 0x80808080));
        low[r] = vpadalq_s16(low[r], vmull_s8(vget_low_s8(w), a));
        high[r] = vpadalq_s16(high[r], vmull_s8(vget_high_s8(w), a));
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      const int32x4_t sums = vmulq_n_s32(vld1q_s32(args.column_sums + panel * PANEL + part * 4), 128);
      vst1q_s32(dots[r] + part * 4, vaddq_s32(vpaddq_s32(low[r], high[r]), sums));
    }
  }
  for (int r = 0; r < ROWS; ++r) store_integer(args, row + r, panel * PANEL, dots[r]);
}

inline void integer_rows(const IntegerArgs& args, int64_t panel, int64_t row, int64_t end) {
  const uint8_t* codes = args.codes + panel * args.quads * 64;
  for (; row + 4 <= end; row += 4) integer_tile<4>(args, codes, panel, row);
  for (; row < end; ++row) integer_tile<1>(args, codes, panel, row);
}

void integer(const IntegerArgs& args, int64_t panel, int64_t panel_end, int64_t row, int64_t row_end) {
  for (; panel < panel_end; ++panel) integer_rows(args, panel, row, row_end);
}

}  // namespace

const Kernels& neon_kernels() {
  static const Kernels table = {"neon", grouped_by_kind<Decoders>, nullptr, nullptr, nullptr, integer, widen_range, quantize_rows, false};
  return table;
}

}  // namespace bitgrain
