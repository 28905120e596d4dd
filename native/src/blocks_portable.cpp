// Blocks in plain C++: correct on every machine.
#include <cstring>

#include "block_layout.hpp"
#include "scalar.hpp"
#include "unrolled.hpp"

namespace bitgrain {
namespace {

struct V {
  static constexpr int LANES = 16;
  float lane[LANES];

  template <class Make>
  static V made(Make make) {
    V v;
    for (int i = 0; i < LANES; ++i) v.lane[i] = make(i);
    return v;
  }
  static V zero() { return set(0.0f); }
  static V set(float value) {
    return made([&](int) { return value; });
  }
  static V load(const float* from) {
    return made([&](int i) { return from[i]; });
  }
  static V load_float(const uint8_t* from) {
    V v;
    std::memcpy(v.lane, from, sizeof v.lane);
    return v;
  }
  static V load_half(const uint8_t* from) {
    return made([&](int i) { return half_to_float(uint16_t(from[2 * i] | from[2 * i + 1] << 8)); });
  }
  static V load_bf16(const uint8_t* from) {
    return made([&](int i) { return bf16_to_float(uint16_t(from[2 * i] | from[2 * i + 1] << 8)); });
  }
  static V load_bytes(const uint8_t* from) {
    return made([&](int i) { return float(from[i]); });
  }
  static V load_signed(const uint8_t* from) {
    return made([&](int i) { return float(int8_t(from[i])); });
  }
  static V load_nibbles(const uint8_t* from, bool high) {
    return made([&](int i) { return float(high ? from[i] >> 4 : from[i] & 15); });
  }
  static V load_exponents(const uint8_t* from) {  // 2^(byte - 127); the byte 0 is a subnormal number
    return made([&](int i) { return bits_to_float(from[i] ? uint32_t(from[i]) << 23 : 0x00400000u); });
  }
  static V load_e4m3(const uint8_t* from) {  // a half of another bias
    return made([&](int i) { return half_to_float(uint16_t(from[i] << 7)) * 256.0f; });
  }
  static V fma(const V& a, const V& b, const V& c) {
    return made([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  void store(float* to) const { std::memcpy(to, lane, sizeof lane); }
  friend V operator*(const V& a, const V& b) {
    return made([&](int i) { return a.lane[i] * b.lane[i]; });
  }
};

struct Bytes {
  static constexpr int SIZE = 64;
  uint8_t lane[SIZE];

  static Bytes load(const uint8_t* from) {
    Bytes b;
    std::memcpy(b.lane, from, SIZE);
    return b;
  }
  void store(uint8_t* to) const { std::memcpy(to, lane, SIZE); }
  template <class Change>
  Bytes changed(Change change) const {
    Bytes b;
    for (int i = 0; i < SIZE; ++i) b.lane[i] = uint8_t(change(lane[i]));
    return b;
  }
  Bytes masked(int byte) const {
    return changed([&](int v) { return v & byte; });
  }
  Bytes up(int bits) const {
    return changed([&](int v) { return v << bits; });
  }
  Bytes down(int bits) const {
    return changed([&](int v) { return v >> bits; });
  }
  Bytes looked_up(const uint8_t (&table)[16]) const {
    return changed([&](int v) { return table[v & 15]; });
  }
  friend Bytes operator|(const Bytes& a, const Bytes& b) {
    Bytes c;
    for (int i = 0; i < SIZE; ++i) c.lane[i] = a.lane[i] | b.lane[i];
    return c;
  }
};

inline void widen(const uint8_t* from, int32_t dtype, float* to) {
  for (int i = 0; i < 32; ++i) {
    if (dtype == F32) {
      std::memcpy(to + i, from + 4 * i, 4);
    } else {
      const uint16_t raw = uint16_t(from[2 * i] | from[2 * i + 1] << 8);
      to[i] = dtype == F16 ? half_to_float(raw) : bf16_to_float(raw);
    }
  }
}

// The lowest digit first, so that each is what the lower ones leave.
inline void split_bytes(const int32_t (&values)[BLOCK_UNIT], UnitInput& to) {
  for (int64_t i = 0; i < BLOCK_UNIT; ++i) {
    int32_t value = values[i];
    for (int digit = DIGITS - 1; digit >= 0; --digit) {
      const int32_t low = int8_t(value);
      to.bytes[digit][i] = int8_t(low);
      value = (value - low) >> 8;
    }
  }
}

// sums[part][digit] over 16 in features each
inline void sum_bytes(const UnitInput& x, int32_t (&sums)[2][DIGITS]) {
  for (int part = 0; part < 2; ++part) {
    for (int digit = 0; digit < DIGITS; ++digit) {
      sums[part][digit] = 0;
      for (int64_t i = 0; i < BLOCK_UNIT / 2; ++i) sums[part][digit] += x.bytes[digit][part * BLOCK_UNIT / 2 + i];
    }
  }
}

constexpr bool takes_words(const BlockFormat&) { return false; }

constexpr int parts_of(const BlockFormat& format) { return format.group == 16 ? 2 : 1; }

constexpr int HALVES = 1;

template <class Code>
constexpr int MOST_DIGITS = 4;

template <class Code, int COUNT>
constexpr int DIGIT_ROWS = 1;

template <class Code, int COUNT, int PART, int DIGITS_USED, int ROWS>
inline void dots(const uint8_t* unit, const UnitInput* x, V (&to)[ROWS][HALVES]) {
  Bytes codes[COUNT];
  for (int v = 0; v < COUNT; ++v) codes[v] = Code::value(unit, 0, PART * COUNT + v);
  for (int row = 0; row < ROWS; ++row) {
    for (int digit = DIGITS_USED - 1; digit >= 0; --digit) {
      const int8_t* digits = x[row].bytes[digit] + 4 * COUNT * PART;
      int32_t sum[PANEL];
      for (int32_t& s : sum) s = x[row].correction[PART][digit];
      for (int v = 0; v < COUNT; ++v)
        for (int i = 0; i < Bytes::SIZE; ++i) sum[i / 4] += int32_t(codes[v].lane[i]) * digits[4 * v + i % 4];
      const V dot = V::made([&](int i) { return float(sum[i]); });
      to[row][0] = digit + 1 == DIGITS_USED ? dot : V::fma(to[row][0], V::set(1.0f / 256), dot);
    }
  }
}

}  // namespace
}  // namespace bitgrain

#include "block_codes.hpp"

namespace bitgrain {

const BlockKernels& portable_blocks() {
  static const BlockKernels table = {"portable", prepare_rows, panels_by_code};
  return table;
}

}  // namespace bitgrain
