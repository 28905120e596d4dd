// bg_pack_units: every width of codes, layout, gather, padding and flipped bits.  bg_pack_blocks runs in blocks.cpp.
#include "weights.hpp"

namespace {

constexpr int32_t NIBBLES = 0, QUADS = 1, COLUMNS = 2;

// The byte, or the nibble, of a place in the packed units.
int packed_code(const Buffer<uint8_t>& packed, int32_t layout, int64_t units, int64_t row, int64_t place) {
  const int64_t lane = row % PANEL, j = place % UNIT, unit = row / PANEL * units + place / UNIT;
  if (layout == NIBBLES) return packed[unit * 64 + lane * 4 + j / 2] >> (4 * (j & 1)) & 15;
  if (layout == QUADS) return packed[unit * 128 + 64 * (j / 4) + 4 * lane + j % 4];
  return packed[unit * 128 + 16 * j + lane];
}

void check(Random& random, int32_t bits, int32_t layout, int64_t n, int64_t k, bool gathered, int32_t threads) {
  const int64_t units = (k + UNIT - 1) / UNIT + (gathered ? 1 : 0), row_bytes = (k * bits + 7) / 8;
  const Buffer<uint8_t> stream = random_bytes(random, n * row_bytes);
  Buffer<int32_t> gather(gathered ? units * UNIT : 0);
  for (int64_t i = 0; i < gather.size(); ++i) gather[i] = int32_t(random.between(-1, k - 1));
  const int32_t fill = 3, flip = layout == NIBBLES ? 8 : 0x80;
  Buffer<uint8_t> packed((n + PANEL - 1) / PANEL * units * (layout == NIBBLES ? 64 : 128));
  const CodeStream codes = {stream.data(), row_bytes, n, k, bits};
  const std::string what = "units of " + std::to_string(bits) + " bits, layout " + std::to_string(layout) + " N=" + std::to_string(n) + " K=" + std::to_string(k);
  expect(native::bg_pack_units(&codes, gather.or_null(gathered), units, layout, fill, flip, packed.data(), threads) == 0, what);
  for (int64_t row = 0; row < (n + PANEL - 1) / PANEL * PANEL; ++row) {
    for (int64_t place = 0; place < units * UNIT; ++place) {
      const int64_t from = gathered ? gather[place] : place < k ? place : -1;
      int code = fill;
      if (row < n && from >= 0) {
        code = 0;
        for (int bit = 0; bit < bits; ++bit) code |= (stream[row * row_bytes + (from * bits + bit) / 8] >> ((from * bits + bit) % 8) & 1) << bit;
      }
      expect(packed_code(packed, layout, units, row, place) == (code ^ flip), what);
    }
  }
}

}  // namespace

void test_packing() {
  const int64_t shapes[][2] = {{1, 1}, {15, 7}, {16, 8}, {17, 33}, {40, 100}, {33, 129}};
  Random random(4);
  for (int32_t bits = 1; bits <= 8; ++bits) {
    for (int32_t layout = NIBBLES; layout <= COLUMNS; ++layout) {
      if (layout == NIBBLES && bits > 4) continue;  // two codes share a byte
      for (const auto& shape : shapes) check(random, bits, layout, shape[0], shape[1], random.coin(), int32_t(random.between(1, 3)));
    }
  }
}
