// bg_grouped and bg_grouped_table: every kind of code, type of x, of scales and of outputs, with what may be left out.
#include "weights.hpp"

namespace {

void check(Random& random, int32_t kind, int64_t rows, int64_t n, int64_t k) {
  if (left_out()) return;
  const int32_t x_dtype = int32_t(random.below(3)), y_dtype = random.coin() ? x_dtype : int32_t(random.below(3));
  const GroupedWeight weight(random, kind, n, k, random.below(3) == 0);
  const Numbers x = activations(random, x_dtype, rows, k), bias = random_numbers(random, y_dtype, n);
  const Buffer<float> row_scale = random_floats(random, rows);
  const bool biased = random.coin(), scaled = random.below(3) == 0, plain = kind != TABLE4 && !weight.has_second;
  const std::string what = "grouped kind " + std::to_string(kind) + " M=" + std::to_string(rows) + " N=" + std::to_string(n) + " K=" + std::to_string(k) + " x " +
                           std::to_string(x_dtype) + " y " + std::to_string(y_dtype);
  const Numbers y = same_in_any_part(rows, n, y_dtype, what, [&](int64_t from, int64_t count, int32_t threads, Numbers& to) {
    const float* scales = scaled ? row_scale.data() + from : nullptr;
    if (plain)
      return native::bg_grouped(x.from(from * k), x_dtype, count, k, weight.gather.or_null(weight.gathered), weight.codes.data(), kind, weight.scale.or_null(weight.scaled),
                                weight.scale_dtype, weight.zeros(), weight.zero_is_float, weight.zero_constant, weight.group_ends.data(), weight.groups, weight.units, n,
                                scales, bias.or_null(biased), to.data(), y_dtype, threads);
    return native::bg_grouped_table(x.from(from * k), x_dtype, count, k, weight.gather.or_null(weight.gathered), weight.codes.data(), kind,
                                    weight.scale.or_null(weight.scaled), weight.scale_dtype, weight.second.or_null(weight.has_second),
                                    weight.table.or_null(kind == TABLE4), weight.whole_table.or_null(weight.whole), weight.whole_step, weight.zeros(),
                                    weight.zero_is_float, weight.zero_constant, weight.group_ends.data(), weight.groups, weight.units, n, scales, bias.or_null(biased),
                                    to.data(), y_dtype, threads);
  });
  std::vector<double> row(static_cast<size_t>(k));
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t i = 0; i < k; ++i) row[size_t(i)] = x[m * k + i];
    for (int64_t out = 0; out < n; ++out) {
      double sum = 0, size = 0;
      weight.multiply(row.data(), out, sum, size);
      const double factor = scaled ? row_scale[m] : 1.0, added = biased ? bias[out] : 0.0;
      expect_near(y[m * n + out], sum * factor + added, size * std::fabs(factor) + std::fabs(added), y_dtype, LOSS, what);
    }
  }
}

}  // namespace

void test_grouped() {
  const int64_t shapes[][3] = {{0, 16, 64},  {1, 1, 1},    {1, 33, 100}, {2, 15, 7},  {3, 17, 129}, {5, 40, 33}, {7, 16, 8},
                               {8, 7, 1},    {9, 100, 15}, {17, 31, 64}, {33, 5, 300}, {65, 17, 9}, {1, 50, 520}, {4, 9, 1100}};
  Random random(1);
  for (int32_t kind = NIBBLE; kind <= DENSE_F32; ++kind) {
    for (const auto& shape : shapes) {
      for (int again = 0; again < (kind == NIBBLE || kind == TABLE4 ? 3 : 1); ++again) check(random, kind, shape[0], shape[1], shape[2]);
    }
  }
}
