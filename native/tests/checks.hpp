// What the tests share: random numbers, memory without slack, values of each dtype, and the comparison.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "interface.hpp"
#include "scalar.hpp"

using namespace bitgrain;

struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15u + 0x1234567u) {}
  uint32_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return uint32_t(state >> 32);
  }
  int64_t below(int64_t end) { return int64_t(next() % uint64_t(end)); }
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
  bool coin() { return next() >> 31; }
  double uniform() { return double(next()) / 4294967296.0 * 2 - 1; }  // -1 to 1
  template <class T, size_t N>
  T of(const T (&values)[N]) {
    return values[below(int64_t(N))];
  }
};

// Elements that end where the allocation ends, and begin at an address that is a multiple of their own size only.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0) : count_(count), memory_(static_cast<char*>(std::malloc(size_t(count + 1) * sizeof(T)))) {
    std::memset(memory_, 0, size_t(count + 1) * sizeof(T));
  }
  Buffer(Buffer&& other) noexcept : count_(other.count_), memory_(other.memory_) { other.memory_ = nullptr; }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(count_, other.count_);
    std::swap(memory_, other.memory_);
    return *this;
  }
  ~Buffer() { std::free(memory_); }
  T* data() { return reinterpret_cast<T*>(memory_) + 1; }
  const T* data() const { return reinterpret_cast<const T*>(memory_) + 1; }
  T& operator[](int64_t i) { return data()[i]; }
  const T& operator[](int64_t i) const { return data()[i]; }
  int64_t size() const { return count_; }
  const T* or_null(bool there) const { return there ? data() : nullptr; }
  Buffer copy() const {
    Buffer other(count_);
    if (count_) std::memcpy(other.data(), data(), size_t(count_) * sizeof(T));
    return other;
  }

 private:
  int64_t count_;
  char* memory_;
};

inline Buffer<uint8_t> random_bytes(Random& random, int64_t count) {
  Buffer<uint8_t> bytes(count);
  for (int64_t i = 0; i < count; ++i) bytes[i] = uint8_t(random.next());
  return bytes;
}

inline double half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 31) return fraction ? std::nan("") : sign * HUGE_VAL;
  return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
}

inline double float8_value(uint8_t bits) {  // E4M3 without a NaN
  const int exponent = bits >> 3 & 15, fraction = bits & 7;
  return (bits & 0x80 ? -1 : 1) * (exponent ? std::ldexp(8 + fraction, exponent - 10) : std::ldexp(fraction, -9));
}

// Numbers of one of the dtypes of kernels.hpp.
class Numbers {
 public:
  Numbers(int32_t dtype, int64_t count) : dtype(dtype), wide_(dtype == F32 ? count : 0), narrow_(dtype == F32 ? 0 : count) {}
  void* data() { return dtype == F32 ? static_cast<void*>(wide_.data()) : narrow_.data(); }
  const void* data() const { return const_cast<Numbers*>(this)->data(); }
  const void* or_null(bool there) const { return there ? data() : nullptr; }
  const void* from(int64_t i) const { return dtype == F32 ? static_cast<const void*>(wide_.data() + i) : narrow_.data() + i; }
  int64_t size() const { return dtype == F32 ? wide_.size() : narrow_.size(); }
  void set(int64_t i, double value) { store_scalar(data(), i, dtype, float(value)); }
  double operator[](int64_t i) const {
    if (dtype == F32) return wide_[i];
    if (dtype == F16) return half_value(narrow_[i]);
    float value;
    const uint32_t bits = uint32_t(narrow_[i]) << 16;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  bool same_bits(int64_t i, const Numbers& other, int64_t j) const {
    return dtype == F32 ? std::memcmp(&wide_[i], &other.wide_[j], 4) == 0 : narrow_[i] == other.narrow_[j];
  }
  int32_t dtype;

 private:
  Buffer<float> wide_;
  Buffer<uint16_t> narrow_;
};

inline Numbers random_numbers(Random& random, int32_t dtype, int64_t count, double factor = 1) {
  Numbers numbers(dtype, count);
  for (int64_t i = 0; i < count; ++i) numbers.set(i, random.uniform() * factor);
  return numbers;
}

inline Buffer<float> random_floats(Random& random, int64_t count, double factor = 1) {
  Buffer<float> numbers(count);
  for (int64_t i = 0; i < count; ++i) numbers[i] = float(random.uniform() * factor);
  return numbers;
}

// x [rows, k] whose rows 1 to 5 hold what is rare: subnormal numbers, a NaN, infinities, huge ones, zeros.
inline Numbers activations(Random& random, int32_t dtype, int64_t rows, int64_t k) {
  Numbers x = random_numbers(random, dtype, rows * k);
  const auto row = [&](int64_t m, auto value) {
    for (int64_t i = 0; m < rows && i < k; ++i) x.set(m * k + i, value(i));
  };
  const double tiny = dtype == F16 ? 5e-7 : 1e-39, huge = dtype == F16 ? 6e4 : 3e38, infinite = HUGE_VAL;
  const int64_t place = random.below(k);
  row(1, [&](int64_t) { return tiny * random.uniform(); });
  row(2, [&](int64_t i) { return i == place ? std::nan("") : random.uniform(); });
  row(3, [&](int64_t i) { return i == place ? -infinite : i == 0 ? infinite : random.uniform(); });
  row(4, [&](int64_t) { return huge * random.uniform(); });
  row(5, [&](int64_t) { return 0.0; });
  return x;
}

inline int64_t failures = 0, printed = 0;

// Counts a failure, and prints the first ones of a test.
inline void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  if (printed++ < 10) std::fprintf(stderr, "FAILED [%s] %s\n", native::bg_instruction_set(), what.c_str());
}

inline double rounding(int32_t dtype) { return dtype == F32 ? 0x1p-23 : dtype == F16 ? 0x1p-10 : 0x1p-7; }
inline double largest(int32_t dtype) { return dtype == F16 ? 65504.0 : 3.3e38; }

// One output against the definition in double.  `size`: the sum of the magnitudes of its terms, of which float32 sums lose `loss`.
inline void expect_near(double got, double want, double size, int32_t dtype, double loss, const std::string& what) {
  if (!(size < 1e36)) return expect(!std::isfinite(want) ? !std::isfinite(got) : true, what + ": finite");  // float32 may overflow on the way
  const double allowed = rounding(dtype) * std::fabs(want) + loss * size + (dtype == F16 ? 0x1p-24 : 1e-36);
  if (std::isinf(got) && std::fabs(want) + allowed >= largest(dtype)) return expect((got > 0) == (want > 0) || allowed > std::fabs(want), what + ": the other infinity");
  if (std::fabs(got - want) <= allowed) return;
  char words[160];
  std::snprintf(words, sizeof words, ": %.9g instead of %.9g, allowed %.3g", got, want, allowed);
  expect(false, what + words);
}

// A thread sanitizer takes long, and races do not depend on values: it is given every fourth case, and no rows alone.
#ifdef __SANITIZE_THREAD__
constexpr bool FEW_CASES = true;
#else
constexpr bool FEW_CASES = false;
#endif
inline bool left_out() {
  static int64_t turn = 0;
  return FEW_CASES && turn++ % 4 != 0;
}

constexpr double LOSS = 4e-6;  // of float32 sums of a few hundred terms

// Calls make(rows from, rows, threads, y) for all rows with each number of threads, and for each row alone: all have the same bits.
template <class Make>
Numbers same_in_any_part(int64_t rows, int64_t width, int32_t dtype, const std::string& what, Make make) {
  Numbers whole(dtype, rows * width);
  expect(make(0, rows, 1, whole) == 0, what + ": status");
  for (int32_t threads = 2; threads <= 3; ++threads) {
    Numbers other(dtype, rows * width);
    make(0, rows, threads, other);
    bool same = true;
    for (int64_t i = 0; i < rows * width; ++i) same = same && whole.same_bits(i, other, i);
    expect(same, what + ": other bits with " + std::to_string(threads) + " threads");
  }
  for (int64_t row = 0; row < rows && !FEW_CASES; row += rows > 20 ? 7 : 1) {
    Numbers alone(dtype, width);
    make(row, 1, 1, alone);
    bool same = true;
    for (int64_t i = 0; i < width; ++i) same = same && whole.same_bits(row * width + i, alone, i);
    expect(same, what + ": other bits for row " + std::to_string(row) + " alone");
  }
  return whole;
}

void test_first_use();
void test_grouped();
void test_integer();
void test_blocks();
void test_packing();
void test_codebooks();
void test_hadamard();
void test_steps();
void test_experts();
void test_dense();
void test_decode_step();
void test_peaks();
