// bg_experts and bg_experts_product: the three families of weights, experts without rows, rows without experts.
#include <memory>

#include "weights.hpp"

namespace {

// One side's matrices, and a product with one of them in double.
struct Matrices {
  int32_t family;
  int64_t n, k;
  std::vector<std::unique_ptr<GroupedWeight>> grouped;
  std::vector<std::unique_ptr<IntegerWeight>> integer;
  std::vector<std::unique_ptr<BlockWeights>> blocks;
  std::vector<ExpertMatrix> table;
  std::vector<Numbers> bias;
  ExpertSide side;

  Matrices(Random& random, int32_t family, int64_t count, int64_t n, int64_t k, int32_t dtype, bool biased) : family(family), n(n), k(k) {
    const int32_t kind = int32_t(random.below(8));
    const std::vector<BlockFormat> formats = block_formats();
    const BlockFormat format = formats[size_t(random.below(int64_t(formats.size())))];
    side = {n, k, family, kind, 0, 0, 1, PER_TOKEN, 127.0, 0};
    const uint64_t alike = random.next();  // experts of a layer share what is decided per layer
    for (int64_t e = 0; e < count; ++e) {
      bias.push_back(random_numbers(random, dtype, n));
      const void* added = biased ? bias.back().data() : nullptr;
      if (family == GROUPED) {
        Random same(alike);
        grouped.push_back(std::make_unique<GroupedWeight>(same, kind, n, k, false));
        GroupedWeight& weight = *grouped.back();
        for (int64_t i = 0; i < weight.second.size(); ++i) weight.second[i] = float(random.uniform());
        side.scale_dtype = weight.scale_dtype;
        side.zero_is_float = weight.zero_is_float;
        table.push_back(weight.matrix(added));
      } else if (family == INTEGER) {
        integer.push_back(std::make_unique<IntegerWeight>(random, n, k));
        const IntegerWeight& weight = *integer.back();
        table.push_back({reinterpret_cast<const uint8_t*>(weight.codes.data()), weight.scale.data(), nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
                         weight.sums.data(), added, weight.quads, 0, 0, 1, 1, 0});
      } else {
        blocks.push_back(std::make_unique<BlockWeights>(random, format, n, k));
        const BlockWeights& weight = *blocks.back();
        table.push_back({weight.panels.data(), &weight.format, nullptr, weight.factor.or_null(weight.has_factor), nullptr, nullptr, nullptr, nullptr, nullptr, added, 0, 0,
                         0, 1, 1, 0});
      }
    }
  }

  // [n] of one row; sizes as expect_near wants them
  void multiply(int64_t expert, const std::vector<double>& x, bool biased, std::vector<double>& y, std::vector<double>& size) const {
    y.assign(size_t(n), 0);
    size.assign(size_t(n), 0);
    std::vector<float> narrow(x.begin(), x.end());
    double most = 0;
    float low = 0, high = 0;
    for (const float value : narrow) low = std::min(low, value), high = std::max(high, value), most = std::max(most, std::fabs(double(value)));
    QuantizedRow codes = {};
    if (family == INTEGER) codes = quantized({1, PER_TOKEN, 1, 127, 0}, narrow, low, high, false);
    for (int64_t out = 0; out < n; ++out) {
      double &sum = y[size_t(out)], &terms = size[size_t(out)];
      if (family == GROUPED) grouped[size_t(expert)]->multiply(x.data(), out, sum, terms);
      for (int64_t i = 0; i < k && family == INTEGER; ++i) {
        const double term = codes.codes[size_t(i)] * double(codes.scale) * integer[size_t(expert)]->code(out, i) * integer[size_t(expert)]->scale[out];
        sum += term;
        terms += std::fabs(term);
      }
      for (int64_t i = 0; i < k && family == BLOCKS; ++i) {
        const double w = blocks[size_t(expert)]->value(out, i);
        sum += w * x[size_t(i)];
        terms += 8 * std::fabs(w) * (std::fabs(x[size_t(i)]) + most / 4);
      }
      if (biased) sum += bias[size_t(expert)][out], terms += std::fabs(bias[size_t(expert)][out]);
    }
  }
};

std::vector<double> row_of(const Numbers& x, int64_t row, int64_t k) {
  std::vector<double> values;
  for (int64_t i = 0; i < k; ++i) values.push_back(x[row * k + i]);
  return values;
}

void check_product(Random& random, int32_t family, int64_t n, int64_t k) {
  const int64_t count = 4, ends[count] = {3, 3, 20, 21};  // the second has no rows
  const int32_t dtype = int32_t(random.below(3)), y_dtype = int32_t(random.below(3));
  const bool biased = random.coin(), scaled = family == GROUPED && random.coin();
  const Matrices matrices(random, family, count, n, k, family == INTEGER ? dtype : y_dtype, biased);
  const int32_t out_dtype = family == INTEGER ? dtype : y_dtype;
  const Numbers x = random_numbers(random, dtype, ends[count - 1] * k);
  const Buffer<float> row_scale = random_floats(random, ends[count - 1]);
  const std::string what = "product of experts, family " + std::to_string(family) + " kind " + std::to_string(matrices.side.code_kind);
  Numbers y(out_dtype, ends[count - 1] * n);
  for (int32_t threads = 3; threads >= 1; --threads) {
    Numbers other(out_dtype, ends[count - 1] * n);
    expect(native::bg_experts_product(matrices.table.data(), &matrices.side, count, x.data(), dtype, ends, scaled ? row_scale.data() : nullptr, other.data(), out_dtype,
                                      threads) == 0, what);
    for (int64_t i = 0; i < y.size(); ++i) {
      if (threads == 3) y.set(i, other[i]);
      expect(y.same_bits(i, other, i), what + ": other bits");
    }
  }
  std::vector<double> want, size;
  for (int64_t m = 0, e = 0; m < ends[count - 1]; ++m) {
    while (m >= ends[e]) ++e;
    matrices.multiply(e, row_of(x, m, k), false, want, size);
    for (int64_t out = 0; out < n; ++out) {
      const double factor = scaled ? row_scale[m] : 1.0, added = biased ? matrices.bias[size_t(e)][out] : 0.0;
      expect_near(y[m * n + out], want[size_t(out)] * factor + added, size[size_t(out)] * std::fabs(factor) + std::fabs(added), out_dtype, LOSS, what);
    }
  }
}

double joined(int32_t join, double gate, double up) {
  switch (join) {
    case SILU: return gate / (1 + std::exp(-gate)) * up;
    case GELU: return 0.5 * gate * (1 + std::erf(gate * std::sqrt(0.5))) * up;
    case GELU_TANH: return 0.5 * gate * (1 + std::tanh(std::sqrt(2 / M_PI) * (gate + 0.044715 * gate * gate * gate))) * up;
    case RELU: return std::max(gate, 0.0) * up;
    default: {
      const double g = std::min(gate, 7.0), u = std::min(std::max(up, -7.0), 7.0);
      return (u + 1) * g / (1 + std::exp(-1.702 * g));
    }
  }
}

void check_experts(Random& random, int32_t family, int64_t rows, int64_t hidden, int64_t inner, int32_t join) {
  if (left_out()) return;
  const int64_t count = 5, per_token = 2;
  const int32_t dtype = int32_t(random.below(3)), weight_dtype = random.coin() ? dtype : int32_t(F32);
  const bool biased = random.coin();
  const Matrices first(random, family, count, 2 * inner, hidden, dtype, biased), second(random, family, count, hidden, inner, dtype, biased);
  const ExpertSide sides[2] = {first.side, second.side};
  const Numbers x = random_numbers(random, dtype, rows * hidden, 0.1), weight = random_numbers(random, weight_dtype, rows * per_token);
  Buffer<int64_t> chosen(rows * per_token);
  for (int64_t i = 0; i < chosen.size(); ++i) chosen[i] = i / per_token == 2 ? -1 : random.between(-1, count - 2);  // the last one has no rows
  const std::string what = "experts of family " + std::to_string(family) + " join " + std::to_string(join) + " M=" + std::to_string(rows) + " dtype " + std::to_string(dtype);
  const Numbers y = same_in_any_part(rows, hidden, dtype, what, [&](int64_t from, int64_t some, int32_t threads, Numbers& to) {
    return native::bg_experts(first.table.data(), second.table.data(), sides, count, inner, x.from(from * hidden), dtype, some, weight.from(from * per_token), weight_dtype,
                              chosen.data() + from * per_token, per_token, join, 1.702f, 7.0f, to.data(), threads);
  });
  std::vector<double> both, size, out, h(static_cast<size_t>(inner));
  for (int64_t m = 0; m < rows; ++m) {
    std::vector<double> want(static_cast<size_t>(hidden)), terms(want);
    double most = 0;  // of what is rounded to the dtype between the products
    for (int64_t p = 0; p < per_token; ++p) {
      const int64_t e = chosen[m * per_token + p];
      if (e < 0) continue;
      first.multiply(e, row_of(x, m, hidden), biased, both, size);
      for (int64_t i = 0; i < inner; ++i) h[size_t(i)] = joined(join, both[size_t(i)], both[size_t(inner + i)]);
      for (const std::vector<double>& values : {both, h})
        for (const double value : values) most = std::max(most, std::fabs(value));
      second.multiply(e, h, biased, out, size);
      for (int64_t i = 0; i < hidden; ++i) {
        want[size_t(i)] += out[size_t(i)] * weight[m * per_token + p];
        terms[size_t(i)] += size[size_t(i)] * std::fabs(weight[m * per_token + p]);
      }
    }
    // h is rounded to the dtype between the products, and may take another code where it is quantized
    const double loss = family == INTEGER ? 0.05 : dtype == F32 ? 1e-4 : 4 * rounding(dtype);
    if (most > 0.9 * largest(dtype)) continue;
    for (int64_t i = 0; i < hidden; ++i) expect_near(y[m * hidden + i], want[size_t(i)], terms[size_t(i)], dtype, loss, what);
  }
  if (rows == 0) return;
  Numbers unused(dtype, rows * hidden);
  chosen[0] = count;
  expect(native::bg_experts(first.table.data(), second.table.data(), sides, count, inner, x.data(), dtype, rows, weight.data(), weight_dtype, chosen.data(), per_token, join,
                            1.702f, 7.0f, unused.data(), 2) == 4, what + ": takes an expert that is not there");
}

}  // namespace

void test_experts() {
  Random random(8);
  for (int32_t family = GROUPED; family <= BLOCKS; ++family) {
    for (int turn = 0; turn < (family == GROUPED ? 16 : 5); ++turn) {
      const int64_t step = family == BLOCKS ? 32 : 1, rows[] = {0, 1, 3, 9, 40};
      check_product(random, family, random.between(1, 50), step * random.between(1, step == 1 ? 130 : 9));
      check_experts(random, family, rows[turn % 5], step * random.between(1, step == 1 ? 70 : 3), step * random.between(1, step == 1 ? 40 : 2), int32_t(turn % 5));
    }
  }
}
