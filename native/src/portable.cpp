// Plain C++: correct on every machine; the compiler vectorizes what it can.
#include <cstring>

#include "scalar.hpp"

namespace bitgrain {
namespace {

struct V {
  static constexpr int LANES = 16;
  float lane[LANES];

  static V set(float value) {
    V v;
    for (float& f : v.lane) f = value;
    return v;
  }
  static V zero() { return set(0.0f); }
  static V broadcast(const float* from) { return set(*from); }
  static V load(const float* from) {
    V v;
    std::memcpy(v.lane, from, sizeof v.lane);
    return v;
  }
  static V load_half(const uint16_t* from) {
    V v;
    for (int i = 0; i < LANES; ++i) v.lane[i] = half_to_float(from[i]);
    return v;
  }
  static V load_bf16(const uint16_t* from) {
    V v;
    for (int i = 0; i < LANES; ++i) v.lane[i] = bf16_to_float(from[i]);
    return v;
  }
  static V load_int16(const int16_t* from) {
    V v;
    for (int i = 0; i < LANES; ++i) v.lane[i] = float(from[i]);
    return v;
  }
  static V fma(const V& a, const V& b, const V& c) {
    V v;
    for (int i = 0; i < LANES; ++i) v.lane[i] = a.lane[i] * b.lane[i] + c.lane[i];
    return v;
  }
  void store(float* to) const { std::memcpy(to, lane, sizeof lane); }
  friend V operator+(const V& a, const V& b) {
    V v;
    for (int i = 0; i < LANES; ++i) v.lane[i] = a.lane[i] + b.lane[i];
    return v;
  }
  friend V operator-(const V& a, const V& b) {
    V v;
    for (int i = 0; i < LANES; ++i) v.lane[i] = a.lane[i] - b.lane[i];
    return v;
  }
  friend V operator*(const V& a, const V& b) {
    V v;
    for (int i = 0; i < LANES; ++i) v.lane[i] = a.lane[i] * b.lane[i];
    return v;
  }
};

// A decoder that needs nothing of the arguments.
struct Plain {
  explicit Plain(const GroupedArgs&) {}
};

struct Nibble : Plain {
  using Plain::Plain;
  static constexpr int64_t BYTES = 64;
  template <int J>
  V value(const uint8_t* unit, int) const {
    V v;
    for (int i = 0; i < V::LANES; ++i) v.lane[i] = float(int((unit[4 * i + J / 2] >> (4 * (J & 1))) & 15) - 8);
    return v;
  }
};

struct Byte : Plain {
  using Plain::Plain;
  static constexpr int64_t BYTES = 128;
  template <int J>
  V value(const uint8_t* unit, int) const {
    const int8_t* codes = reinterpret_cast<const int8_t*>(unit) + 64 * (J / 4) + J % 4;
    V v;
    for (int i = 0; i < V::LANES; ++i) v.lane[i] = float(codes[4 * i]);
    return v;
  }
};

struct Float4 : Plain {
  using Plain::Plain;
  static constexpr int64_t BYTES = 128;
  template <int J>
  V value(const uint8_t* unit, int) const {
    V v;
    for (int i = 0; i < V::LANES; ++i) {
      const uint16_t code = unit[16 * J + i];
      v.lane[i] = half_to_float(uint16_t((code & 0x80) << 8 | (code & 0x7f) << 7));
    }
    return v;
  }
};

struct Float5 : Plain {
  using Plain::Plain;
  static constexpr int64_t BYTES = 128;
  template <int J>
  V value(const uint8_t* unit, int) const {
    V v;
    for (int i = 0; i < V::LANES; ++i) v.lane[i] = half_to_float(uint16_t(unit[16 * J + i] << 8));
    return v;
  }
};

struct Table {
  static constexpr int64_t BYTES = 64;
  const float* table;
  explicit Table(const GroupedArgs& args) : table(args.table) {}
  template <int J>
  V value(const uint8_t* unit, int) const {
    V v;
    for (int i = 0; i < V::LANES; ++i) v.lane[i] = table[(unit[4 * i + J / 2] >> (4 * (J & 1))) & 15];
    return v;
  }
};

struct DenseBf16 : Plain {
  using Plain::Plain;
  static constexpr int64_t BYTES = 256;
  template <int J>
  V value(const uint8_t* unit, int) const {
    V v;
    for (int i = 0; i < V::LANES; ++i) {
      uint16_t bits;
      std::memcpy(&bits, unit + 64 * (J / 2) + 4 * i + 2 * (J & 1), 2);
      v.lane[i] = bf16_to_float(bits);
    }
    return v;
  }
};

struct DenseHalf : Plain {
  using Plain::Plain;
  static constexpr int64_t BYTES = 256;
  template <int J>
  V value(const uint8_t* unit, int) const {
    V v;
    for (int i = 0; i < V::LANES; ++i) {
      uint16_t bits;
      std::memcpy(&bits, unit + 32 * J + 2 * i, 2);
      v.lane[i] = half_to_float(bits);
    }
    return v;
  }
};

struct DenseFloat : Plain {
  using Plain::Plain;
  static constexpr int64_t BYTES = 512;
  template <int J>
  V value(const uint8_t* unit, int) const {
    return V::load(reinterpret_cast<const float*>(unit + 64 * J));
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

inline void integer_rows(const IntegerArgs& args, int64_t panel, int64_t row, int64_t end) {
  const int8_t* codes = reinterpret_cast<const int8_t*>(args.codes) + panel * args.quads * 64;
  for (; row < end; ++row) {
    const uint8_t* a = args.a + row * args.quads * 4;
    int32_t dots[PANEL] = {};
    for (int64_t q = 0; q < args.quads; ++q)
      for (int64_t c = 0; c < PANEL; ++c)
        for (int64_t j = 0; j < 4; ++j) dots[c] += int32_t(a[4 * q + j]) * int32_t(codes[(q * PANEL + c) * 4 + j]);
    store_integer(args, row, panel * PANEL, dots);
  }
}

void integer(const IntegerArgs& args, int64_t panel, int64_t panel_end, int64_t row, int64_t row_end) {
  for (; panel < panel_end; ++panel) integer_rows(args, panel, row, row_end);
}

}  // namespace

const Kernels& portable_kernels() {
  static const Kernels table = {"portable", grouped_by_kind<Decoders>, nullptr, nullptr, nullptr, integer, widen_range, quantize_rows, false};
  return table;
}

}  // namespace bitgrain
