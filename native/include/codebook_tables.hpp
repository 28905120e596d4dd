// Decoders of codes that name whole vectors or single values of a table, over the vector types `V` (eight floats) and `I`
// (eight unsigned numbers of 32 bits) of the including file.  Internal linkage.
#pragma once
#include "codebook_run.hpp"

namespace bitgrain {
namespace {

// Where eight numbers of up to 25 bits stand in a stream of bytes: four words from `low` on, four from `high` on.
struct Places {
  int64_t low, high;
  alignas(32) uint8_t bytes[32];  // byte of each half that becomes byte j of word i
  alignas(32) uint32_t shift[8];

  // lane i begins at bit positions[i]; `window` is 0 for little-endian streams, else the bits of a number of a big-endian one
  void set(const int64_t (&positions)[8], int window) {
    int64_t base[2];
    for (int half = 0; half < 2; ++half) {
      base[half] = positions[4 * half] / 8;
      for (int i = 1; i < 4; ++i) base[half] = positions[4 * half + i] / 8 < base[half] ? positions[4 * half + i] / 8 : base[half];
    }
    low = base[0];
    high = base[1];
    for (int i = 0; i < 8; ++i) {
      const int64_t byte = positions[i] / 8 - base[i / 4], bit = positions[i] % 8;
      for (int j = 0; j < 4; ++j) bytes[4 * i + (window ? 3 - j : j)] = uint8_t(byte + j);
      shift[i] = uint32_t(window ? 32 - window - bit : bit);
    }
  }
};

inline int64_t code_at(const void* codes, int64_t i, bool bytes) {
  return bytes ? static_cast<const uint8_t*>(codes)[i] : static_cast<const uint16_t*>(codes)[i];
}

template <int DTYPE>
struct Additive {
  static constexpr int ROWS = 4;
  const AdditiveCodes& c;
  int64_t n, k;

  template <class Sink>
  inline void decode(int64_t row, int64_t unit, int64_t end, Sink& sink) const {
    if (c.g % CODE_LANES != 0) return ragged(row, unit, end, sink);
    if (c.code_bytes == 1) return by_count<uint8_t>(row, unit, end, sink);
    by_count<uint16_t>(row, unit, end, sink);
  }

 private:
  template <class Code, class Sink>
  inline void by_count(int64_t row, int64_t unit, int64_t end, Sink& sink) const {
    if (c.count == 1) return whole<Code, 1>(row, unit, end, sink);
    if (c.count == 2) return whole<Code, 2>(row, unit, end, sink);
    if (c.count == 4) return whole<Code, 4>(row, unit, end, sink);
    whole<Code, 0>(row, unit, end, sink);
  }

  // entries of whole units
  template <class Code, int COUNT, class Sink>
  inline void whole(int64_t row, int64_t unit, int64_t end, Sink& sink) const {
    const int64_t per_code = c.g / CODE_LANES, entry = c.h * c.g, book = entry << c.bits, count = COUNT ? COUNT : c.count, blocks = k / c.g;
    const unsigned mask = (1u << c.bits) - 1;
    const void* const books = c.books;
    const Code* codes[ROWS];
    int64_t within[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      const int64_t at = row + r < n ? row + r : n - 1;
      codes[r] = static_cast<const Code*>(c.codes) + at / c.h * blocks * count;
      within[r] = at % c.h * c.g;
    }
    int64_t block = unit / per_code, part = unit % per_code;
    for (; unit < end; ++unit) {
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const Code* code = codes[r] + block * count;
        const int64_t place = within[r] + part * CODE_LANES;
        V w = V::template load_as<DTYPE>(books, int64_t(code[0] & mask) * entry + place);
#pragma GCC unroll 4
        for (int64_t i = 1; i < count; ++i) w = w + V::template load_as<DTYPE>(books, i * book + int64_t(code[i] & mask) * entry + place);
        sink.put(r, unit, w);
      }
      if (++part == per_code) part = 0, ++block;
    }
  }

  // entries that end inside units: a chunk of each row in scratch first
  template <class Sink>
  inline void ragged(int64_t row, int64_t unit, int64_t end, Sink& sink) const {
    const int64_t entry = c.h * c.g, book = entry << c.bits, blocks = k / c.g, first = unit * CODE_LANES;
    const int64_t last = end * CODE_LANES < k ? end * CODE_LANES : k;
    const unsigned mask = (1u << c.bits) - 1;
    alignas(32) float values[CODE_CHUNK_UNITS * CODE_LANES];
    for (int r = 0; r < ROWS; ++r) {
      const int64_t at = row + r < n ? row + r : n - 1, codes = at / c.h * blocks * c.count, within = at % c.h * c.g;
      for (int64_t block = first / c.g; block * c.g < last; ++block) {
        const int64_t from = block * c.g < first ? first : block * c.g, to = (block + 1) * c.g < last ? (block + 1) * c.g : last;
        for (int64_t i = 0; i < c.count; ++i) {
          const int64_t index = code_at(c.codes, codes + block * c.count + i, c.code_bytes == 1) & mask;
          const int64_t place = i * book + index * entry + within - block * c.g;
          for (int64_t j = from; j < to; ++j) {
            const float value = load_scalar(c.books, place + j, DTYPE);
            values[j - first] = i == 0 ? value : values[j - first] + value;
          }
        }
      }
      for (int64_t j = last; j < end * CODE_LANES; ++j) values[j - first] = 0.0f;
      for (int64_t u = unit; u < end; ++u) sink.put(r, u, V::load(values + u * CODE_LANES - first));
    }
  }
};

inline void run_additive(const CodeProduct& p, const AdditiveCodes& c) {
  if (c.book_dtype == F32) {
    const Additive<F32> decoder = {c, p.n, p.k};
    return multiply_codes(p, &decoder, &p.units, 1);
  }
  if (c.book_dtype == F16) {
    const Additive<F16> decoder = {c, p.n, p.k};
    return multiply_codes(p, &decoder, &p.units, 1);
  }
  const Additive<BF16> decoder = {c, p.n, p.k};
  multiply_codes(p, &decoder, &p.units, 1);
}

struct Lattice {
  static constexpr int ROWS = 4;
  const LatticeCodes& c;
  int64_t n, units;

  template <class Sink>
  inline void decode(int64_t row, int64_t unit, int64_t end, Sink& sink) const {
    if (c.residual_bytes == 0) return points<0>(row, unit, end, sink);
    if (c.residual_bytes == 1) return points<1>(row, unit, end, sink);
    points<2>(row, unit, end, sink);
  }

 private:
  static inline __attribute__((always_inline)) V point(const LatticeCodes& c, unsigned code) {
    const V magnitude = V::load(c.magnitudes + (code >> 8) * CODE_LANES);
    return magnitude.flip(I::load(c.signs + (code & 255) * CODE_LANES)) + V::set(c.shifts[code & 255]);
  }

  template <int RESIDUAL, class Sink>
  inline void points(int64_t row, int64_t unit, int64_t end, Sink& sink) const {
    const LatticeCodes c = this->c;  // a copy: what a sink stores might be the original, for all that the compiler knows
    int64_t base[ROWS];
    for (int r = 0; r < ROWS; ++r) base[r] = (row + r < n ? row + r : n - 1) * units;
    const V factor = V::set(c.residual_factor);
    for (; unit < end; ++unit) {
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        V w = point(c, c.codes[base[r] + unit]);
        if (RESIDUAL == 1) w = w + V::load(c.second + static_cast<const uint8_t*>(c.residual)[base[r] + unit] * CODE_LANES);
        if (RESIDUAL == 2) w = V::fma(point(c, static_cast<const uint16_t*>(c.residual)[base[r] + unit]), factor, w);
        sink.put(r, unit, w);
      }
    }
  }
};

inline void run_lattice(const CodeProduct& p, const LatticeCodes& c) {
  const Lattice decoder = {c, p.n, p.units};
  multiply_codes(p, &decoder, &p.units, 1);
}

struct Lookup {
  static constexpr int ROWS = 4;
  const LookupCodes& c;
  int64_t n;
  Places places;
  V::Nibbles shared;  // of the one table, where codes have four bits

  Lookup(const LookupCodes& c, int64_t n) : c(c), n(n) {
    if (c.bits == 4 && c.table_stride == 0) shared.set(c.table);
    int64_t positions[8];
    for (int i = 0; i < 8; ++i) positions[i] = i * c.bits;
    places.set(positions, 0);
  }

  template <class Sink>
  inline void decode(int64_t row, int64_t unit, int64_t end, Sink& sink) const {
    if (c.bits == 4) return c.table_stride == 0 ? nibbles<true>(row, unit, end, sink) : nibbles<false>(row, unit, end, sink);
    if (c.bits < 4) return entries<true>(row, unit, end, sink);
    entries<false>(row, unit, end, sink);
  }

 private:
  // four units at a time; the rest of a group singly
  template <bool SHARED, class Sink>
  inline void nibbles(int64_t row, int64_t unit, int64_t end, Sink& sink) const {
    const uint8_t* packed[ROWS];
    int64_t scales[ROWS];
    const auto table = [&](int r) { return c.table + (row + r < n ? row + r : n - 1) * c.table_stride; };
    V::Nibbles own[SHARED ? 1 : ROWS], kept = shared;
    for (int r = 0; r < ROWS; ++r) {
      const int64_t at = row + r < n ? row + r : n - 1;
      packed[r] = c.packed + at * c.row_bytes;
      scales[r] = at * c.groups;
      if (!SHARED) own[SHARED ? 0 : r].set(table(r));
    }
    while (unit < end) {
      const int64_t group = unit / c.units_per_group, group_end = (group + 1) * c.units_per_group, last = group_end < end ? group_end : end;
      V scale[ROWS];
      for (int r = 0; r < ROWS; ++r) scale[r] = V::set(load_scalar(c.scale, scales[r] + group, c.scale_dtype));
      for (; unit + 4 <= last; unit += 4) {
        __builtin_prefetch(packed[0] + (unit / 4 % ROWS + ROWS) * c.row_bytes + unit * 4);  // of the next rows, one line in turn
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
          V values[4];
          (SHARED ? kept : own[SHARED ? 0 : r]).look_up(packed[r] + unit * 4, values);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) sink.put(r, unit + i, values[i] * scale[r]);
        }
      }
      for (; unit < last; ++unit) {
        for (int r = 0; r < ROWS; ++r) {
          alignas(32) float values[CODE_LANES];
          for (int i = 0; i < CODE_LANES; ++i) values[i] = table(r)[packed[r][unit * 4 + i / 2] >> (4 * (i & 1)) & 15];
          sink.put(r, unit, V::load(values) * scale[r]);
        }
      }
    }
  }

  template <bool SMALL, class Sink>
  inline void entries(int64_t row, int64_t unit, int64_t end, Sink& sink) const {
    const I mask = I::set((1u << c.bits) - 1);
    const int64_t bits = c.bits;
    alignas(32) int32_t starts[8];  // of codes in one word: eight of up to four bits
    for (int i = 0; i < 8; ++i) starts[i] = int32_t(i * bits);
    const I shifts = I::load(starts);
    const uint8_t* packed[ROWS];
    const float* tables[ROWS];
    alignas(32) float small[ROWS][16];
    int64_t scales[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      const int64_t at = row + r < n ? row + r : n - 1;
      packed[r] = c.packed + at * c.row_bytes;
      tables[r] = c.table + at * c.table_stride;
      scales[r] = at * c.groups;
      if (SMALL) {
        for (int i = 0; i < 16; ++i) small[r][i] = tables[r][i & ((1 << c.bits) - 1)];
      }
    }
    while (unit < end) {
      const int64_t group = unit / c.units_per_group, group_end = (group + 1) * c.units_per_group, last = group_end < end ? group_end : end;
      V scale[ROWS];
      for (int r = 0; r < ROWS; ++r) scale[r] = V::set(load_scalar(c.scale, scales[r] + group, c.scale_dtype));
      for (; unit < last; ++unit) {
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
          const uint8_t* const from = packed[r] + unit * bits;
          const I code = (SMALL ? I::read_word(from, shifts) : I::read(from, places)) & mask;
          sink.put(r, unit, (SMALL ? V::look_up16(code, small[r]) : V::gather(tables[r], code)) * scale[r]);
        }
      }
    }
  }
};

inline void run_lookup(const CodeProduct& p, const LookupCodes& c) {
  const Lookup decoder(c, p.n);
  multiply_codes(p, &decoder, &p.units, 1);
}

template <int DTYPE>
struct Vectors {
  static constexpr int ROWS = 8;
  VectorCodes c;
  int64_t n;

  template <class Sink>
  inline void decode(int64_t row, int64_t unit, int64_t end, Sink& sink) const {
    if (c.v % CODE_LANES == 0) return c.residual.codes ? transposed<true>(row, unit, end, sink) : transposed<false>(row, unit, end, sink);
    by_row(row, unit, end, sink);
  }

 private:
  // entry of a column, zero codes beyond the columns
  static inline __attribute__((always_inline)) int64_t entry(const VectorBook& book, int64_t base, int64_t t) {
    const int64_t code = code_at(book.codes, base + t, book.code_bytes == 1);
    return book.start ? code + book.start[t] : code;
  }

  // eight rows of eight columns at a time, from vectors of whole units
  template <bool RESIDUAL, class Sink>
  inline void transposed(int64_t row, int64_t unit, int64_t end, Sink& sink) const {
    const VectorCodes c = this->c;  // a copy, as above
    const int64_t base = row / c.v * c.columns, within = row % c.v;
    for (; unit < end; ++unit) {
      const int64_t first = unit * CODE_LANES, count = c.columns - first;
      V column[8];
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        const int64_t t = j < count ? first + j : c.columns - 1;
        column[j] = V::template load_as<DTYPE>(c.main.book, entry(c.main, base, t) * c.v + within);
        if (RESIDUAL) column[j] = column[j] + V::template load_as<DTYPE>(c.residual.book, entry(c.residual, base, t) * c.v + within);
      }
      V::transpose(column);
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r) sink.put(r, unit, column[r]);
    }
  }

  inline I indices(const VectorBook& book, int64_t base, int64_t unit) const {
    const int64_t first = unit * CODE_LANES, count = c.columns - first;
    alignas(32) uint32_t codes[8] = {};
    I index = I::set(0);
    if (count >= CODE_LANES) {
      index = book.code_bytes == 1 ? I::load_bytes(static_cast<const uint8_t*>(book.codes) + base + first) : I::load_words(static_cast<const uint16_t*>(book.codes) + base + first);
    } else {
      for (int64_t j = 0; j < count; ++j) codes[j] = uint32_t(code_at(book.codes, base + first + j, book.code_bytes == 1));
      index = I::load(reinterpret_cast<const int32_t*>(codes));
    }
    return book.start ? index + I::load(book.start + first) : index;
  }

  // vectors of any length: eight columns of one row at a time
  template <class Sink>
  inline void by_row(int64_t row, int64_t unit, int64_t end, Sink& sink) const {
    const I length = I::set(uint32_t(c.v));
    for (int r = 0; r < ROWS; ++r) {
      const int64_t at = row + r < n ? row + r : n - 1, base = at / c.v * c.columns;
      const I within = I::set(uint32_t(at % c.v));
      for (int64_t u = unit; u < end; ++u) {
        V w = V::template gather_as<DTYPE>(c.main.book, indices(c.main, base, u) * length + within);
        if (c.residual.codes != nullptr) w = w + V::template gather_as<DTYPE>(c.residual.book, indices(c.residual, base, u) * length + within);
        sink.put(r, u, w);
      }
    }
  }
};

template <int DTYPE>
inline void run_vectors(const CodeProduct& p, const VectorCodes* sections, int32_t count) {
  const Vectors<DTYPE> decoders[2] = {{sections[0], p.n}, {sections[count - 1], p.n}};
  const int64_t units[2] = {sections[0].units, sections[count - 1].units};
  multiply_codes(p, decoders, units, count);
}

inline void run_vector(const CodeProduct& p, const VectorCodes* sections, int32_t count) {
  if (sections[0].dtype == F32) return run_vectors<F32>(p, sections, count);
  if (sections[0].dtype == F16) return run_vectors<F16>(p, sections, count);
  run_vectors<BF16>(p, sections, count);
}

}  // namespace
}  // namespace bitgrain
