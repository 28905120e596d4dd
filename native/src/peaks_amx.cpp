// See peaks.hpp.
#include "peaks_avx512.hpp"

namespace bitgrain {
namespace {

// Eight whole tiles: sums in the first four, then two of either factor.
struct WholeTiles {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

struct TilesInUse {
  TilesInUse() {
    static const WholeTiles tiles;
    _tile_loadconfig(&tiles);
  }
  ~TilesInUse() { _tile_release(); }
};

#define PRODUCTS(INSTRUCTION) \
  const TilesInUse tiles; \
  for (int64_t round = 0; round < rounds; ++round) { \
    INSTRUCTION(0, 4, 6); \
    INSTRUCTION(1, 4, 7); \
    INSTRUCTION(2, 5, 6); \
    INSTRUCTION(3, 5, 7); \
  }

void bfloat16_tiles(int64_t rounds) { PRODUCTS(_tile_dpbf16ps) }

void int8_tiles(int64_t rounds) { PRODUCTS(_tile_dpbssd) }

}  // namespace

const Peaks& amx_peaks() {
  static const Peaks peaks = {{float32, 12 * 16 * 2}, {bfloat16_tiles, 4 * 16 * 16 * 32 * 2}, {int8_tiles, 4 * 16 * 16 * 64 * 2}, {nullptr, 0}};
  return peaks;
}

}  // namespace bitgrain
