// Unsigned codes of one vector of a unit (see block_kernels.hpp) out of their planes, over `Bytes` of the including file:
// load(from), masked(byte), up<n>(), down<n>() (shifts of 16-bit lanes, masked afterwards), operator |, and a lookup of nibbles.
// `vector` is a constant once the callers' loops are unrolled.  LIMIT: how many products of a pair of codes with signed bytes fit a
// signed 16-bit number: floor(32767 / (2 * 128 * largest code)), a power of two up to 8; WIDE: not one, codes have eight bits.
// Internal linkage.
#pragma once
#include "block_kernels.hpp"

namespace bitgrain {
namespace {

// The field of `bits` bits at `vector` of a plane, moved to bit `target`.
inline Bytes plane_field(const uint8_t* plane, int half, int vector, int bits, int target) {
  const int held = 8 / bits, at = vector % held * bits, mask = ((1 << bits) - 1) << target;
  const Bytes raw = Bytes::load(plane + 64 * (vector / held) + half * Bytes::SIZE);
  return at >= target ? raw.down(at - target).masked(mask) : raw.up(target - at).masked(mask);
}

struct Code1 {
  static constexpr int64_t BYTES = 64;
  static constexpr int LIMIT = 8;
  static constexpr bool WIDE = false;
  static Bytes value(const uint8_t* unit, int half, int vector) { return plane_field(unit, half, vector, 1, 1); }
};

struct Code2 {
  static constexpr int64_t BYTES = 128;
  static constexpr int LIMIT = 8;
  static constexpr bool WIDE = false;
  static Bytes value(const uint8_t* unit, int half, int vector) { return plane_field(unit, half, vector, 2, 0); }
};

struct Code3 {
  static constexpr int64_t BYTES = 192;
  static constexpr int LIMIT = 8;
  static constexpr bool WIDE = false;
  static Bytes value(const uint8_t* unit, int half, int vector) {
    return plane_field(unit, half, vector, 2, 0) | plane_field(unit + 128, half, vector, 1, 2);
  }
};

struct Code4 {
  static constexpr int64_t BYTES = 256;
  static constexpr int LIMIT = 8;
  static constexpr bool WIDE = false;
  static Bytes value(const uint8_t* unit, int half, int vector) { return plane_field(unit, half, vector, 4, 0); }
};

struct Code5 {
  static constexpr int64_t BYTES = 320;
  static constexpr int LIMIT = 4;
  static constexpr bool WIDE = false;
  static Bytes value(const uint8_t* unit, int half, int vector) {
    return plane_field(unit, half, vector, 4, 0) | plane_field(unit + 256, half, vector, 1, 4);
  }
};

struct Code6 {
  static constexpr int64_t BYTES = 384;
  static constexpr int LIMIT = 2;
  static constexpr bool WIDE = false;
  static Bytes value(const uint8_t* unit, int half, int vector) {
    return plane_field(unit, half, vector, 4, 0) | plane_field(unit + 256, half, vector, 2, 4);
  }
};

struct Code8 {
  static constexpr int64_t BYTES = 512;
  static constexpr int LIMIT = 0;
  static constexpr bool WIDE = true;
  static Bytes value(const uint8_t* unit, int half, int vector) { return Bytes::load(unit + 64 * vector + half * Bytes::SIZE); }
};

// -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113, plus 128
alignas(64) constexpr uint8_t LEVEL_TABLE[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
// 0 0.5 1 1.5 2 3 4 6 and their negatives, doubled, plus 12
alignas(64) constexpr uint8_t FLOAT_TABLE[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

struct Levels4 {
  static constexpr int64_t BYTES = 256;
  static constexpr int LIMIT = 0;
  static constexpr bool WIDE = true;
  static Bytes value(const uint8_t* unit, int half, int vector) { return Code4::value(unit, half, vector).looked_up(LEVEL_TABLE); }
};

struct Float4Code {
  static constexpr int64_t BYTES = 256;
  static constexpr int LIMIT = 4;
  static constexpr bool WIDE = false;
  static Bytes value(const uint8_t* unit, int half, int vector) { return Code4::value(unit, half, vector).looked_up(FLOAT_TABLE); }
};

// Codes that are decoded already, LIMIT and WIDE those of `From`: types of the same numbers are one.
template <int LIMIT_OF, bool WIDE_OF>
struct DecodedCode {
  static constexpr int64_t BYTES = 512;
  static constexpr int LIMIT = LIMIT_OF;
  static constexpr bool WIDE = WIDE_OF;
  static Bytes value(const uint8_t* unit, int half, int vector) { return Code8::value(unit, half, vector); }
};
template <class Code>
using Decoded = DecodedCode<Code::LIMIT, Code::WIDE>;

}  // namespace
}  // namespace bitgrain

#include "block_panels.hpp"

namespace bitgrain {
namespace {

inline void panels_by_code(const BlockWeight& weight, const void* input, int64_t rows, int64_t first, int64_t last, const void* bias, void* y,
                           int32_t y_dtype, int64_t y_stride) {
  switch (weight.format.code) {
    case CODE_1: return run_code<Code1>(weight, input, rows, first, last, bias, y, y_dtype, y_stride);
    case CODE_2: return run_code<Code2>(weight, input, rows, first, last, bias, y, y_dtype, y_stride);
    case CODE_3: return run_code<Code3>(weight, input, rows, first, last, bias, y, y_dtype, y_stride);
    case CODE_4: return run_code<Code4>(weight, input, rows, first, last, bias, y, y_dtype, y_stride);
    case CODE_5: return run_code<Code5>(weight, input, rows, first, last, bias, y, y_dtype, y_stride);
    case CODE_6: return run_code<Code6>(weight, input, rows, first, last, bias, y, y_dtype, y_stride);
    case CODE_8: return run_code<Code8>(weight, input, rows, first, last, bias, y, y_dtype, y_stride);
    case LEVELS_4: return run_code<Levels4>(weight, input, rows, first, last, bias, y, y_dtype, y_stride);
    default: return run_code<Float4Code>(weight, input, rows, first, last, bias, y, y_dtype, y_stride);
  }
}

}  // namespace
}  // namespace bitgrain
