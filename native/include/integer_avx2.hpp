// Bytes times bytes through words: products of 16-bit numbers are exact in 32 bits, for every code.  The multiply-add of bytes
// saturates; what would keep it exact (signs moved from one factor to the other, sums widened at once) costs as many instructions
// per product as words do.  Needs AVX2; internal linkage.
//
// Of four in features that lie together, the two even ones are one 32-bit lane of words and the two odd ones another.
#pragma once
#include "avx2_store.hpp"

namespace bitgrain {
namespace {

constexpr int64_t WORD_QUADS = 64;   // fours of in features whose weights are widened at once: 8 KB of one panel
constexpr int64_t WORD_ROWS = 48;    // rows that share them
constexpr int64_t WORD_PANELS = 4;   // panels that share widened activations
constexpr int TALL = 4;              // rows whose sums stay in registers: with more of them GCC 12 writes sums to memory in the loop
constexpr int FEW = 3;               // rows up to which weights are widened in registers
constexpr int64_t FEW_QUADS = 4096;  // fours of in features whose activations are widened at once, for few rows

// One half of 16 out features by four in features.
struct Words {
  __m256i even, odd;

  explicit Words(const uint8_t* codes) {
    const __m256i raw = load32(codes);
    even = _mm256_srai_epi16(_mm256_slli_epi16(raw, 8), 8);
    odd = _mm256_srai_epi16(raw, 8);
  }
};

inline __m256i add_pairs(__m256i sum, __m256i weights, const int32_t* pair) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(weights, _mm256_set1_epi32(*pair)));
}

// Unsigned bytes of `quads` fours, an even number, as words: all even pairs, then all odd pairs.
inline void widen_codes(const uint8_t* a, int64_t quads, int32_t* to) {
  const __m256i low = _mm256_set1_epi32(0x00ff00ff);
  int64_t q = 0;
  for (; q + 8 <= quads; q += 8) {
    const __m256i raw = load32(a + 4 * q);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + q), _mm256_and_si256(raw, low));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + quads + q), _mm256_srli_epi16(raw, 8));
  }
  for (; q < quads; ++q) {
    uint32_t four;
    std::memcpy(&four, a + 4 * q, 4);
    to[q] = int32_t(four & 0x00ff00ff);
    to[quads + q] = int32_t(four >> 8 & 0x00ff00ff);
  }
}

inline void store_sums(const IntegerArgs& args, int64_t row, int64_t panel, const int32_t* sums) {
  for (int half = 0; half < 2; ++half) {
    const int64_t first = panel * PANEL + 8 * half;
    const __m256i columns = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(args.column_sums + first));
    const __m256i shift = _mm256_mullo_epi32(_mm256_set1_epi32(args.a_zero[row]), columns);
    const __m256 dot = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums + 8 * half)), shift));
    if (first < args.n) store_eight(args, row, first, _mm256_mul_ps(dot, _mm256_mul_ps(_mm256_set1_ps(args.a_scale[row]), _mm256_loadu_ps(args.w_scale + first))));
  }
}

// ---------------------------------------------------------------- few rows: weights are read once, and widened in registers

// Adds `quads` fours to sums [ROWS][16]; a [ROWS][stride] is what widen_codes wrote.
template <int ROWS>
inline void add_streamed(const uint8_t* codes, const int32_t* a, int64_t stride, int64_t quads, int32_t* sums) {
  __m256i sum[ROWS][2];
  for (int r = 0; r < ROWS; ++r)
    for (int half = 0; half < 2; ++half) sum[r][half] = load32(reinterpret_cast<const uint8_t*>(sums + r * PANEL + 8 * half));
#pragma GCC unroll 2
  for (int64_t q = 0; q < quads; ++q) {
    _mm_prefetch(reinterpret_cast<const char*>(codes + q * 64 + AHEAD), _MM_HINT_T0);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const Words words(codes + q * 64 + 32 * half);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        sum[r][half] = add_pairs(sum[r][half], words.even, a + r * stride + q);
        sum[r][half] = add_pairs(sum[r][half], words.odd, a + r * stride + quads + q);
      }
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int half = 0; half < 2; ++half) _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + r * PANEL + 8 * half), sum[r][half]);
}

template <int ROWS>
inline void few_rows(const IntegerArgs& args, int64_t panel, int64_t panel_end, int64_t row) {
  alignas(32) int32_t a[ROWS * 2 * FEW_QUADS];
  for (int64_t widened = -1; panel < panel_end; ++panel) {
    int32_t sums[ROWS * PANEL] = {};
    const uint8_t* codes = args.codes + panel * args.quads * 64;
    for (int64_t first = 0; first < args.quads; first += FEW_QUADS) {
      const int64_t left = args.quads - first, quads = left < FEW_QUADS ? left : FEW_QUADS;
      if (widened != first) {
        for (int r = 0; r < ROWS; ++r) widen_codes(args.a + ((row + r) * args.quads + first) * 4, quads, a + r * 2 * FEW_QUADS);
        widened = first;
      }
      add_streamed<ROWS>(codes + first * 64, a, 2 * FEW_QUADS, quads, sums);
    }
    for (int r = 0; r < ROWS; ++r) store_sums(args, row + r, panel, sums + r * PANEL);
  }
}

// ---------------------------------------------------------------- many rows: widened weights are kept in the first-level cache

inline void widen_weights(const uint8_t* codes, int64_t quads, int16_t* to) {
  for (int64_t q = 0; q < quads; ++q) {
    for (int half = 0; half < 2; ++half) {
      const Words words(codes + q * 64 + 32 * half);
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + q * 32 + 16 * half), words.even);
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + (quads + q) * 32 + 16 * half), words.odd);
    }
  }
}

// Adds `pairs` pairs of in features to sums [ROWS][16]; rows of `a` are 2 * WORD_QUADS apart.
template <int ROWS>
__attribute__((noinline)) void add_widened(const int16_t* weights, const int32_t* a, int64_t pairs, int32_t* sums) {
  __m256i sum[ROWS][2];
  for (int r = 0; r < ROWS; ++r)
    for (int half = 0; half < 2; ++half) sum[r][half] = load32(reinterpret_cast<const uint8_t*>(sums + r * PANEL + 8 * half));
#pragma GCC unroll 2
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const __m256i first = _mm256_load_si256(reinterpret_cast<const __m256i*>(weights + pair * 32));
    const __m256i second = _mm256_load_si256(reinterpret_cast<const __m256i*>(weights + pair * 32 + 16));
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const __m256i two = _mm256_set1_epi32(a[r * 2 * WORD_QUADS + pair]);
      sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(first, two));
      sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(second, two));
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int half = 0; half < 2; ++half) _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + r * PANEL + 8 * half), sum[r][half]);
}

inline void add_rows(const int16_t* weights, const int32_t* a, int64_t pairs, int64_t rows, int32_t* sums) {
  // tiles as equal as can be: two of three rather than one of four and one of two
  for (int64_t tiles = (rows + TALL - 1) / TALL; tiles > 0; --tiles) {
    const int64_t step = (rows + tiles - 1) / tiles;
    switch (step) {
      case 1: add_widened<1>(weights, a, pairs, sums); break;
      case 2: add_widened<2>(weights, a, pairs, sums); break;
      case 3: add_widened<3>(weights, a, pairs, sums); break;
      default: add_widened<TALL>(weights, a, pairs, sums);
    }
    rows -= step;
    a += step * 2 * WORD_QUADS;
    sums += step * PANEL;
  }
}

inline void many_rows(const IntegerArgs& args, int64_t first_panel, int64_t panel_end, int64_t row, int64_t rows) {
  alignas(64) int16_t weights[WORD_QUADS * 64];
  alignas(64) int32_t a[WORD_ROWS * 2 * WORD_QUADS], sums[WORD_PANELS * WORD_ROWS * PANEL];
  for (; first_panel < panel_end; first_panel += WORD_PANELS) {
    const int64_t left = panel_end - first_panel, panels = left < WORD_PANELS ? left : WORD_PANELS;
    std::memset(sums, 0, sizeof sums);
    for (int64_t first = 0; first < args.quads; first += WORD_QUADS) {
      const int64_t rest = args.quads - first, quads = rest < WORD_QUADS ? rest : WORD_QUADS;
      for (int64_t r = 0; r < rows; ++r) widen_codes(args.a + ((row + r) * args.quads + first) * 4, quads, a + r * 2 * WORD_QUADS);
      for (int64_t p = 0; p < panels; ++p) {
        widen_weights(args.codes + ((first_panel + p) * args.quads + first) * 64, quads, weights);
        add_rows(weights, a, 2 * quads, rows, sums + p * WORD_ROWS * PANEL);
      }
    }
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t r = 0; r < rows; ++r) store_sums(args, row + r, first_panel + p, sums + (p * WORD_ROWS + r) * PANEL);
  }
}

void integer(const IntegerArgs& args, int64_t panel, int64_t panel_end, int64_t row, int64_t row_end) {
  while (row < row_end) {
    const int64_t left = row_end - row, rows = left < WORD_ROWS ? left : WORD_ROWS;
    switch (rows) {
      case 1: few_rows<1>(args, panel, panel_end, row); break;
      case 2: few_rows<2>(args, panel, panel_end, row); break;
      case FEW: few_rows<FEW>(args, panel, panel_end, row); break;
      default: many_rows(args, panel, panel_end, row, rows);
    }
    row += rows;
  }
}

}  // namespace
}  // namespace bitgrain
