// bg_quantize, whose codes are the definition's, and bg_integer.
#include "weights.hpp"

namespace {

struct Rows {
  std::vector<QuantizedRow> of;
};

Rows quantized_rows(const Quantization& how, const Numbers& x, int64_t rows, int64_t k) {
  Rows all;
  float low = 0, high = 0;
  bool nan = false;
  std::vector<float> row(static_cast<size_t>(k));
  for (const bool last : {false, true}) {
    for (int64_t m = 0; m < rows; ++m) {
      if (how.dynamic != PER_TENSOR) low = high = 0, nan = false;
      for (int64_t i = 0; i < k; ++i) {
        const float value = row[size_t(i)] = float(x[m * k + i]);
        low = std::min(low, value);
        high = std::max(high, value);
        nan = nan || std::isnan(value);
      }
      if (last) all.of.push_back(quantized(how, row, low, high, nan));
    }
  }
  return all;
}

std::string name_of(const Quantization& how, int64_t rows, int64_t n, int64_t k) {
  return "rules " + std::to_string(how.rules) + " dynamic " + std::to_string(how.dynamic) + " M=" + std::to_string(rows) + " N=" + std::to_string(n) + " K=" + std::to_string(k);
}

void check_codes(Random& random, const Quantization& how, int64_t rows, int64_t k, int32_t threads) {
  const Numbers x = activations(random, F32, how.dynamic == PER_TENSOR ? std::min<int64_t>(rows, 2) : rows, k);
  rows = k ? x.size() / k : rows;
  const int64_t quads = (k + 7) / 8 * 2;
  Buffer<uint8_t> codes(rows * quads * 4);
  Buffer<float> scale(rows);
  Buffer<int32_t> zero(rows);
  const std::string what = "quantize " + name_of(how, rows, 0, k);
  expect(native::bg_quantize(static_cast<const float*>(x.data()), rows, k, quads, how.rules, how.dynamic, how.static_scale, how.static_zero, how.top, codes.data(),
                             scale.data(), zero.data(), threads) == 0, what);
  const Rows want = quantized_rows(how, x, rows, k);
  for (int64_t m = 0; m < rows; ++m) {
    const QuantizedRow& row = want.of[size_t(m)];
    expect(scale[m] == row.scale || (std::isnan(scale[m]) && std::isnan(row.scale)), what + ": scale");
    expect(zero[m] == row.zero + 128, what + ": zero point");
    for (int64_t i = 0; i < quads * 4; ++i) expect(codes[m * quads * 4 + i] == (i < k ? row.codes[size_t(i)] : 0) + 128, what + ": code");
  }
}

void check_product(Random& random, const Quantization& how, int64_t rows, int64_t n, int64_t k) {
  if (left_out()) return;
  const int32_t dtype = int32_t(random.below(3));
  const IntegerWeight weight(random, n, k);
  const Numbers x = activations(random, dtype, how.dynamic == PER_TENSOR ? std::min<int64_t>(rows, 2) : rows, k), bias = random_numbers(random, dtype, n);
  rows = x.size() / k;
  const bool biased = random.coin();
  const std::string what = "integer " + name_of(how, rows, n, k) + " dtype " + std::to_string(dtype);
  const auto run = [&](int64_t from, int64_t count, int32_t threads, Numbers& to) {
    return native::bg_integer(x.from(from * k), dtype, count, k, how.rules, how.dynamic, how.static_scale, how.static_zero, how.top, weight.codes.data(),
                              weight.scale.data(), weight.sums.data(), weight.quads, n, bias.or_null(biased), to.data(), threads);
  };
  Numbers y(dtype, rows * n);
  if (how.dynamic == PER_TENSOR) run(0, rows, 2, y);
  const Numbers whole = how.dynamic == PER_TENSOR ? std::move(y) : same_in_any_part(rows, n, dtype, what, run);
  const Rows want = quantized_rows(how, x, rows, k);
  for (int64_t m = 0; m < rows; ++m) {
    const QuantizedRow& row = want.of[size_t(m)];
    for (int64_t out = 0; out < n; ++out) {
      double sum = 0;
      for (int64_t i = 0; i < k; ++i) sum += double(row.codes[size_t(i)] - row.zero) * weight.code(out, i);
      const double value = sum * double(row.scale) * weight.scale[out], added = biased ? bias[out] : 0.0;
      if (std::isnan(row.scale)) expect(std::isnan(whole[m * n + out]), what + ": not a NaN");
      else expect_near(whole[m * n + out], value + added, std::fabs(value) + std::fabs(added), dtype, 1e-6, what);
    }
  }
}

}  // namespace

void test_integer() {
  Random random(2);
  const int64_t shapes[][3] = {{0, 16, 8}, {1, 1, 1}, {2, 33, 100}, {3, 17, 7}, {5, 40, 129}, {8, 16, 64}, {9, 5, 33}, {17, 31, 200}, {33, 18, 9}, {70, 3, 15}};
  for (int32_t rules = 0; rules < 4; ++rules) {
    for (int32_t dynamic = STATIC; dynamic <= PER_TENSOR; ++dynamic) {
      const Quantization how = {rules, dynamic, 0.02f, rules & 2 ? 127.0f : 127.5f, rules & 1 ? 0 : 11};
      for (const auto& shape : shapes) {
        check_codes(random, how, shape[0], shape[2], 2);
        check_product(random, how, shape[0], shape[1], shape[2]);
      }
    }
  }
}
