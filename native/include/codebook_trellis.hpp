// Decoder of trellis codes over `V` and `I`, see codebook_tables.hpp; formulas in numerics/trellis_codes.py.  Internal linkage.
#pragma once
#include "codebook_tables.hpp"

namespace bitgrain {
namespace {

constexpr int64_t TILE = 16;
constexpr int64_t END = 32;  // bytes

template <int DECODER, bool PAIRS>
struct Trellis {
  static constexpr int ROWS = int(TILE);
  const TrellisCodes& c;
  int64_t wide;            // tiles side by side
  Places places[TILE][2];  // of eight columns of each row of a tile
  bool around[TILE][2];    // they are read beyond the end of the tile: their places are those in its ends
  alignas(32) int32_t entry[TILE][2][8];  // which of the values of its window each is

  Trellis(const TrellisCodes& c, int64_t k) : c(c), wide(k / TILE) {
    for (int64_t row = 0; row < TILE; ++row)
      for (int half = 0; half < 2; ++half) {
        int64_t positions[8];
        for (int i = 0; i < 8; ++i) {
          const int64_t value = value_at(row, 8 * half + i);
          entry[row][half][i] = int32_t(value % c.step);
          positions[i] = value / c.step * c.step * c.bits;
        }
        Places& at = places[row][half];
        at.set(positions, c.window);
        const int64_t bytes = 32 * c.bits;
        around[row][half] = (at.low > at.high ? at.low : at.high) + 16 > bytes;
        if (around[row][half]) at.low -= bytes - END, at.high -= bytes - END;  // the two lie 16 bytes apart at most
      }
  }

  // number of the value in the stream of its tile
  int64_t value_at(int64_t row, int64_t column) const {
    if (!c.fragments) return TILE * row + column;
    return (row & 7) << 5 | (column >> 1 & 3) << 3 | (column >> 3) << 2 | (row >> 3) << 1 | (column & 1);
  }

  template <class Sink>
  inline void decode(int64_t row, int64_t unit, int64_t end, Sink& sink) const {
    const int64_t bytes = 32 * c.bits;
    const uint8_t* from = c.packed + (row / TILE * wide + unit / 2) * bytes;
    const I mask = I::set((1u << c.window) - 1);
    // copies: what a sink stores might be these, for all that the compiler knows
    const Lookups lookups = {c.table, I::set(uint32_t(c.step)), I::set((1u << c.table_bits) - 1), (DECODER == QUANTLUT ? 16 : 15) - c.table_bits};
    alignas(32) uint8_t ends[2 * END];  // the last bytes of a tile, then its first: windows run over the end into the beginning
    for (; unit < end; unit += 2, from += bytes) {
      __builtin_memcpy(ends, from + bytes - END, END);
      __builtin_memcpy(ends + END, from, END);
      const uint8_t* const streams[2] = {from, ends};
      for (int r = 0; r < TILE; ++r) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half)
          sink.put(r, unit + half, values(I::read(streams[around[r][half]], places[r][half]) & mask, entry[r][half], lookups));
      }
    }
  }

 private:
  struct Lookups {
    const float* table;
    I step, rows;
    int shift;

    inline __attribute__((always_inline)) V at(const I& row, const I& lane) const {
      return PAIRS ? V::gather_pairs(table, row) : V::gather(table, row * step + lane);
    }
  };

  inline __attribute__((always_inline)) V values(const I& state, const int32_t* entries, const Lookups& lookups) const {
    if (DECODER == ONE_MAD) return (state * I::set(34038481u) + I::set(76625530u)).byte_sums().minus(510);
    if (DECODER == TWO_MAD) {
      const I x = state * I::set(264435761u) + I::set(1013904223u);
      return (x.times_high(1664525u) + x).byte_sums().minus(510);
    }
    if (DECODER == THREE_INST) return ((state * I::set(89226354u) + I::set(64248484u) & I::set(0x8fff8fffu)) ^ I::set(0x3b603b60u)).half_sums();
    const I lane = I::load(entries);
    if (DECODER == LUT) return lookups.at(state, lane);
    const I z = state * (state + I::set(1));
    const V value = lookups.at(z.shifted(lookups.shift) & lookups.rows, lane);
    if (DECODER == QUANTLUT) return value;
    // bit 15 becomes the sign of the first value of a window
    return value.flip((z.raised(16) & I::set(0x80000000u)).where_zero(lane));
  }
};

template <int DECODER, bool PAIRS = false>
inline void run_trellis_of(const CodeProduct& p, const TrellisCodes& c) {
  if (!PAIRS && c.table != nullptr && c.step == 2) return run_trellis_of<DECODER, true>(p, c);
  const Trellis<DECODER, PAIRS> decoder(c, p.k);
  multiply_codes(p, &decoder, &p.units, 1);
}

inline void run_trellis(const CodeProduct& p, const TrellisCodes& c) {
  switch (c.decoder) {
    case LUT: return run_trellis_of<LUT>(p, c);
    case QUANTLUT: return run_trellis_of<QUANTLUT>(p, c);
    case QUANTLUT_SYM: return run_trellis_of<QUANTLUT_SYM>(p, c);
    case ONE_MAD: return run_trellis_of<ONE_MAD>(p, c);
    case TWO_MAD: return run_trellis_of<TWO_MAD>(p, c);
    default: return run_trellis_of<THREE_INST>(p, c);
  }
}

}  // namespace
}  // namespace bitgrain
