// bg_norm, bg_rotate, bg_gate and bg_attend against their formulas.
#include <algorithm>

#include "checks.hpp"

namespace {

// Rows `stride` apart, of `size` numbers each, the last of which ends where the memory ends.
Numbers apart(Random& random, int32_t dtype, int64_t rows, int64_t size, int64_t stride, double factor) {
  return random_numbers(random, dtype, rows ? (rows - 1) * stride + size : 0, factor);
}

double bits_of(int32_t dtype) { return rounding(dtype) * 4; }  // several roundings

void check_norm(Random& random, int64_t rows, int64_t size, int32_t dtype) {
  const int64_t stride = size + random.between(0, 9);
  const int32_t wide = random.coin(), weight_dtype = wide && random.coin() ? int32_t(F32) : dtype;
  const Numbers x = apart(random, dtype, rows, size, stride, 3), weight = random_numbers(random, weight_dtype, size), bias = random_numbers(random, dtype, size);
  const bool biased = random.coin();
  const std::string what = "norm of " + std::to_string(rows) + " x " + std::to_string(size) + " dtype " + std::to_string(dtype);
  const Numbers y = same_in_any_part(rows, size, dtype, what, [&](int64_t from, int64_t count, int32_t threads, Numbers& to) {
    return native::bg_norm(x.from(from * stride), count, size, stride, weight.data(), weight_dtype, bias.or_null(biased), 1e-5f, wide, dtype, to.data(), threads);
  });
  for (int64_t m = 0; m < rows; ++m) {
    double squares = 0;
    for (int64_t i = 0; i < size; ++i) squares += x[m * stride + i] * x[m * stride + i];
    for (int64_t i = 0; i < size; ++i) {
      const double product = x[m * stride + i] / std::sqrt(squares / double(size) + 1e-5) * weight[i], added = biased ? bias[i] : 0.0;
      expect_near(y[m * size + i], product + added, std::fabs(product) + std::fabs(added), dtype, bits_of(dtype), what);
    }
  }
}

void check_rotate(Random& random, int64_t rows, int64_t heads, int64_t size, int64_t turned, int32_t dtype, bool interleaved) {
  const int64_t stride = heads * size + random.between(0, 5), half = turned / 2;
  const Numbers x = apart(random, dtype, rows, heads * size, stride, 3), cosine = random_numbers(random, dtype, rows * turned), sine = random_numbers(random, dtype, rows * turned);
  const std::string what = "rotation of " + std::to_string(rows) + " x " + std::to_string(heads) + " x " + std::to_string(size);
  const Numbers y = same_in_any_part(rows, heads * size, dtype, what, [&](int64_t from, int64_t count, int32_t threads, Numbers& to) {
    return native::bg_rotate(x.from(from * stride), count, heads, size, stride, cosine.from(from * turned), sine.from(from * turned), turned, interleaved, dtype, to.data(), threads);
  });
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < size; ++i) {
        const int64_t at = m * stride + h * size, second = interleaved ? i & 1 : i >= half, partner = interleaved ? i ^ 1 : second ? i - half : i + half;
        const double own = x[at + i];
        double want = own, terms = std::fabs(own);
        if (i < turned) {
          const double other = x[at + partner] * sine[m * turned + i];
          want = own * cosine[m * turned + i] + (second ? other : -other);
          terms = std::fabs(own * cosine[m * turned + i]) + std::fabs(other);
        }
        expect_near(y[(m * heads + h) * size + i], want, terms, dtype, bits_of(dtype), what);
      }
    }
  }
}

void check_gate(Random& random, int64_t rows, int64_t size, int32_t dtype) {
  const int64_t stride = 2 * size;
  Numbers both = random_numbers(random, dtype, rows * stride, 6);
  const double rare[] = {-200, 200, -88.5, 88.5, 0, 1e-6, HUGE_VAL, -HUGE_VAL};
  for (int64_t i = 0; i < std::min<int64_t>(both.size(), 8); ++i) both.set(i, rare[i]);
  if (both.size() > 9) both.set(9, std::nan(""));
  const std::string what = "gate of " + std::to_string(rows) + " x " + std::to_string(size);
  const Numbers y = same_in_any_part(rows, size, dtype, what, [&](int64_t from, int64_t count, int32_t threads, Numbers& to) {
    // up ends where the memory ends
    return native::bg_gate(both.from(from * stride), both.from(from * stride + size), count, size, stride, dtype, to.data(), threads);
  });
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t i = 0; i < size; ++i) {
      const double gate = both[m * stride + i], up = both[m * stride + size + i], product = gate / (1 + std::exp(-gate)) * up;
      if (gate < -87) continue;  // the exponential ends there
      if (!std::isfinite(product)) expect(!std::isfinite(y[m * size + i]), what + ": finite");
      else expect_near(y[m * size + i], product, std::fabs(product) + (dtype == F16 ? 0x1p-25 * std::fabs(up) / bits_of(dtype) : 0), dtype, bits_of(dtype), what);
    }
  }
}

struct Attention {
  int64_t rows, total, heads, groups, size, value_size, window;
  bool sinks;
  float cap;
};

double score(const Attention& a, const Numbers& q, const Numbers& keys, int64_t q_stride, int64_t key_stride, int64_t m, int64_t h, int64_t t) {
  const int64_t group = h / (a.heads / a.groups);
  double sum = 0;
  for (int64_t i = 0; i < a.size; ++i) sum += q[m * q_stride + h * a.size + i] * keys[t * key_stride + group * a.size + i];
  sum *= 0.3f;
  return a.cap > 0 ? a.cap * std::tanh(sum / a.cap) : sum;
}

void check_attention(Random& random, const Attention& a, int32_t dtype) {
  const int64_t q_stride = a.heads * a.size + 3, key_stride = a.groups * a.size + 5, value_stride = a.groups * a.value_size + 1, width = a.heads * a.value_size;
  const Numbers q = apart(random, dtype, a.rows, a.heads * a.size, q_stride, 1), keys = apart(random, dtype, a.total, a.groups * a.size, key_stride, 1),
                values = apart(random, dtype, a.total, a.groups * a.value_size, value_stride, 1);
  const Buffer<float> sinks = random_floats(random, a.heads);
  const std::string what = "attention of " + std::to_string(a.rows) + " of " + std::to_string(a.total);
  const Numbers y = same_in_any_part(a.rows, width, dtype, what, [&](int64_t from, int64_t count, int32_t threads, Numbers& to) {
    const int64_t total = a.total - (a.rows - from - count);  // the rows are the last of the tokens
    return native::bg_attend(q.from(from * q_stride), count, a.heads, a.size, q_stride, keys.data(), key_stride, values.data(), value_stride, total, a.groups, a.value_size,
                             a.window, sinks.or_null(a.sinks), 0.3f, a.cap, dtype, to.data(), threads);
  });
  for (int64_t m = 0; m < a.rows; ++m) {
    const int64_t seen = a.total - a.rows + m + 1, start = a.window > 0 ? std::max<int64_t>(0, seen - a.window) : 0;
    for (int64_t h = 0; h < a.heads; ++h) {
      std::vector<double> weight;
      double sum = a.sinks ? std::exp(double(sinks[h])) : 0;
      for (int64_t t = start; t < seen; ++t) weight.push_back(std::exp(score(a, q, keys, q_stride, key_stride, m, h, t)));
      for (const double w : weight) sum += w;
      for (int64_t i = 0; i < a.value_size; ++i) {
        double want = 0, terms = 0;
        for (int64_t t = start; t < seen; ++t) {
          const double term = weight[size_t(t - start)] / sum * values[t * value_stride + h / (a.heads / a.groups) * a.value_size + i];
          want += term;
          terms += std::fabs(term);
        }
        expect_near(y[m * width + h * a.value_size + i], want, terms, dtype, std::max(bits_of(dtype), 2e-5), what);
      }
    }
  }
}

}  // namespace

void test_steps() {
  Random random(7);
  const Attention attentions[] = {{1, 1, 4, 4, 16, 16, 0, false, 0}, {1, 37, 8, 2, 64, 48, 0, true, 0}, {3, 40, 6, 3, 24, 17, 5, false, 3}, {5, 9, 4, 1, 33, 1, 0, true, 2},
                                  {0, 7, 2, 2, 8, 8, 0, false, 0},   {4, 300, 4, 2, 40, 40, 100, true, 0}};
  for (int32_t dtype = F32; dtype <= BF16; ++dtype) {
    const int64_t norms[][2] = {{0, 16}, {1, 1}, {3, 255}, {2, 257}, {130, 100}, {150, 511}};
    for (const auto& shape : norms) check_norm(random, shape[0], shape[1], dtype);
    for (const bool interleaved : {false, true}) {
      const int64_t turns[][4] = {{1, 1, 64, 64}, {7, 5, 33, 32}, {3, 3, 6, 6}, {2, 2, 1024, 512}, {0, 1, 8, 8}, {70, 4, 256, 64}};
      for (const auto& shape : turns) check_rotate(random, shape[0], shape[1], shape[2], shape[3], dtype, interleaved);
    }
    const int64_t gates[][2] = {{0, 8}, {1, 1}, {5, 129}, {3, 257}, {130, 513}};
    for (const auto& shape : gates) check_gate(random, shape[0], shape[1], dtype);
    for (const Attention& attention : attentions) check_attention(random, attention, dtype);
  }
}
