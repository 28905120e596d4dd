// bg_additive, bg_lattice, bg_trellis, bg_vector and bg_lookup against their weights, decoded one by one.
#include <functional>

#include "weights.hpp"

namespace {

using Decoded = std::function<double(int64_t row, int64_t place)>;  // the weight at a place of x'
using Call = std::function<int32_t(const CodeProduct&)>;

// The product with everything that all codebooks share.  `columns`: places of x' that have codes; `gathered`: x' is x in another order.
void check_product(Random& random, const std::string& kind, int64_t rows, int64_t n, int64_t k, int64_t units, bool gathered, int64_t columns, const Decoded& decoded,
                   const Call& call) {
  if (left_out()) return;
  const int32_t x_dtype = int32_t(random.below(3)), y_dtype = int32_t(random.below(3)), scale_dtype = int32_t(random.below(3));
  const Numbers x = activations(random, x_dtype, rows, k), bias = random_numbers(random, y_dtype, n);
  const bool biased = random.coin(), scaled = random.coin(), column_scaled = random.coin(), offset = random.coin();
  const int64_t scale_rows = random.coin() ? 1 : 3;
  const Numbers scale = random_numbers(random, scale_dtype, (n + scale_rows - 1) / scale_rows);
  const Buffer<float> column_scale = random_floats(random, k), column_offset = random_floats(random, k);
  Buffer<int32_t> gather(gathered ? units * UNIT : 0);
  for (int64_t i = 0; i < gather.size(); ++i) gather[i] = i < columns ? int32_t(random.below(k)) : -1;
  const std::string what = kind + " M=" + std::to_string(rows) + " N=" + std::to_string(n) + " K=" + std::to_string(k);
  const Numbers y = same_in_any_part(rows, n, y_dtype, what, [&](int64_t from, int64_t count, int32_t threads, Numbers& to) {
    const CodeProduct product = {x.from(from * k), x_dtype, count, k, n, units, gather.or_null(gathered), column_scale.or_null(column_scaled),
                                 column_offset.or_null(offset), scale.or_null(scaled), scale_dtype, scale_rows, 0.5f, bias.or_null(biased), to.data(), y_dtype,
                                 threads, nullptr};
    return call(product);
  });
  for (int64_t out = 0; out < n; ++out) {
    std::vector<double> w(static_cast<size_t>(columns));
    for (int64_t i = 0; i < columns; ++i) w[size_t(i)] = decoded(out, i);
    for (int64_t m = 0; m < rows; ++m) {
      double sum = 0, size = 0;
      for (int64_t i = 0; i < columns; ++i) {
        const int64_t from = gathered ? gather[i] : i;
        const double term = w[size_t(i)] * x[m * k + from] * (column_scaled ? column_scale[from] : 1.0f);
        sum += term;
        size += std::fabs(term);
      }
      const double factor = (scaled ? scale[out / scale_rows] : 1.0) * 0.5;
      sum *= factor;
      size *= std::fabs(factor);
      for (int64_t i = 0; offset && i < k; ++i) {
        sum += x[m * k + i] * column_offset[i];
        size += std::fabs(x[m * k + i] * column_offset[i]);
      }
      if (biased) sum += bias[out], size += std::fabs(bias[out]);
      // a row with a NaN or an infinity may stand at places that no weight reads
      if (std::isfinite(sum)) expect_near(y[m * n + out], sum, size, y_dtype, LOSS, what);
      else expect(!std::isfinite(y[m * n + out]), what + ": finite");
    }
  }
}

int64_t code_of(const Buffer<uint8_t>& codes, int64_t i, int32_t bytes) {
  if (bytes == 1) return codes[i];
  return codes[2 * i] | codes[2 * i + 1] << 8;
}

// Codes below `end`, of one or two bytes, at an address that is a multiple of two.
struct CodeList {
  Buffer<uint8_t> narrow;
  Buffer<uint16_t> wide;
  int32_t bytes;

  CodeList(Random& random, int64_t count, int64_t end, int32_t bytes) : narrow(bytes == 1 ? count : 0), wide(bytes == 2 ? count : 0), bytes(bytes) {
    for (int64_t i = 0; i < narrow.size(); ++i) narrow[i] = uint8_t(random.below(end));
    for (int64_t i = 0; i < wide.size(); ++i) wide[i] = uint16_t(random.below(end));
  }
  const void* data() const { return bytes == 1 ? static_cast<const void*>(narrow.data()) : wide.data(); }
  int64_t operator[](int64_t i) const { return bytes == 1 ? narrow[i] : wide[i]; }
};

void check_additive(Random& random, int64_t rows, int64_t count, int32_t bits, int64_t h, int64_t g, int64_t n, int64_t k) {
  const int32_t dtype = int32_t(random.below(3));
  const CodeList codes(random, n / h * (k / g) * count, int64_t(1) << bits, bits <= 8 ? 1 : 2);
  const Numbers books = random_numbers(random, dtype, (count << bits) * h * g);
  const AdditiveCodes args = {codes.data(), codes.bytes, bits, count, books.data(), dtype, h, g};
  const Decoded decoded = [&](int64_t row, int64_t place) {
    double sum = 0;
    for (int64_t c = 0; c < count; ++c) {
      const int64_t code = codes[(row / h * (k / g) + place / g) * count + c];
      sum += books[(((c << bits) + code) * h + row % h) * g + place % g];
    }
    return sum;
  };
  check_product(random, "additive", rows, n, k, (k + 7) / 8, false, k, decoded, [&](const CodeProduct& p) { return native::bg_additive(&p, &args); });
}

void check_lattice(Random& random, int64_t rows, int64_t n, int64_t units, int32_t residual_bytes) {
  const CodeList codes(random, n * units, 65536, 2), residual(random, n * units, residual_bytes == 1 ? 256 : 65536, residual_bytes == 1 ? 1 : 2);
  const Buffer<float> magnitudes = random_floats(random, 2048), shifts = random_floats(random, 256), second = random_floats(random, 2048);
  Buffer<int32_t> signs(2048);
  for (int64_t i = 0; i < signs.size(); ++i) signs[i] = random.coin() ? std::numeric_limits<int32_t>::min() : 0;
  const LatticeCodes args = {static_cast<const uint16_t*>(codes.data()), residual_bytes ? residual.data() : nullptr, residual_bytes, 0.25f, magnitudes.data(), signs.data(),
                             shifts.data(), second.data()};
  const auto point = [&](int64_t code, int64_t j) {
    const double magnitude = magnitudes[(code >> 8) * 8 + j];
    return (signs[(code & 255) * 8 + j] ? -magnitude : magnitude) + shifts[code & 255];
  };
  const Decoded decoded = [&](int64_t row, int64_t place) {
    const int64_t at = row * units + place / 8, j = place % 8;
    double value = point(codes[at], j);
    if (residual_bytes == 1) value += second[residual[at] * 8 + j];
    if (residual_bytes == 2) value += 0.25 * point(residual[at], j);
    return value;
  };
  check_product(random, "lattice " + std::to_string(residual_bytes), rows, n, units * 8, units, false, units * 8, decoded,
                [&](const CodeProduct& p) { return native::bg_lattice(&p, &args); });
}

struct TrellisKind {
  int32_t bits, window, step, decoder, table_bits, fragments;
};

double byte_sum(uint32_t x) { return double((x & 255) + (x >> 8 & 255) + (x >> 16 & 255) + (x >> 24)) - 510; }

void check_trellis(Random& random, const TrellisKind& kind, int64_t rows, int64_t n, int64_t k) {
  const int64_t bytes = 32 * kind.bits;
  const Buffer<uint8_t> packed = random_bytes(random, n / 16 * (k / 16) * bytes);
  const bool tabled = kind.decoder <= QUANTLUT_SYM;
  const Buffer<float> table = random_floats(random, tabled ? int64_t(kind.step) << kind.table_bits : 0);
  const TrellisCodes args = {packed.data(), kind.bits, kind.window, kind.step, kind.decoder, kind.table_bits, kind.fragments, table.or_null(tabled)};
  const Decoded decoded = [&](int64_t row, int64_t place) -> double {
    const int64_t r = row % 16, c = place % 16;
    const int64_t value = kind.fragments ? ((r & 7) << 5 | (c >> 1 & 3) << 3 | (c >> 3) << 2 | (r >> 3) << 1 | (c & 1)) : 16 * r + c;
    const uint8_t* tile = packed.data() + (row / 16 * (k / 16) + place / 16) * bytes;
    uint32_t state = 0;
    for (int64_t i = 0; i < kind.window; ++i) {
      const int64_t bit = (value / kind.step * kind.step * kind.bits + i) % (8 * bytes);
      state = state << 1 | (tile[bit / 8] >> (7 - bit % 8) & 1);
    }
    const int64_t lane = value % kind.step;
    const uint32_t z = state * (state + 1), rows_mask = (1u << kind.table_bits) - 1;
    switch (kind.decoder) {
      case LUT: return table[state * kind.step + lane];
      case QUANTLUT: return table[(z >> (16 - kind.table_bits) & rows_mask) * uint32_t(kind.step) + lane];
      case QUANTLUT_SYM: return table[(z >> (15 - kind.table_bits) & rows_mask) * uint32_t(kind.step) + lane] * (lane == 0 && z >> 15 & 1 ? -1 : 1);
      case ONE_MAD: return byte_sum(state * 34038481u + 76625530u);
      case TWO_MAD: {
        const uint32_t x = state * 264435761u + 1013904223u;
        return byte_sum(uint32_t(uint64_t(x) * 1664525u >> 32) + x);
      }
      default: {
        const uint32_t both = ((state * 89226354u + 64248484u) & 0x8fff8fffu) ^ 0x3b603b60u;
        return half_value(float_to_half(float(half_value(uint16_t(both)) + half_value(uint16_t(both >> 16)))));
      }
    }
  };
  check_product(random, "trellis " + std::to_string(kind.decoder) + " bits " + std::to_string(kind.bits), rows, n, k, k / 8, false, k, decoded,
                [&](const CodeProduct& p) { return native::bg_trellis(&p, &args); });
}

// One section of vectors and what its books mean.
struct Section {
  int64_t v, columns, units, entries, groups, n;
  CodeList codes, residual;
  Numbers book, second;
  Buffer<int32_t> start;
  bool has_residual, grouped;

  Section(Random& random, int32_t dtype, int64_t v, int64_t columns, int64_t n, int64_t entries, int64_t groups, bool has_residual)
      : v(v), columns(columns), units((columns + 7) / 8), entries(entries), groups(groups), n(n), codes(random, (n + v - 1) / v * columns, entries, entries <= 256 ? 1 : 2),
        residual(random, has_residual ? (n + v - 1) / v * columns : 0, 16, 1), book(random_numbers(random, dtype, groups * entries * v)),
        second(random_numbers(random, dtype, has_residual ? groups * 16 * v : 0)), start(groups > 1 ? units * 8 : 0), has_residual(has_residual), grouped(groups > 1) {
    for (int64_t t = 0; t < columns && grouped; ++t) start[t] = int32_t(entries * random.below(groups));
  }
  VectorCodes args() const {
    return {{codes.data(), book.data(), codes.bytes, start.or_null(grouped)}, {has_residual ? residual.data() : nullptr, second.data(), 1, nullptr}, book.dtype, v, columns, units};
  }
  double value(int64_t row, int64_t t) const {
    if (t >= columns) return 0;
    const int64_t at = row / v * columns + t;
    const double main = book[(codes[at] + (grouped ? start[t] : 0)) * v + row % v];
    return main + (has_residual ? second[residual[at] * v + row % v] : 0.0);
  }
};

void check_vectors(Random& random, int64_t rows, int64_t n, int64_t columns, int64_t v, int64_t entries, bool two) {
  const int32_t dtype = int32_t(random.below(3));
  const Section first(random, dtype, v, columns, n, entries, random.coin() ? 3 : 1, random.coin()), other(random, dtype, v, 5, n, 16, 1, false);
  VectorCodes sections[2] = {first.args(), other.args()};
  const int64_t units = first.units + (two ? other.units : 0), places = units * 8;
  // x' has zeros beyond the columns of each section, whatever its weights are there
  const Decoded decoded = [&](int64_t row, int64_t place) { return place < first.units * 8 ? first.value(row, place) : other.value(row, place - first.units * 8); };
  const Call call = [&](const CodeProduct& p) { return native::bg_vector(&p, sections, two ? 2 : 1); };
  if (!two) return check_product(random, "vectors", rows, n, columns, units, false, columns, decoded, call);
  // the first section ends where its units end
  if (columns % 8 == 0) check_product(random, "two vectors", rows, n, columns + 5, units, true, places - 3, decoded, call);
}

void check_lookup(Random& random, int64_t rows, int64_t n, int64_t k, int32_t bits, bool own_tables) {
  const int64_t units = (k + 7) / 8, row_bytes = (k * bits + 7) / 8, stride = int64_t(1) << bits, per_group = 2, groups = (units + per_group - 1) / per_group;
  const Buffer<uint8_t> packed = random_bytes(random, n * row_bytes + 16);
  const Buffer<float> table = random_floats(random, own_tables ? n * stride : stride);
  const int32_t dtype = int32_t(random.below(3));
  const Numbers scale = random_numbers(random, dtype, n * groups);
  const LookupCodes args = {packed.data(), row_bytes, bits, table.data(), own_tables ? stride : 0, scale.data(), dtype, groups, per_group};
  const Decoded decoded = [&](int64_t row, int64_t place) {
    int64_t code = 0;
    for (int64_t bit = 0; bit < bits; ++bit) {
      const int64_t at = place * bits + bit;
      code |= int64_t(packed[row * row_bytes + at / 8] >> (at % 8) & 1) << bit;
    }
    return double(table[(own_tables ? row * stride : 0) + code]) * scale[row * groups + place / 8 / per_group];
  };
  check_product(random, "lookup of " + std::to_string(bits) + " bits", rows, n, k, units, random.below(3) == 0, k, decoded,
                [&](const CodeProduct& p) { return native::bg_lookup(&p, &args); });
}

}  // namespace

void test_codebooks() {
  Random random(5);
  const TrellisKind kinds[] = {{3, 16, 1, ONE_MAD, 0, 0},      {4, 16, 1, TWO_MAD, 0, 0},      {2, 16, 1, THREE_INST, 0, 0},   {2, 10, 2, LUT, 10, 0},
                               {3, 16, 1, QUANTLUT, 7, 0},     {2, 16, 2, QUANTLUT_SYM, 9, 1}, {3, 16, 2, QUANTLUT_SYM, 9, 1}, {4, 16, 2, QUANTLUT_SYM, 9, 1},
                               {1, 16, 1, THREE_INST, 0, 0},   {8, 16, 1, ONE_MAD, 0, 0}};
  for (const int64_t rows : {0, 1, 2, 7, 19}) {
    for (const TrellisKind& kind : kinds) check_trellis(random, kind, rows, random.coin() ? 16 : 48, random.coin() ? 16 : 80);
    for (const int64_t count : {1, 2, 3, 4}) {
      check_additive(random, rows, count, 6, 1, 8, 37, 88);
      check_additive(random, rows, count, 9, 2, 16, 10, 64);
      check_additive(random, rows, count, 5, 3, 5, 33, 35);  // entries that end inside units
    }
    for (const int32_t residual : {0, 1, 2}) check_lattice(random, rows, residual ? 5 : 35, 11, residual);
    for (const int64_t v : {1, 2, 4, 6, 8, 16}) {
      check_vectors(random, rows, 33, 13, v, 100, false);
      check_vectors(random, rows, 7, 40, v, 300, false);
      check_vectors(random, rows, 20, 24, v, 64, true);
    }
    for (int32_t bits = 1; bits <= 8; ++bits) {
      check_lookup(random, rows, 9, 100, bits, random.coin());
      check_lookup(random, rows, 34, 7, bits, random.coin());
    }
  }
  check_lattice(random, 3, 2, 300, 2);  // more than one chunk
  check_trellis(random, kinds[0], 2, 16, 1040);
}
