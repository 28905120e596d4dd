// bg_hadamard against the product with the whole matrix.
#include "checks.hpp"

namespace {

void check(Random& random, int64_t blocks, int64_t order, int64_t width, int32_t dtype) {
  if (left_out()) return;
  const int64_t size = order * width;
  const Numbers x = random_numbers(random, dtype, blocks * size);
  Buffer<float> base(order > 1 ? order * order : 0);
  for (int64_t i = 0; i < base.size(); ++i) base[i] = random.coin() ? 1.0f : -1.0f;
  const float factor = 0.125f;
  const std::string what = "hadamard of " + std::to_string(order) + " x " + std::to_string(width) + " dtype " + std::to_string(dtype);
  const Numbers y = same_in_any_part(blocks, size, dtype, what, [&](int64_t from, int64_t count, int32_t threads, Numbers& to) {
    const HadamardArgs args = {x.from(from * size), to.data(), dtype, count, size, base.or_null(order > 1), order, factor, threads, nullptr};
    return native::bg_hadamard(&args);
  });
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t out = 0; out < size; ++out) {
      double sum = 0, terms = 0;
      for (int64_t in = 0; in < size; ++in) {
        const double sign = (__builtin_popcountll(uint64_t((out % width) & (in % width))) & 1 ? -1 : 1) * (order > 1 ? base[out / width * order + in / width] : 1.0f);
        sum += sign * x[block * size + in] * factor;
        terms += std::fabs(x[block * size + in] * factor);
      }
      expect_near(y[block * size + out], sum, terms, dtype, LOSS, what);
    }
  }
}

}  // namespace

void test_hadamard() {
  Random random(6);
  for (int32_t dtype = F32; dtype <= BF16; ++dtype) {
    for (const int64_t width : {1, 2, 4, 8, 16, 32, 64, 256}) {
      check(random, random.between(1, 5), 1, width, dtype);
      check(random, random.between(0, 3), random.coin() ? 3 : 5, width, dtype);
    }
    check(random, 70, 1, 512, dtype);  // enough to be shared among threads
    check(random, 2, 12, 4, dtype);
    check(random, 2, 28, 16, dtype);
  }
}
