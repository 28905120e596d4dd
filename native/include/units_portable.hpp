// Eight lanes in plain C++: floats and unsigned numbers of 32 bits.  Internal linkage.
#pragma once
#include <cstring>

#include "scalar.hpp"

namespace bitgrain {
namespace {

#define EACH_LANE for (int i = 0; i < 8; ++i)

struct I;

struct V {
  float lane[8];

  static V set(float value) {
    V v;
    EACH_LANE v.lane[i] = value;
    return v;
  }
  static V zero() { return set(0.0f); }
  static V load(const float* from) {
    V v;
    std::memcpy(v.lane, from, sizeof v.lane);
    return v;
  }
  static V load_any(const void* from, int64_t at, int32_t dtype) {
    V v;
    EACH_LANE v.lane[i] = load_scalar(from, at + i, dtype);
    return v;
  }
  template <int DTYPE>
  static V load_as(const void* from, int64_t at) {
    return load_any(from, at, DTYPE);
  }
  static V fma(const V& a, const V& b, const V& c) {
    V v;
    EACH_LANE v.lane[i] = a.lane[i] * b.lane[i] + c.lane[i];
    return v;
  }
  static V gather(const float* table, const I& index);
  static V gather_pairs(const float* table, const I& row);
  static V look_up16(const I& index, const float* table);
  struct Nibbles;
  template <int DTYPE>
  static V gather_as(const void* table, const I& index);
  V flip(const I& signs) const;
  void store(float* to) const { std::memcpy(to, lane, sizeof lane); }
  float sum() const {
    const float a = lane[0] + lane[4], b = lane[1] + lane[5], c = lane[2] + lane[6], d = lane[3] + lane[7];
    return (a + c) + (b + d);
  }
  static void transpose(V (&a)[8]) {
    for (int r = 0; r < 8; ++r)
      for (int c = 0; c < r; ++c) {
        const float kept = a[r].lane[c];
        a[r].lane[c] = a[c].lane[r];
        a[c].lane[r] = kept;
      }
  }
  void store_any(void* to, int64_t at, int32_t dtype) const { EACH_LANE store_scalar(to, at + i, dtype, lane[i]); }
  // sums and differences of lanes 1, 2 and 4 apart
  V butterflies() const {
    V v = *this;
    for (int width = 1; width < 8; width *= 2) {
      const V old = v;
      EACH_LANE v.lane[i] = i & width ? old.lane[i ^ width] - old.lane[i] : old.lane[i] + old.lane[i ^ width];
    }
    return v;
  }
  friend V operator+(const V& a, const V& b) {
    V v;
    EACH_LANE v.lane[i] = a.lane[i] + b.lane[i];
    return v;
  }
  friend V operator-(const V& a, const V& b) {
    V v;
    EACH_LANE v.lane[i] = a.lane[i] - b.lane[i];
    return v;
  }
  friend V operator*(const V& a, const V& b) {
    V v;
    EACH_LANE v.lane[i] = a.lane[i] * b.lane[i];
    return v;
  }
};

struct I {
  uint32_t lane[8];

  static I set(uint32_t value) {
    I v;
    EACH_LANE v.lane[i] = value;
    return v;
  }
  static I load(const int32_t* from) {
    I v;
    std::memcpy(v.lane, from, sizeof v.lane);
    return v;
  }
  static I load_bytes(const uint8_t* from) {
    I v;
    EACH_LANE v.lane[i] = from[i];
    return v;
  }
  static I load_words(const uint16_t* from) {
    I v;
    EACH_LANE v.lane[i] = from[i];
    return v;
  }
  template <class At>
  static I read(const uint8_t* stream, const At& at) {
    I v;
    EACH_LANE {
      const uint8_t* base = stream + (i < 4 ? at.low : at.high);
      const uint8_t* bytes = at.bytes + 4 * i;
      const uint32_t word = uint32_t(base[bytes[0]]) | uint32_t(base[bytes[1]]) << 8 | uint32_t(base[bytes[2]]) << 16 | uint32_t(base[bytes[3]]) << 24;
      v.lane[i] = word >> at.shift[i];
    }
    return v;
  }
  // four bytes in every lane, shifted
  static I read_word(const uint8_t* from, const I& shifts) {
    I v;
    const uint32_t word = uint32_t(from[0]) | uint32_t(from[1]) << 8 | uint32_t(from[2]) << 16 | uint32_t(from[3]) << 24;
    EACH_LANE v.lane[i] = word >> shifts.lane[i];
    return v;
  }
  I shifted(int bits) const {
    I v;
    EACH_LANE v.lane[i] = lane[i] >> bits;
    return v;
  }
  I raised(int bits) const {
    I v;
    EACH_LANE v.lane[i] = lane[i] << bits;
    return v;
  }
  I where_zero(const I& other) const {
    I v;
    EACH_LANE v.lane[i] = other.lane[i] == 0 ? lane[i] : 0;
    return v;
  }
  I times_high(uint32_t factor) const {
    I v;
    EACH_LANE v.lane[i] = uint32_t(uint64_t(lane[i]) * factor >> 32);
    return v;
  }
  I byte_sums() const {
    I v;
    EACH_LANE v.lane[i] = (lane[i] & 255) + (lane[i] >> 8 & 255) + (lane[i] >> 16 & 255) + (lane[i] >> 24);
    return v;
  }
  V minus(int value) const {
    V v;
    EACH_LANE v.lane[i] = float(int32_t(lane[i]) - value);
    return v;
  }
  V half_sums() const {
    V v;
    EACH_LANE v.lane[i] = half_to_float(float_to_half(half_to_float(uint16_t(lane[i])) + half_to_float(uint16_t(lane[i] >> 16))));
    return v;
  }
  friend I operator+(const I& a, const I& b) {
    I v;
    EACH_LANE v.lane[i] = a.lane[i] + b.lane[i];
    return v;
  }
  friend I operator*(const I& a, const I& b) {
    I v;
    EACH_LANE v.lane[i] = a.lane[i] * b.lane[i];
    return v;
  }
  friend I operator&(const I& a, const I& b) {
    I v;
    EACH_LANE v.lane[i] = a.lane[i] & b.lane[i];
    return v;
  }
  friend I operator^(const I& a, const I& b) {
    I v;
    EACH_LANE v.lane[i] = a.lane[i] ^ b.lane[i];
    return v;
  }
};

inline V V::gather(const float* table, const I& index) {
  V v;
  EACH_LANE v.lane[i] = table[index.lane[i]];
  return v;
}

// rows of two entries; lanes 0, 2, 4 and 6 of `row` count
inline V V::gather_pairs(const float* table, const I& row) {
  V v;
  EACH_LANE v.lane[i] = table[2 * row.lane[i & 6] + (i & 1)];
  return v;
}

struct V::Nibbles {
  float table[16];

  void set(const float* from) { std::memcpy(table, from, sizeof table); }

  // Entries of the 32 codes in 16 bytes, the low half of a byte first.
  void look_up(const uint8_t* from, V (&to)[4]) const {
    for (int i = 0; i < 32; ++i) to[i / 8].lane[i % 8] = table[from[i / 2] >> (4 * (i & 1)) & 15];
  }
};

inline V V::look_up16(const I& index, const float* table) { return gather(table, index); }

template <int DTYPE>
inline V V::gather_as(const void* table, const I& index) {
  V v;
  EACH_LANE v.lane[i] = load_scalar(table, index.lane[i], DTYPE);
  return v;
}

inline V V::flip(const I& signs) const {
  V v;
  EACH_LANE v.lane[i] = bits_to_float(float_to_bits(lane[i]) ^ signs.lane[i]);
  return v;
}

}  // namespace
}  // namespace bitgrain
