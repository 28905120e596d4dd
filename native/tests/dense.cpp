// bg_dense for every type of weights and of rows.
#include "checks.hpp"

namespace {

void check(Random& random, int64_t rows, int64_t n, int64_t k, int32_t weight_dtype, int32_t dtype) {
  const Numbers x = activations(random, dtype, rows, k), weight = random_numbers(random, weight_dtype, n * k), bias = random_numbers(random, dtype, n);
  const bool biased = random.coin();
  const std::string what = "dense M=" + std::to_string(rows) + " N=" + std::to_string(n) + " K=" + std::to_string(k) + " weight " + std::to_string(weight_dtype) +
                           " dtype " + std::to_string(dtype);
  Numbers y = same_in_any_part(rows, n, dtype, what, [&](int64_t from, int64_t count, int32_t threads, Numbers& to) {
    return native::bg_dense(x.from(from * k), count, k, weight.data(), weight_dtype, n, bias.or_null(biased), to.data(), dtype, threads);
  });
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t out = 0; out < n; ++out) {
      double sum = biased ? bias[out] : 0.0, size = std::fabs(sum);
      for (int64_t i = 0; i < k; ++i) {
        const double term = x[m * k + i] * weight[out * k + i];
        sum += term;
        size += std::fabs(term);
      }
      expect_near(y[m * n + out], sum, size, dtype, LOSS, what);
    }
  }
  // every instruction set is given the same cases
  static std::vector<Numbers> first;
  static size_t turn = 0;
  static std::string set;
  if (set != native::bg_instruction_set()) turn = 0, set = native::bg_instruction_set();
  if (turn == first.size() && set == "portable") first.push_back(std::move(y));
  else {
    bool same = first[turn].size() == y.size();
    for (int64_t i = 0; same && i < y.size(); ++i) same = y.same_bits(i, first[turn], i) || (std::isnan(y[i]) && std::isnan(first[turn][i]));
    // products of 16 bits are exact; others are fused with their sums where the processor has instructions for it
    expect(same || weight_dtype == F32 || dtype == F32, what + ": other bits than the portable set");
  }
  ++turn;
}

}  // namespace

void test_dense() {
  const int64_t shapes[][3] = {{0, 16, 32}, {1, 1, 1}, {1, 33, 100}, {2, 70, 17}, {3, 5, 16}, {5, 40, 129}, {9, 35, 31}, {4, 66, 300}, {7, 37, 530}, {50, 18, 40}};
  Random random(9);
  for (int32_t weight_dtype = F32; weight_dtype <= BF16; ++weight_dtype) {
    for (int32_t dtype = F32; dtype <= BF16; ++dtype) {
      for (const auto& shape : shapes) check(random, shape[0], shape[1], shape[2], weight_dtype, dtype);
    }
  }
}
