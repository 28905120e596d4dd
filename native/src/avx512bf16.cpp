// AVX-512 with BF16: bfloat16 activations times decoded weights, two in features per lane; the rest as AVX-512.
#include <cstring>

#include "bf16_work.hpp"

namespace bitgrain {
namespace {

constexpr int TALL = 4;  // rows that share decoded weights

inline __m512 dot_pairs(__m512 sum, __m512i weights, int32_t pair) {
  return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(pair));
}

// Even and odd pairs have a sum each, for every number of rows and panels alike.
template <int ROWS, int PANELS>
inline void multiply_segment(const Work& work, const Block& block, const Segment& segment, int64_t panel, int64_t row, int64_t base) {
  const GroupedArgs& args = work.args;
  __m512 sum[ROWS][PANELS][2];
  const uint8_t* x[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    x[r] = reinterpret_cast<const uint8_t*>(args.x16 + (row + r) * work.width + segment.first * STEP);
    for (int p = 0; p < PANELS; ++p) sum[r][p][0] = sum[r][p][1] = _mm512_setzero_ps();
  }
  const uint8_t* weights = work.weights + (segment.first - block.first) * 1024;
  const int64_t pairs = (segment.last - segment.first) * STEP / 2;
  for (int64_t pair = 0; pair < pairs; pair += 2) {
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      __m512i w[PANELS];
      for (int p = 0; p < PANELS; ++p) w[p] = _mm512_load_si512(weights + (pair + odd) * 64 + p * (BLOCK / STEP) * 1024);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        int32_t two;
        std::memcpy(&two, x[r] + (pair + odd) * 4, 4);
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; ++p) sum[r][p][odd] = dot_pairs(sum[r][p][odd], w[p], two);
      }
    }
  }
  const bool shifted = args.x_sums != nullptr && segment.opens;
  for (int p = 0; p < PANELS; ++p) {
    const int64_t place = ((panel + p) * args.groups + segment.group) * PANEL;
    const V scale = load_scale(args, place, (panel + p) * PANEL);
    const V zero = shifted ? load_zero(args, place) : V::zero();
    for (int r = 0; r < ROWS; ++r) {
      V dot = {_mm512_add_ps(sum[r][p][0], sum[r][p][1])};
      if (shifted) dot = dot - zero * V::broadcast(args.x_sums + segment.group * args.rows + row + r);
      float* total = work.totals + ((row - base + r) * WIDE + p) * PANEL;
      V::fma(scale, dot, V::load(total)).store(total);
    }
  }
}

template <int PANELS>
inline void multiply_rows(const Work& work, const Block& block, int64_t panel, int64_t base, int64_t rows) {
  for (int64_t i = block.segment_begin; i < block.segment_end; ++i) {
    const Segment& segment = work.cut.segments[i];
    int64_t at = 0;
    for (; at + TALL <= rows; at += TALL) multiply_segment<TALL, PANELS>(work, block, segment, panel, base + at, base);
    for (; at + 2 <= rows; at += 2) multiply_segment<2, PANELS>(work, block, segment, panel, base + at, base);
    for (; at < rows; ++at) multiply_segment<1, PANELS>(work, block, segment, panel, base + at, base);
  }
}

template <class Decoder, int PANELS>
inline void panels_rows(const Work& work, int64_t panel, int64_t base, int64_t rows) {
  std::memset(work.totals, 0, size_t(rows) * WIDE * PANEL * 4);
  for (const Block *at_block = work.cut.blocks, *last = at_block + work.cut.block_count; at_block < last; ++at_block) {
    const Block& block = *at_block;
    for (int p = 0; p < PANELS; ++p) decode_steps<Decoder>(work.args, panel + p, block.first, block.last, work.weights + p * (BLOCK / STEP) * 1024);
    multiply_rows<PANELS>(work, block, panel, base, rows);
  }
  store_totals<PANELS>(work, panel, base, rows);
}

struct NoScope {
  explicit NoScope(int64_t) {}
};

}  // namespace
}  // namespace bitgrain

#include "grouped16.hpp"

namespace bitgrain {

// The table of AVX-512 with the one kernel added.
const Kernels& avx512bf16_kernels() {
  const Kernels& plain = avx512_kernels();
  static const Kernels table = {"avx512bf16", plain.grouped, grouped16_by_kind<NoScope>, nullptr, nullptr, plain.integer, plain.widen_range, plain.quantize, false};
  return table;
}

}  // namespace bitgrain
