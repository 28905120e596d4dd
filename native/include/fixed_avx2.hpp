// Four-bit codes times x in fixed point, in bytes: three signed bytes per in feature stand for 23 bits below the largest value
// of a chunk, so the sums lose less than float32 sums do.  Needs AVX2; V and load_scale stand in grouped.hpp.
#pragma once
#include "grouped.hpp"

namespace bitgrain {
namespace {

constexpr int64_t SPLIT_BYTES = 24;  // of one unit of one row
constexpr uint32_t SMALLEST_EXPONENT = 48;  // biased: rows whose largest magnitude is below 2^-79 would lose to the smallest step

// Unsigned codes of one half of a unit, in features 0, 2, 4, 6 and 1, 3, 5, 7 of each lane; the number is code - OFFSET.  So many
// units fit into 16-bit sums: 4 products, each up to 2 * largest code * 128.
struct NibbleCodes {
  static constexpr int OFFSET = 8, UNITS = 4;
  explicit NibbleCodes(const GroupedArgs&) {}
  __m256i look_up(__m256i nibbles) const { return nibbles; }
  static float step(const GroupedArgs&) { return 1.0f; }
};

struct TableCodes {
  static constexpr int OFFSET = 12, UNITS = 2;
  __m256i table;
  explicit TableCodes(const GroupedArgs& args) {
    const __m128i numbers = _mm_loadu_si128(reinterpret_cast<const __m128i*>(args.whole_table));
    table = _mm256_broadcastsi128_si256(_mm_add_epi8(numbers, _mm_set1_epi8(OFFSET)));
  }
  __m256i look_up(__m256i nibbles) const { return _mm256_shuffle_epi8(table, nibbles); }
  static float step(const GroupedArgs& args) { return args.whole_step; }
};

inline __m256i add_products(__m256i sum, __m256i codes, const uint8_t* four) {
  int32_t bytes;
  __builtin_memcpy(&bytes, four, 4);
  return _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, _mm256_set1_epi32(bytes)));
}

// Adds `units` units to sums of 16 bits; x moves on.
template <class Codes, int ROWS, int SIDES>
inline void add_units(const Codes& decoder, const uint8_t* codes, int64_t units, const uint8_t* (&x)[ROWS], __m256i (&sum)[ROWS][SIDES][3]) {
  const __m256i low = _mm256_set1_epi8(15);
  for (int64_t unit = 0; unit < units; ++unit) {
#pragma GCC unroll 2
    for (int side = 0; side < SIDES; ++side) {
      const __m256i raw = load32(codes + unit * 64 + 32 * side);
      const __m256i even = decoder.look_up(_mm256_and_si256(raw, low));
      const __m256i odd = decoder.look_up(_mm256_and_si256(_mm256_srli_epi16(raw, 4), low));
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) {
          sum[r][side][i] = add_products(sum[r][side][i], even, x[r] + 4 * i);
          sum[r][side][i] = add_products(sum[r][side][i], odd, x[r] + 12 + 4 * i);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) x[r] += SPLIT_BYTES;
  }
}

// The sum over one chunk in float32, without the power of two.
template <class Codes>
inline V chunk_sum(const __m256i (&wide)[3], const Chunk& chunk) {
  const __m256i upper = _mm256_add_epi32(_mm256_slli_epi32(wide[2], 8), wide[1]);
  const __m256 high = _mm256_cvtepi32_ps(_mm256_sub_epi32(upper, _mm256_set1_epi32(Codes::OFFSET * chunk.upper)));
  const __m256 rest = _mm256_cvtepi32_ps(_mm256_sub_epi32(wide[0], _mm256_set1_epi32(Codes::OFFSET * chunk.lower)));
  return {_mm256_fmadd_ps(high, _mm256_set1_ps(256.0f), rest)};
}

template <class Codes, int ROWS, int SIDES>
inline void fixed_tile(const GroupedArgs& args, int64_t panel, int half, int64_t row) {
  const SplitRows& split = *args.split;
  const Codes decoder(args);
  const float step = Codes::step(args);
  const uint8_t *codes = args.codes + panel * args.units * 64 + 32 * half, *x[ROWS];
  const Chunk* chunk[ROWS];
  const float* x_sums[ROWS];
  V total[ROWS][SIDES];
  for (int r = 0; r < ROWS; ++r) {
    const int64_t from = args.x_rows ? args.x_rows[row + r] : row + r;
    x[r] = split.bytes + from * args.units * SPLIT_BYTES;
    chunk[r] = split.chunks + from * split.chunk_count;
    x_sums[r] = args.x_sums + from * args.groups;
    for (int side = 0; side < SIDES; ++side) total[r][side] = V::zero();
  }
  const bool sums = args.x_sums != nullptr;
  const int64_t place = panel * PANEL + half * V::LANES;
  int64_t unit = 0;
  for (int64_t g = 0; g < args.groups; ++g) {
    V dot[ROWS][SIDES];
    for (int r = 0; r < ROWS; ++r)
      for (int side = 0; side < SIDES; ++side) dot[r][side] = V::zero();
    while (unit < args.group_ends[g]) {
      const int64_t left = args.group_ends[g] - unit, end = unit + (left < CHUNK_UNITS ? left : CHUNK_UNITS);
      __m256i wide[ROWS][SIDES][3] = {};
      while (unit < end) {
        __m256i sum[ROWS][SIDES][3] = {};
        if (end - unit >= Codes::UNITS) {
          add_units<Codes, ROWS, SIDES>(decoder, codes + unit * 64, Codes::UNITS, x, sum);
          unit += Codes::UNITS;
        } else {
          add_units<Codes, ROWS, SIDES>(decoder, codes + unit * 64, 1, x, sum);
          ++unit;
        }
        for (int r = 0; r < ROWS; ++r)
          for (int side = 0; side < SIDES; ++side)
            for (int i = 0; i < 3; ++i)
              wide[r][side][i] = _mm256_add_epi32(wide[r][side][i], _mm256_madd_epi16(sum[r][side][i], _mm256_set1_epi16(1)));
      }
      for (int r = 0; r < ROWS; ++r) {
        const V power = V::set(chunk[r]->step * step);
        for (int side = 0; side < SIDES; ++side) dot[r][side] = V::fma(chunk_sum<Codes>(wide[r][side], *chunk[r]), power, dot[r][side]);
        ++chunk[r];
      }
    }
    for (int side = 0; side < SIDES; ++side) {
      const int64_t at = (panel * args.groups + g) * PANEL + (half + side) * V::LANES;
      const V scale = load_scale(args, at, place + side * V::LANES);
      const V zero = sums ? load_zero(args, at) : V::zero();
      for (int r = 0; r < ROWS; ++r) {
        const V moved = sums ? dot[r][side] - zero * V::set(x_sums[r][g]) : dot[r][side];
        total[r][side] = V::fma(scale, moved, total[r][side]);
      }
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int side = 0; side < SIDES; ++side) {
      const int64_t first = place + side * V::LANES, left = args.n - first, count = left < V::LANES ? left : V::LANES;
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
    for (; at + 4 <= row_end; at += 4) {
      fixed_tile<Codes, 4, 1>(args, panel, 0, at);
      fixed_tile<Codes, 4, 1>(args, panel, 1, at);
    }
    for (; at + 2 <= row_end; at += 2) fixed_tile<Codes, 2, 2>(args, panel, 0, at);
    for (; at < row_end; ++at) fixed_tile<Codes, 1, 2>(args, panel, 0, at);
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
  chunk = {bits_to_float((exponent - 21) << 23), sum_lanes(upper), sum_lanes(lower)};
}

inline void split_row(const float* x, const int32_t* group_ends, int64_t groups, const SplitRows& out, int64_t row) {
  uint8_t* to = out.bytes + row * out.units * SPLIT_BYTES;
  Chunk* chunk = out.chunks + row * out.chunk_count;
  int64_t unit = 0;
  uint32_t top = 0;
  out.whole[row] = 0;
  for (int64_t g = 0; g < groups; ++g) {
    while (unit < group_ends[g]) {
      const int64_t left = group_ends[g] - unit, units = left < CHUNK_UNITS ? left : CHUNK_UNITS;
      const uint32_t largest = largest_bits(x + unit * UNIT, units), exponent = largest >> 23;
      if (exponent == 255) return;
      top = largest > top ? largest : top;
      // steps stay at 2^-126 or above, where float32 has its full precision
      split_chunk(x + unit * UNIT, units, exponent < 22 ? 22 : exponent, to + unit * SPLIT_BYTES, *chunk++);
      unit += units;
    }
  }
  out.whole[row] = top == 0 || top >> 23 >= SMALLEST_EXPONENT;
}

}  // namespace
}  // namespace bitgrain
