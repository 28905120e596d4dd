// AMX tiles: bfloat16 activations times decoded weights, and uint8 times int8.  One tile holds 16 rows of 64 bytes:
// 16 activation rows by 32 in features (64 for bytes), 16 pairs (fours) of in features by one panel, or 16 x 16 sums.
//
// Every row count goes through the same tiles, so one row's result does not depend on how many others there are.
#include <cstring>
#include <sys/syscall.h>
#include <unistd.h>

#include "bf16_work.hpp"

namespace bitgrain {
namespace {

constexpr int TILE_ROWS = 16;

inline int64_t fewer(int64_t a, int64_t b) { return a < b ? a : b; }

// Tiles 0-3 are the sums of two row tiles by WIDE panels, 4 and 5 activations, 6 and 7 weights.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};

  explicit TileShapes(int activation_rows) {
    for (int i = 0; i < 8; ++i) {
      bytes_per_row[i] = 64;
      rows[i] = uint8_t(i < 6 ? activation_rows : TILE_ROWS);
    }
  }
};

struct TileScope {
  explicit TileScope(int64_t rows) {
    const TileShapes shapes(int(fewer(rows, TILE_ROWS)));
    _tile_loadconfig(&shapes);
  }
  ~TileScope() { _tile_release(); }
};

// ---------------------------------------------------------------- grouped

// totals[rows][panel] += scale * (sums - zero * x_sum), for the sums of one row tile and one panel
inline void add_segment(const Work& work, const Segment& segment, int64_t panel, int slot, int64_t row, int64_t base, int rows, const float* sums) {
  const GroupedArgs& args = work.args;
  const int64_t place = (panel * args.groups + segment.group) * PANEL;
  const V scale = load_scale(args, place, panel * PANEL);
  float* totals = work.totals + ((row - base) * WIDE + slot) * PANEL;
  if (args.x_sums == nullptr || !segment.opens) {
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) V::fma(scale, V::load(sums + r * PANEL), V::load(totals + r * WIDE * PANEL)).store(totals + r * WIDE * PANEL);
    return;
  }
  const V zero = load_zero(args, place);
  const float* x_sums = args.x_sums + segment.group * args.rows + row;
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
    const V dot = V::load(sums + r * PANEL) - zero * V::broadcast(x_sums + r);
    V::fma(scale, dot, V::load(totals + r * WIDE * PANEL)).store(totals + r * WIDE * PANEL);
  }
}

// One segment for ROW_TILES x PANELS tiles.
template <int ROW_TILES, int PANELS>
inline void multiply_segment(const Work& work, const Block& block, const Segment& segment, int64_t panel, int64_t row, int64_t base, int rows) {
  alignas(64) float sums[TILE_ROWS * PANEL];
  const uint16_t* x = work.args.x16 + row * work.width;
  const int64_t stride = work.width * 2;
  _tile_zero(0);
  if (PANELS > 1) _tile_zero(1);
  if (ROW_TILES > 1) _tile_zero(2);
  if (ROW_TILES > 1 && PANELS > 1) _tile_zero(3);
  for (int64_t step = segment.first; step < segment.last; ++step) {
    const uint8_t* weights = work.weights + (step - block.first) * 1024;
    _tile_loadd(6, weights, 64);
    _tile_loadd(4, x + step * STEP, stride);
    _tile_dpbf16ps(0, 4, 6);
    if (PANELS > 1) {
      _tile_loadd(7, weights + BLOCK / STEP * 1024, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (ROW_TILES > 1) {
      _tile_loadd(5, x + step * STEP + TILE_ROWS * work.width, stride);
      _tile_dpbf16ps(2, 5, 6);
      if (PANELS > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 64);
  add_segment(work, segment, panel, 0, row, base, fewer(rows, TILE_ROWS), sums);
  if (PANELS > 1) {
    _tile_stored(1, sums, 64);
    add_segment(work, segment, panel + 1, 1, row, base, fewer(rows, TILE_ROWS), sums);
  }
  if (ROW_TILES > 1) {
    _tile_stored(2, sums, 64);
    add_segment(work, segment, panel, 0, row + TILE_ROWS, base, rows - TILE_ROWS, sums);
    if (PANELS > 1) {
      _tile_stored(3, sums, 64);
      add_segment(work, segment, panel + 1, 1, row + TILE_ROWS, base, rows - TILE_ROWS, sums);
    }
  }
}

template <class Decoder, int PANELS>
inline void panels_rows(const Work& work, int64_t panel, int64_t base, int64_t rows) {
  std::memset(work.totals, 0, size_t(rows) * WIDE * PANEL * 4);
  for (const Block *at_block = work.cut.blocks, *last = at_block + work.cut.block_count; at_block < last; ++at_block) {
    const Block& block = *at_block;
    for (int p = 0; p < PANELS; ++p) decode_steps<Decoder>(work.args, panel + p, block.first, block.last, work.weights + p * (BLOCK / STEP) * 1024);
    for (int64_t at = 0; at < rows; at += 2 * TILE_ROWS) {
      const int left = int(fewer(rows - at, 2 * TILE_ROWS));
      for (int64_t i = block.segment_begin; i < block.segment_end; ++i) {
        const Segment& segment = work.cut.segments[i];
        if (left > TILE_ROWS) multiply_segment<2, PANELS>(work, block, segment, panel, base + at, base, left);
        else multiply_segment<1, PANELS>(work, block, segment, panel, base + at, base, left);
      }
    }
  }
  store_totals<PANELS>(work, panel, base, rows);
}

}  // namespace
}  // namespace bitgrain

#include "grouped16.hpp"

namespace bitgrain {
namespace {

// ---------------------------------------------------------------- integer

inline void store_integers(const IntegerArgs& args, int64_t row, int rows, int64_t panel, const int32_t* dots) {
  const __m512i columns = _mm512_loadu_si512(args.column_sums + panel * PANEL);
  const __m512 w_scale = _mm512_loadu_ps(args.w_scale + panel * PANEL);
  for (int r = 0; r < rows; ++r) {
    const __m512i shift = _mm512_mullo_epi32(_mm512_set1_epi32(args.a_zero[row + r]), columns);
    const __m512 dot = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(dots + r * PANEL), shift));
    store_panel(args, row + r, panel * PANEL, _mm512_mul_ps(dot, _mm512_mul_ps(_mm512_set1_ps(args.a_scale[row + r]), w_scale)));
  }
}

// One row tile pair, one or two panels; the last step, which may be short, reads weights from `tail`, padded with zeros.
template <int ROW_TILES, int PANELS>
inline void integer_tiles(const IntegerArgs& args, const uint8_t* tail, int64_t panel, int64_t row) {
  alignas(64) int32_t dots[TILE_ROWS * PANEL];
  const int64_t full = args.quads / 16, stride = args.quads * 4;
  const uint8_t *a = args.a + row * stride, *codes = args.codes + panel * args.quads * 64;
  _tile_zero(0);
  if (PANELS > 1) _tile_zero(1);
  if (ROW_TILES > 1) _tile_zero(2);
  if (ROW_TILES > 1 && PANELS > 1) _tile_zero(3);
  for (int64_t step = 0; step * 16 < args.quads; ++step) {
    const uint8_t* w = step < full ? codes + step * 1024 : tail;
    const uint8_t* next = step < full ? w + args.quads * 64 : tail + 1024;
    _tile_loadd(6, w, 64);
    _tile_loadd(4, a + step * 64, stride);
    _tile_dpbusd(0, 4, 6);
    if (PANELS > 1) {
      _tile_loadd(7, next, 64);
      _tile_dpbusd(1, 4, 7);
    }
    if (ROW_TILES > 1) {
      _tile_loadd(5, a + step * 64 + TILE_ROWS * stride, stride);
      _tile_dpbusd(2, 5, 6);
      if (PANELS > 1) _tile_dpbusd(3, 5, 7);
    }
  }
  const int rows = int(fewer(args.rows - row, TILE_ROWS * ROW_TILES)), upper = fewer(rows, TILE_ROWS);
  _tile_stored(0, dots, 64);
  store_integers(args, row, upper, panel, dots);
  if (PANELS > 1) {
    _tile_stored(1, dots, 64);
    store_integers(args, row, upper, panel + 1, dots);
  }
  if (ROW_TILES > 1) {
    _tile_stored(2, dots, 64);
    store_integers(args, row + TILE_ROWS, rows - upper, panel, dots);
    if (PANELS > 1) {
      _tile_stored(3, dots, 64);
      store_integers(args, row + TILE_ROWS, rows - upper, panel + 1, dots);
    }
  }
}

template <int PANELS>
inline void integer_rows(const IntegerArgs& args, int64_t panel, int64_t row, int64_t row_end) {
  alignas(64) uint8_t tail[PANELS * 1024] = {};
  const int64_t full = args.quads / 16 * 16;
  for (int p = 0; p < PANELS; ++p) std::memcpy(tail + p * 1024, args.codes + ((panel + p) * args.quads + full) * 64, size_t(args.quads - full) * 64);
  for (; row < row_end; row += 2 * TILE_ROWS) {
    if (row_end - row > TILE_ROWS) integer_tiles<2, PANELS>(args, tail, panel, row);
    else integer_tiles<1, PANELS>(args, tail, panel, row);
  }
}

void integer(const IntegerArgs& args, int64_t panel, int64_t panel_end, int64_t row, int64_t row_end) {
  const TileScope scope(args.rows);
  if (panel_end - panel > 1) integer_rows<2>(args, panel, row, row_end);
  else integer_rows<1>(args, panel, row, row_end);
}

}  // namespace

const Kernels& amx_kernels() {
  const Kernels& plain = avx512_kernels();
  static const Kernels table = {"amx", plain.grouped, grouped16_by_kind<TileScope>, nullptr, nullptr, integer, plain.widen_range, plain.quantize, true};
  return table;
}

// Linux hands out the tile registers on request, once per process.
bool request_tiles() {
#ifdef __linux__
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return granted;
#else
  return false;
#endif
}

}  // namespace bitgrain
