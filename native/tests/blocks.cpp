// bg_block_linear over every format, packed by bg_pack_blocks.
#include "weights.hpp"

namespace {

void check(Random& random, const BlockFormat& format, int64_t rows, int64_t n, int64_t k, int32_t precision) {
  if (left_out()) return;
  const int32_t dtype = int32_t(random.below(3));
  const BlockWeights weight(random, format, n, k);
  const Numbers x = activations(random, dtype, rows, k), bias = random_numbers(random, dtype, n);
  const bool biased = random.coin();
  const std::string what = "blocks code " + std::to_string(format.code) + " sub " + std::to_string(format.sub) + " minimum " + std::to_string(format.minimum) +
                           " M=" + std::to_string(rows) + " N=" + std::to_string(n) + " K=" + std::to_string(k) + " dtype " + std::to_string(dtype) + " precision " + std::to_string(precision);
  const Numbers y = same_in_any_part(rows, n, dtype, what, [&](int64_t from, int64_t count, int32_t threads, Numbers& to) {
    return native::bg_block_linear(x.from(from * k), dtype, count, k, &weight.format.code, weight.panels.data(), weight.factor.or_null(weight.has_factor), n,
                                   bias.or_null(biased), to.data(), precision, threads);
  });
  // minima and codes cancel each other; numbers this small are zeros
  const double loss = precision == EXACT_INPUT ? (format.minimum == NO_MINIMUM ? LOSS : 8 * LOSS) : 0.2, lost = precision == EXACT_INPUT ? 0x1p-127 : 1e-34;
  std::vector<double> w(static_cast<size_t>(k)), codes(w), most(static_cast<size_t>(rows));
  for (int64_t i = 0; i < rows * k; ++i) most[size_t(i / k)] = std::max(most[size_t(i / k)], std::fabs(x[i]));
  for (int64_t out = 0; out < n; ++out) {
    for (int64_t i = 0; i < k; ++i) w[size_t(i)] = weight.value(out, i);
    for (int64_t m = 0; m < rows; ++m) {
      double sum = biased ? bias[out] : 0.0, size = std::fabs(sum);
      for (int64_t i = 0; i < k; ++i) {
        sum += w[size_t(i)] * x[m * k + i];
        size += std::fabs(w[size_t(i)]) * (std::fabs(x[m * k + i]) + most[size_t(m)] / 4 + lost / loss);
      }
      expect_near(y[m * n + out], sum, size, dtype, loss, what);
    }
  }
}

}  // namespace

void test_blocks() {
  const int64_t shapes[][3] = {{0, 16, 32}, {1, 1, 32}, {1, 70, 288}, {2, 17, 256}, {5, 40, 544}, {9, 15, 64}, {33, 33, 96}, {65, 5, 320}};
  Random random(3);
  int64_t turn = 0;
  for (const BlockFormat& format : block_formats()) {
    for (const auto& shape : shapes) {
      if (shape[0] < 3 || ++turn % 3 == 0) check(random, format, shape[0], shape[1], shape[2], turn % 4 ? EXACT_INPUT : INT8_INPUT);
    }
  }
}
