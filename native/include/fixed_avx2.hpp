// Four-bit codes times x in fixed point, in bytes: three signed bytes per in feature stand for 23 bits below the largest value
// of a chunk, so the sums lose less than float32 sums do.  Needs AVX2; V and load_scale stand in grouped.hpp.
#pragma once
#include "fixed_rows.hpp"
#include "grouped.hpp"

namespace bitgrain {
namespace {

// Unsigned codes of one half of a unit, in features 0, 2, 4, 6 and 1, 3, 5, 7 of each lane; the number is code - 2^OFFSET.  So many
// units fit into 16-bit sums: 4 products, each up to 2 * largest code * 128.
struct NibbleCodes {
  static constexpr int OFFSET = 3, UNITS = 4;
  explicit NibbleCodes(const GroupedArgs&) {}
  __m256i look_up(__m256i nibbles) const { return nibbles; }
  static float step(const GroupedArgs&) { return 1.0f; }
};

struct TableCodes {
  static constexpr int OFFSET = 4, UNITS = 2;
  __m256i table;
  explicit TableCodes(const GroupedArgs& args) {
    const __m128i numbers = _mm_loadu_si128(reinterpret_cast<const __m128i*>(args.whole_table));
    table = _mm256_broadcastsi128_si256(_mm_add_epi8(numbers, _mm_set1_epi8(1 << OFFSET)));
  }
  __m256i look_up(__m256i nibbles) const { return _mm256_shuffle_epi8(table, nibbles); }
  static float step(const GroupedArgs& args) { return args.whole_step; }
};

// Whole numbers of one chunk, in 32 bits: 256 * upper + lower.
struct Wide {
  __m256i upper, lower;
};

// sum += codes * four bytes of x, in place: a compiler that may choose moves all products ahead of the sums, and runs out of registers.
inline __attribute__((always_inline)) void add_products(__m256i& sum, __m256i codes, const uint8_t* four, bool first) {
  const uint8_t(&bytes)[4] = *reinterpret_cast<const uint8_t(*)[4]>(four);
  if (first) {
    asm("vpbroadcastd %1, %0\n\tvpmaddubsw %0, %2, %0" : "=&x"(sum) : "m"(bytes), "x"(codes));
  } else {
    __m256i product;
    asm("vpbroadcastd %2, %1\n\tvpmaddubsw %1, %3, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(product) : "m"(bytes), "x"(codes));
  }
}

// The same for both halves of a unit.
inline __attribute__((always_inline)) void add_both(__m256i& sum, __m256i& other, __m256i codes, __m256i other_codes, const uint8_t* four, bool first) {
  const uint8_t(&bytes)[4] = *reinterpret_cast<const uint8_t(*)[4]>(four);
  __m256i spread;
  if (first) {
    asm("vpbroadcastd %2, %1\n\tvpmaddubsw %1, %3, %0\n\tvpmaddubsw %1, %4, %1" : "=&x"(sum), "=&x"(other) : "m"(bytes), "x"(codes), "x"(other_codes));
  } else {
    __m256i product;
    asm("vpbroadcastd %4, %2\n\tvpmaddubsw %2, %5, %3\n\tvpaddw %3, %0, %0\n\tvpmaddubsw %2, %6, %2\n\tvpaddw %2, %1, %1"
        : "+x"(sum), "+x"(other), "=&x"(spread), "=&x"(product)
        : "m"(bytes), "x"(codes), "x"(other_codes));
  }
}

// Adds UNITS units of ROWS rows, summed in 16 bits, to `wide`; x at + `at`.
template <class Codes, int UNITS, int ROWS, int SIDES>
inline __attribute__((always_inline)) void add_units(const Codes& decoder, const uint8_t* codes, const uint8_t* const (&x)[ROWS], int64_t at, Wide (&wide)[ROWS][SIDES]) {
  const __m256i low = _mm256_set1_epi8(15);
  __m256i sum[ROWS][SIDES][3];
  const uint8_t* from[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    from[r] = x[r] + at;
    asm("" : "+r"(from[r]));  // one register per row: offsets stay constants
  }
#pragma GCC unroll 4
  for (int unit = 0; unit < UNITS; ++unit) {
    __m256i even[SIDES], odd[SIDES];
#pragma GCC unroll 2
    for (int side = 0; side < SIDES; ++side) {
      const __m256i raw = load32(codes + unit * 64 + 32 * side);
      even[side] = decoder.look_up(_mm256_and_si256(raw, low));
      odd[side] = decoder.look_up(_mm256_and_si256(_mm256_srli_epi16(raw, 4), low));
#pragma GCC unroll 4
      for (int r = 0; r < ROWS && ROWS * SIDES != 2; ++r) {
        const uint8_t* digits = from[r] + unit * SPLIT_BYTES;
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) {
          add_products(sum[r][side][i], even[side], digits + 4 * i, unit == 0);
          add_products(sum[r][side][i], odd[side], digits + 12 + 4 * i, false);
        }
      }
    }
    if constexpr (ROWS == 1 && SIDES == 2) {
      const uint8_t* digits = from[0] + unit * SPLIT_BYTES;
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        add_both(sum[0][0][i], sum[0][1][i], even[0], even[1], digits + 4 * i, unit == 0);
        add_both(sum[0][0][i], sum[0][1][i], odd[0], odd[1], digits + 12 + 4 * i, false);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int side = 0; side < SIDES; ++side) {
      const __m256i upper = _mm256_add_epi32(_mm256_madd_epi16(sum[r][side][1], _mm256_set1_epi16(1)), _mm256_madd_epi16(sum[r][side][2], _mm256_set1_epi16(256)));
      wide[r][side].upper = _mm256_add_epi32(wide[r][side].upper, upper);
      wide[r][side].lower = _mm256_add_epi32(wide[r][side].lower, _mm256_madd_epi16(sum[r][side][0], _mm256_set1_epi16(1)));
    }
  }
}

// The sums over one chunk as V without the power of two; its units are FIXED_UNITS, where that is not 0.
template <class Codes, int FIXED_UNITS, int ROWS, int SIDES>
inline __attribute__((always_inline)) void sums_of(const Codes& decoder, const uint8_t* codes, int64_t units, const uint8_t* const (&x)[ROWS], int64_t at,
                                                   const Chunk* const (&chunk)[ROWS], int64_t c, V (&to)[ROWS][SIDES]) {
  Wide wide[ROWS][SIDES];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int side = 0; side < SIDES; ++side) {
      wide[r][side].upper = _mm256_slli_epi32(_mm256_set1_epi32(chunk[r][c].upper), Codes::OFFSET);
      wide[r][side].lower = _mm256_slli_epi32(_mm256_set1_epi32(chunk[r][c].lower), Codes::OFFSET);
    }
  }
  if constexpr (FIXED_UNITS != 0) {
#pragma GCC unroll 4
    for (int i = 0; i < FIXED_UNITS; i += Codes::UNITS) add_units<Codes, Codes::UNITS, ROWS, SIDES>(decoder, codes + i * 64, x, at + i * SPLIT_BYTES, wide);
  } else {
    for (; units >= Codes::UNITS; units -= Codes::UNITS) {
      add_units<Codes, Codes::UNITS, ROWS, SIDES>(decoder, codes, x, at, wide);
      codes += Codes::UNITS * 64;
      at += Codes::UNITS * SPLIT_BYTES;
    }
    for (; units > 0; --units) {
      add_units<Codes, 1, ROWS, SIDES>(decoder, codes, x, at, wide);
      codes += 64;
      at += SPLIT_BYTES;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int side = 0; side < SIDES; ++side) {
      const __m256 high = _mm256_cvtepi32_ps(wide[r][side].upper), rest = _mm256_cvtepi32_ps(wide[r][side].lower);
      to[r][side] = {_mm256_fmadd_ps(high, _mm256_set1_ps(256.0f), rest)};
    }
  }
}

// Groups of 32 and 16 in features have paths of their own, which keep their sums in registers.
template <class Codes, int ROWS, int SIDES>
inline __attribute__((always_inline)) void chunk_sums(const Codes& decoder, const uint8_t* codes, int64_t units, const uint8_t* const (&x)[ROWS], int64_t at,
                                                      const Chunk* const (&chunk)[ROWS], int64_t c, V (&to)[ROWS][SIDES]) {
  if (units == 4) return sums_of<Codes, 4>(decoder, codes, units, x, at, chunk, c, to);
  if (Codes::UNITS == 2 && units == 2) return sums_of<Codes, 2>(decoder, codes, units, x, at, chunk, c, to);
  sums_of<Codes, 0>(decoder, codes, units, x, at, chunk, c, to);
}

// Adds scale * (dot - zero * sum of x) of group g to the totals of SIDES halves of a panel from `side` on.
template <int ROWS, int SIDES>
inline __attribute__((always_inline)) void add_group(const GroupedArgs& args, int64_t panel, int64_t g, int side, const V (&dot)[ROWS][SIDES],
                                                     const float* const (&x_sums)[ROWS], const V& step, V (&total)[ROWS][2]) {
  const bool sums = args.x_sums != nullptr;
#pragma GCC unroll 2
  for (int i = 0; i < SIDES; ++i) {
    const int64_t at = (panel * args.groups + g) * PANEL + (side + i) * V::LANES;
    const V scale = load_scale(args, at, panel * PANEL + (side + i) * V::LANES);
    if (sums) {
      const V zero = load_zero(args, at);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) total[r][side + i] = V::fma(scale, dot[r][i] * step - zero * V::broadcast(x_sums[r] + g), total[r][side + i]);
    } else {
      const V stepped = scale * step;
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) total[r][side + i] = V::fma(stepped, dot[r][i], total[r][side + i]);
    }
  }
}

// One panel and ROWS rows.  Sums of 16 bits of two rows and both halves, or of four rows and one half, fit into registers.
template <class Codes, int ROWS>
inline void fixed_tile(const GroupedArgs& args, int64_t panel, int64_t row) {
  constexpr int SIDES = ROWS > 2 ? 1 : 2;
  constexpr int64_t AHEAD = 2048;  // bytes that are on their way: streams in hardware end at every page
  const SplitRows& split = *args.split;
  const Codes decoder(args);
  const V step = V::set(Codes::step(args));
  const uint8_t *codes = args.codes + panel * args.units * 64, *x[ROWS];
  const Chunk* chunk[ROWS];
  const float* x_sums[ROWS];
  V total[ROWS][2];
  for (int r = 0; r < ROWS; ++r) {
    const int64_t from = args.x_rows ? args.x_rows[row + r] : row + r;
    x[r] = split.bytes + from * split.row_bytes;
    chunk[r] = split.chunks + from * split.chunk_count;
    x_sums[r] = args.x_sums + from * args.groups;
    for (int side = 0; side < 2; ++side) total[r][side] = V::zero();
  }
  const int64_t place = panel * PANEL;
  int64_t unit = 0;
  for (int64_t g = 0; g < args.groups; ++g) {
    const int64_t start = unit, end = args.group_ends[g], whole = (end - start + CHUNK_UNITS - 1) / CHUNK_UNITS;
    for (int64_t i = start; i < end; ++i) _mm_prefetch(reinterpret_cast<const char*>(codes + i * 64 + AHEAD), _MM_HINT_T0);
#pragma GCC unroll 1
    for (int side = 0; side < 2; side += SIDES) {
      V dot[ROWS][SIDES];
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int i = 0; i < SIDES; ++i) dot[r][i] = V::zero();
      unit = start;
      for (int64_t c = 0; c < whole; ++c) {
        const int64_t units = end - unit < CHUNK_UNITS ? end - unit : CHUNK_UNITS;
        V sum[ROWS][SIDES];
        chunk_sums<Codes, ROWS, SIDES>(decoder, codes + unit * 64 + 32 * side, units, x, unit * SPLIT_BYTES, chunk, c, sum);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
          const V power = V::broadcast(&chunk[r][c].step);
#pragma GCC unroll 2
          for (int i = 0; i < SIDES; ++i) dot[r][i] = V::fma(sum[r][i], power, dot[r][i]);
        }
        unit += units;
      }
      add_group<ROWS, SIDES>(args, panel, g, side, dot, x_sums, step, total);
    }
    for (int r = 0; r < ROWS; ++r) chunk[r] += whole;
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int side = 0; side < 2; ++side) {
      const int64_t first = place + side * V::LANES, rest = args.n - first, count = rest < V::LANES ? rest : V::LANES;
      alignas(32) float values[V::LANES];
      total[r][side].store(values);
      if (count > 0) store_outputs(args, row + r, first, values, count);
    }
  }
}

template <class Codes>
inline void fixed_panels(const GroupedArgs& args, int64_t panel, int64_t panel_end, int64_t row, int64_t row_end) {
  for (; panel < panel_end; ++panel) {
    int64_t at = row;
    for (; at + 4 <= row_end; at += 4) fixed_tile<Codes, 4>(args, panel, at);
    if (at + 3 <= row_end) fixed_tile<Codes, 3>(args, panel, at), at += 3;
    if (at + 2 <= row_end) fixed_tile<Codes, 2>(args, panel, at), at += 2;
    if (at < row_end) fixed_tile<Codes, 1>(args, panel, at);
  }
}

inline void fixed_by_kind(const GroupedArgs& args, int64_t panel, int64_t panel_end, int64_t row, int64_t row_end) {
  if (args.code_kind == NIBBLE) return fixed_panels<NibbleCodes>(args, panel, panel_end, row, row_end);
  fixed_panels<TableCodes>(args, panel, panel_end, row, row_end);
}

// Bits of the largest magnitude of whole units; those of an infinity or a NaN are 0x7f800000 or more.
inline uint32_t largest_bits(const float* x, int64_t units) {
  __m256i top = _mm256_setzero_si256();
  for (int64_t i = 0; i < units; ++i) {
    const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(x + i * UNIT));
    top = _mm256_max_epu32(top, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
  }
  alignas(32) uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), top);
  uint32_t largest = 0;
  for (uint32_t lane : lanes) largest = lane > largest ? lane : largest;
  return largest;
}

inline int32_t sum_lanes(__m256i values) {
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), values);
  int32_t sum = 0;
  for (int32_t lane : lanes) sum += lane;
  return sum;
}

// One chunk, whose largest magnitude has the biased exponent `exponent`.
inline void split_chunk(const float* x, int64_t units, uint32_t exponent, uint8_t* to, Chunk& chunk) {
  const __m256 factor = _mm256_set1_ps(bits_to_float((275 - exponent) << 23));  // 2^22 over the next power of two
  const __m256i half = _mm256_set1_epi32(128), low = _mm256_set1_epi32(255), order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  const __m256i turn = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m256i upper = _mm256_setzero_si256(), lower = upper;
  for (int64_t i = 0; i < units; ++i, to += SPLIT_BYTES) {
    const __m256i number = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i * UNIT), factor));
    const __m256i middle = _mm256_srai_epi32(_mm256_add_epi32(number, half), 8), top = _mm256_srai_epi32(_mm256_add_epi32(middle, half), 8);
    upper = _mm256_add_epi32(upper, middle);
    lower = _mm256_add_epi32(lower, _mm256_sub_epi32(number, _mm256_slli_epi32(middle, 8)));
    const __m256i two = _mm256_or_si256(_mm256_and_si256(number, low), _mm256_slli_epi32(_mm256_and_si256(middle, low), 8));
    const __m256i three = _mm256_or_si256(two, _mm256_slli_epi32(_mm256_and_si256(top, low), 16));
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_permutevar8x32_epi32(three, order), turn);
    const __m128i odd = _mm256_extracti128_si256(bytes, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(bytes));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to + 12), odd);
    const int32_t last = _mm_extract_epi32(odd, 2);
    __builtin_memcpy(to + 20, &last, 4);
  }
  chunk = {bits_to_float((exponent - 21) << 23), -sum_lanes(upper), -sum_lanes(lower)};
}

}  // namespace
}  // namespace bitgrain
