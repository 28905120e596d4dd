#include "pack.hpp"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <omp.h>

#include "block_layout.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace bitgrain {
namespace {

enum PackStatus : int32_t { PACK_OK = 0, PACK_OUT_OF_MEMORY = 3 };
enum UnitLayout : int32_t { PAIRS_OF_NIBBLES = 0, QUADS = 1, COLUMNS = 2 };

// Codes [first, first + count) of a row into bytes; first is a multiple of 8.
void read_codes(const CodeStream& from, int64_t row, int64_t first, int64_t count, uint8_t* to) {
  const int bits = from.bits;
  const uint8_t* at = from.data + row * from.row_bytes + first * bits / 8;
  if (bits == 8) {
    std::memcpy(to, at, size_t(count));
    return;
  }
  if (bits == 4) {
    const int64_t pairs = count / 2;
    for (int64_t i = 0; i < pairs; ++i) {
      to[2 * i] = at[i] & 15;
      to[2 * i + 1] = at[i] >> 4;
    }
    if (count & 1) to[count - 1] = at[pairs] & 15;
    return;
  }
  const uint64_t mask = (uint64_t(1) << bits) - 1;
  for (int64_t i = 0; i < count; i += 8) {
    // eight codes are `bits` whole bytes; the last of a row may be fewer
    const int64_t some = std::min<int64_t>(8, count - i);
    uint64_t word = 0;
    std::memcpy(&word, at + i * bits / 8, size_t((some * bits + 7) / 8));
    for (int64_t j = 0; j < some; ++j) to[i + j] = uint8_t((word >> (j * bits)) & mask);
  }
}

// What one code's planes are: widths and lowest bits, the first plane first.
struct Planes {
  int32_t count;
  int32_t width[2], lowest[2];
};

Planes planes_of(int32_t code) {
  switch (code) {
    case CODE_1: return {1, {1, 0}, {0, 0}};
    case CODE_2: return {1, {2, 0}, {0, 0}};
    case CODE_3: return {2, {2, 1}, {0, 2}};
    case CODE_5: return {2, {4, 1}, {0, 4}};
    case CODE_6: return {2, {4, 2}, {0, 4}};
    case CODE_8: return {1, {8, 0}, {0, 0}};
    default: return {1, {4, 0}, {0, 0}};
  }
}

constexpr int64_t VECTOR = 64, VECTORS = 8;

// One plane of a unit: WIDTH bits of codes [8][64] from `lowest` on, 8 / WIDTH vectors in 64 bytes.
template <int WIDTH>
uint8_t* write_plane(const uint8_t* vectors, int lowest, uint8_t* out) {
  constexpr int HELD = 8 / WIDTH;
  constexpr uint8_t MASK = uint8_t((1 << WIDTH) - 1);
  for (int64_t vector = 0; vector < VECTORS; vector += HELD, out += VECTOR) {
    uint8_t joined[VECTOR] = {};
    for (int j = 0; j < HELD; ++j) {
      const uint8_t* from = vectors + (vector + j) * VECTOR;
      for (int64_t i = 0; i < VECTOR; ++i) joined[i] = uint8_t(joined[i] | ((from[i] >> lowest) & MASK) << (WIDTH * j));
    }
    std::memcpy(out, joined, VECTOR);
  }
  return out;
}

// All planes of a unit; returns where the next unit begins.
uint8_t* write_planes(const uint8_t* vectors, const Planes& planes, uint8_t* out) {
  for (int32_t plane = 0; plane < planes.count; ++plane) {
    const int lowest = planes.lowest[plane];
    switch (planes.width[plane]) {
      case 1: out = write_plane<1>(vectors, lowest, out); break;
      case 2: out = write_plane<2>(vectors, lowest, out); break;
      case 4: out = write_plane<4>(vectors, lowest, out); break;
      default: out = write_plane<8>(vectors, lowest, out);
    }
  }
  return out;
}

// The values of one record of a panel, 16 out features side by side; rows beyond n are zero.
uint8_t* write_field(const PackedField& field, int64_t n, int64_t first_row, int64_t start, int64_t size, uint8_t* out) {
  if (field.values == nullptr) return out;
  const int64_t count = (size + field.step - 1) / field.step, rows = std::min(PANEL, n - first_row);
  for (int64_t j = 0; j < count; ++j, out += PANEL * field.bytes) {
    for (int64_t lane = 0; lane < rows; ++lane) {
      const int64_t value = (first_row + lane) * field.row_values + start / field.step + j;
      std::memcpy(out + lane * field.bytes, field.values + value * field.bytes, size_t(field.bytes));
    }
    std::memset(out + rows * field.bytes, 0, size_t((PANEL - rows) * field.bytes));
  }
  return out;
}

void pack_block_panel(const CodeStream& codes, const PackedField* fields, int32_t field_count, const Planes& planes, int64_t panel, uint8_t* out) {
  constexpr int64_t RECORD = RECORD_UNITS * BLOCK_UNIT;
  const int64_t first_row = panel * PANEL, rows = std::min(PANEL, codes.n - first_row);
  for (int64_t start = 0; start < codes.k; start += RECORD) {
    const int64_t size = std::min(RECORD, codes.k - start);
    for (int32_t i = 0; i < field_count; ++i) out = write_field(fields[i], codes.n, first_row, start, size, out);
    for (int64_t unit = 0; unit < size; unit += BLOCK_UNIT) {
      uint8_t vectors[VECTORS * VECTOR] = {}, row[BLOCK_UNIT];
      for (int64_t lane = 0; lane < rows; ++lane) {
        read_codes(codes, first_row + lane, start + unit, BLOCK_UNIT, row);
        for (int64_t v = 0; v < VECTORS; ++v) std::memcpy(vectors + v * VECTOR + 4 * lane, row + 4 * v, 4);
      }
      out = write_planes(vectors, planes, out);
    }
  }
}

// A unit of 8 in features and 16 out features: codes [16][width] from column `at` on.
uint8_t* write_unit(const uint8_t* codes, int64_t width, int64_t at, int32_t layout, uint8_t* out) {
  if (layout == PAIRS_OF_NIBBLES) {
    for (int64_t lane = 0; lane < PANEL; ++lane) {
      const uint8_t* from = codes + lane * width + at;
      for (int64_t i = 0; i < UNIT / 2; ++i) *out++ = uint8_t(from[2 * i] | from[2 * i + 1] << 4);
    }
  } else if (layout == QUADS) {
    for (int64_t quad = 0; quad < UNIT; quad += 4) {
      for (int64_t lane = 0; lane < PANEL; ++lane, out += 4) std::memcpy(out, codes + lane * width + at + quad, 4);
    }
  } else {
    for (int64_t column = 0; column < UNIT; ++column) {
      for (int64_t lane = 0; lane < PANEL; ++lane) *out++ = codes[lane * width + at + column];
    }
  }
  return out;
}

// One panel's codes as bytes [16][width]: row, gather, padding, flipped bits.
void place_panel(const CodeStream& codes, const int32_t* gather, int64_t width, uint8_t fill, uint8_t flip, int64_t panel, uint8_t* line, uint8_t* placed) {
  const int64_t first_row = panel * PANEL, rows = std::min(PANEL, codes.n - first_row);
  for (int64_t lane = 0; lane < PANEL; ++lane) {
    uint8_t* to = placed + lane * width;
    if (lane >= rows) {
      std::memset(to, fill ^ flip, size_t(width));
      continue;
    }
    uint8_t* plain = gather != nullptr ? line : to;
    read_codes(codes, first_row + lane, 0, codes.k, plain);
    if (gather == nullptr) {
      std::memset(to + codes.k, fill, size_t(width - codes.k));
    } else {
      for (int64_t i = 0; i < width; ++i) to[i] = gather[i] < 0 ? fill : line[gather[i]];
    }
    if (flip != 0) {
      for (int64_t i = 0; i < width; ++i) to[i] ^= flip;
    }
  }
}

}  // namespace
}  // namespace bitgrain

using namespace bitgrain;

// Panels of block_kernels.hpp, [panels][bg_block_panel_bytes]: `fields` are scales, minima, points, sub and sub minima, those that
// there are.  k is a multiple of 32.
EXPORT int32_t bg_pack_blocks(const CodeStream* codes, const PackedField* fields, int32_t field_count, const int32_t* format, int64_t panel_bytes, uint8_t* out,
                              int32_t threads) {
  const Planes planes = planes_of(format[0]);
  const int64_t panels = (codes->n + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (panels > 1)
  for (int64_t panel = 0; panel < panels; ++panel) pack_block_panel(*codes, fields, field_count, planes, panel, out + panel * panel_bytes);
  return PACK_OK;
}

// Codes of kernels.hpp, [panels][units][bytes per unit]; gather [units * 8] or null: the in feature of each place, -1: `fill`.
// Every byte is exclusive-ored with `flip` before two of them become one.
EXPORT int32_t bg_pack_units(const CodeStream* codes, const int32_t* gather, int64_t units, int32_t layout, int32_t fill, int32_t flip, uint8_t* out, int32_t threads) {
  const int64_t panels = (codes->n + PANEL - 1) / PANEL, width = units * UNIT, unit_bytes = layout == PAIRS_OF_NIBBLES ? UNIT * PANEL / 2 : UNIT * PANEL;
  const std::unique_ptr<uint8_t[]> memory(new (std::nothrow) uint8_t[size_t(threads) * size_t(PANEL * width + codes->k)]);
  if (!memory) return PACK_OUT_OF_MEMORY;
#pragma omp parallel num_threads(threads) if (panels > 1)
  {
    uint8_t* placed = memory.get() + omp_get_thread_num() * (PANEL * width + codes->k);
#pragma omp for schedule(dynamic)
    for (int64_t panel = 0; panel < panels; ++panel) {
      place_panel(*codes, gather, width, uint8_t(fill), uint8_t(flip), panel, placed + PANEL * width, placed);
      uint8_t* to = out + panel * units * unit_bytes;
      for (int64_t unit = 0; unit < units; ++unit) to = write_unit(placed, width, unit * UNIT, layout, to);
    }
  }
  return PACK_OK;
}
