// The codes of one panel as pairs of bfloat16, one pair of in features per 32-bit lane.  Every code is exact in
// bfloat16: integers up to 128, float8 numbers.  Internal linkage; needs AVX-512 (F, BW, VBMI).
#pragma once
#include "avx512_values.hpp"

namespace bitgrain {
namespace {

constexpr int64_t PAIR_BYTES = 64;  // one pair of in features of one panel

// Pairs<Decoder>, made of the arguments, writes the four pairs of one unit with store(unit, to).
template <class Decoder>
struct Pairs;

struct NibblePairs {
  __m512i table;

  // A lookup of 16-bit lanes reads five index bits; the table repeats itself, so the fifth may be anything.
  template <int P>
  __m512i value(__m512i codes) const {
    const __m512i even = _mm512_srli_epi32(codes, 8 * P);
    const __m512i odd = P < 2 ? _mm512_slli_epi32(codes, 12 - 8 * (P & 1)) : _mm512_srli_epi32(codes, P == 2 ? 4 : 12);
    return _mm512_permutexvar_epi16(_mm512_mask_blend_epi16(0xaaaaaaaa, even, odd), table);
  }

  void store(const uint8_t* unit, uint8_t* to) const {
    const __m512i codes = load64(unit);
    _mm512_storeu_si512(to, value<0>(codes));
    _mm512_storeu_si512(to + 64, value<1>(codes));
    _mm512_storeu_si512(to + 128, value<2>(codes));
    _mm512_storeu_si512(to + 192, value<3>(codes));
  }
};

template <>
struct Pairs<Nibble> : NibblePairs {
  explicit Pairs(const GroupedArgs&) {
    alignas(64) static constexpr uint16_t TABLE[32] = {
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
    table = _mm512_load_si512(TABLE);
  }
};

// Only for tables that are exact in bfloat16: their upper halves are the table.
template <>
struct Pairs<Table> : NibblePairs {
  explicit Pairs(const GroupedArgs& args) {
    const __m512i upper = _mm512_srli_epi32(_mm512_loadu_si512(args.table), 16);
    const __m256i halves = _mm512_cvtepi32_epi16(upper);
    table = _mm512_inserti64x4(_mm512_castsi256_si512(halves), halves, 1);
  }
};

template <>
struct Pairs<DenseBf16> : Plain {
  using Plain::Plain;
  void store(const uint8_t* unit, uint8_t* to) const {
    for (int i = 0; i < 4; ++i) _mm512_storeu_si512(to + 64 * i, load64(unit + 64 * i));
  }
};

// bfloat16 of the 128 magnitudes of a byte, its two halves apart.
struct alignas(64) Magnitudes {
  uint8_t low[128] = {}, high[128] = {};

  constexpr void set(int code, uint32_t bits) {
    low[code] = uint8_t(bits);
    high[code] = uint8_t(bits >> 8);
  }
};

// Bits of mantissa * 2^exponent, for a mantissa below 256.
constexpr uint32_t bf16_bits(uint32_t mantissa, int exponent) {
  if (mantissa == 0) return 0;
  int top = 0;
  while ((mantissa >> (top + 1)) != 0) ++top;
  return uint32_t(exponent + top + 127) << 7 | ((mantissa << (7 - top)) & 0x7f);
}

constexpr Magnitudes integer_magnitudes() {
  Magnitudes table;
  for (int code = 0; code < 128; ++code) table.set(code, bf16_bits(uint32_t(code), 0));
  return table;
}

constexpr Magnitudes float_magnitudes(int mantissa_bits, int bias) {
  Magnitudes table;
  for (int code = 0; code < 128; ++code) {
    const int exponent = code >> mantissa_bits, mantissa = code & ((1 << mantissa_bits) - 1), hidden = exponent > 0 ? 1 << mantissa_bits : 0;
    table.set(code, bf16_bits(uint32_t(hidden | mantissa), (exponent > 0 ? exponent : 1) - bias - mantissa_bits));
  }
  if (mantissa_bits == 2) {  // E5M2 has infinities and NaNs
    for (int code = 0x7c; code < 128; ++code) table.set(code, 0x7f80 | uint32_t(code & 3) << 5);
  }
  return table;
}

constexpr Magnitudes INTEGERS = integer_magnitudes();
constexpr Magnitudes E4M3_PARTS = float_magnitudes(3, 7 + 8);  // value / 256, see kernels.hpp
constexpr Magnitudes E5M2_PARTS = float_magnitudes(2, 15);

// Where the four bytes of each lane of a pair come from: 0-63 low halves, 64-127 high halves.
struct alignas(64) Places {
  uint8_t at[2][64] = {};
};

// Lane n of pair p: codes first * p + across * n and that plus second.
constexpr Places make_places(int first, int second, int across) {
  Places places;
  for (int pair = 0; pair < 2; ++pair) {
    for (int lane = 0; lane < 16; ++lane) {
      const int even = first * pair + across * lane, odd = even + second;
      const int bytes[4] = {even, 64 + even, odd, 64 + odd};
      for (int i = 0; i < 4; ++i) places.at[pair][4 * lane + i] = uint8_t(bytes[i]);
    }
  }
  return places;
}

constexpr Places LANES_OF_FOUR = make_places(2, 1, 4);    // BYTE: a lane holds four in features
constexpr Places ROWS_OF_LANES = make_places(32, 16, 1);  // E4M3, E5M2: a row holds one in feature of all lanes

// 64 codes, four in features, as two pairs.
inline void store_two_pairs(__m512i codes, __m512i signs, __m512i low, __m512i high, const Places& places, uint8_t* to) {
  high = _mm512_ternarylogic_epi32(codes, signs, high, 0xea);  // (codes & signs) | high
  _mm512_storeu_si512(to, _mm512_permutex2var_epi8(low, _mm512_load_si512(places.at[0]), high));
  _mm512_storeu_si512(to + 64, _mm512_permutex2var_epi8(low, _mm512_load_si512(places.at[1]), high));
}

inline __m512i look_up(const uint8_t (&table)[128], __m512i codes) {  // reads seven bits of each code
  return _mm512_permutex2var_epi8(_mm512_load_si512(table), codes, _mm512_load_si512(table + 64));
}

template <>
struct Pairs<Byte> : Plain {
  using Plain::Plain;
  void store(const uint8_t* unit, uint8_t* to) const {
    const __m512i top = _mm512_set1_epi8(char(0x80));
    for (int i = 0; i < 2; ++i) {
      const __m512i codes = load64(unit + 64 * i), magnitude = _mm512_abs_epi8(codes);
      // -128 has no magnitude of seven bits: its high half is put in by hand, its low half is zero like that of 0
      const __m512i high = _mm512_mask_blend_epi8(_mm512_cmpeq_epi8_mask(codes, top), look_up(INTEGERS.high, magnitude), _mm512_set1_epi8(0x43));
      store_two_pairs(codes, top, look_up(INTEGERS.low, magnitude), high, LANES_OF_FOUR, to + 128 * i);
    }
  }
};

struct FloatPairs : Plain {
  using Plain::Plain;
  static void store_with(const Magnitudes& table, const uint8_t* unit, uint8_t* to) {
    for (int i = 0; i < 2; ++i) {
      const __m512i codes = load64(unit + 64 * i);
      store_two_pairs(codes, _mm512_set1_epi8(char(0x80)), look_up(table.low, codes), look_up(table.high, codes), ROWS_OF_LANES, to + 128 * i);
    }
  }
};

template <>
struct Pairs<Float4> : FloatPairs {
  using FloatPairs::FloatPairs;
  void store(const uint8_t* unit, uint8_t* to) const { store_with(E4M3_PARTS, unit, to); }
};

template <>
struct Pairs<Float5> : FloatPairs {
  using FloatPairs::FloatPairs;
  void store(const uint8_t* unit, uint8_t* to) const { store_with(E5M2_PARTS, unit, to); }
};

// Decodes steps [first, last) of one panel: [step][16 pairs][16 out features][2]; pairs beyond the last unit are zero.
template <class Decoder>
inline void decode_steps(const GroupedArgs& args, int64_t panel, int64_t first, int64_t last, uint8_t* to) {
  const int64_t end = last * STEP / UNIT, units = end < args.units ? end : args.units;
  const uint8_t* from = args.codes + panel * args.units * Decoder::BYTES;
  int64_t unit = first * STEP / UNIT;
  const Pairs<Decoder> pairs(args);
  // the next block of this panel, which is read after others have been decoded and multiplied
  const int64_t ahead = (end - unit) * Decoder::BYTES;
  for (; unit < units; ++unit, to += 4 * PAIR_BYTES) {
    const uint8_t* at = from + unit * Decoder::BYTES;
    for (int64_t line = 0; line < Decoder::BYTES; line += 64) _mm_prefetch(reinterpret_cast<const char*>(at + ahead + line), _MM_HINT_T0);
    pairs.store(at, to);
  }
  for (; unit < end; ++unit, to += 4 * PAIR_BYTES) {
    for (int i = 0; i < 4; ++i) _mm512_storeu_si512(to + i * PAIR_BYTES, _mm512_setzero_si512());
  }
}

}  // namespace
}  // namespace bitgrain
