// The C interface: plain pointers and sizes, error codes, no dependence on any framework.
#include <cstdint>
#include <cstring>
#include <vector>

#include "scalar.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace bitgrain {
namespace {

enum Status : int32_t { OK = 0, UNKNOWN_SET = 1, UNAVAILABLE_SET = 2, OUT_OF_MEMORY = 3 };

const Kernels* chosen = nullptr;

bool has_avx2() {
#ifdef BITGRAIN_X86
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool has_avx512() {
#ifdef BITGRAIN_X86
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

const Kernels& best() {
#ifdef BITGRAIN_X86
  if (has_avx512()) return avx512_kernels();
  if (has_avx2()) return avx2_kernels();
#endif
  return portable_kernels();
}

const Kernels& active() {
  if (chosen == nullptr) chosen = &best();
  return *chosen;
}

// x as float32 [rows, units * 8], columns taken by `gather` (-1: a zero) or in order, zero beyond K
void widen(const void* x, int32_t dtype, int64_t rows, int64_t k, int64_t width, const int32_t* gather, float* out, int32_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > 7)
  for (int64_t row = 0; row < rows; ++row) {
    float* to = out + row * width;
    if (gather != nullptr) {
      for (int64_t i = 0; i < width; ++i) to[i] = gather[i] < 0 ? 0.0f : load_scalar(x, row * k + gather[i], dtype);
      continue;
    }
    if (dtype == F32) {
      std::memcpy(to, static_cast<const float*>(x) + row * k, size_t(k) * 4);
    } else if (dtype == BF16) {
      const uint16_t* from = static_cast<const uint16_t*>(x) + row * k;
      for (int64_t i = 0; i < k; ++i) to[i] = bf16_to_float(from[i]);
    } else {
      const uint16_t* from = static_cast<const uint16_t*>(x) + row * k;
      for (int64_t i = 0; i < k; ++i) to[i] = half_to_float(from[i]);
    }
    for (int64_t i = k; i < width; ++i) to[i] = 0.0f;
  }
}

void group_sums(const float* x, int64_t rows, int64_t width, const int32_t* ends, int64_t groups, float* sums, int32_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > 7)
  for (int64_t row = 0; row < rows; ++row) {
    int64_t at = 0;
    for (int64_t g = 0; g < groups; ++g) {
      float sum = 0.0f;
      for (const int64_t end = int64_t(ends[g]) * UNIT; at < end; ++at) sum += x[row * width + at];
      sums[row * groups + g] = sum;
    }
  }
}

}  // namespace
}  // namespace bitgrain

using namespace bitgrain;

EXPORT int32_t bg_abi_version() { return 1; }

EXPORT const char* bg_instruction_set() { return active().name; }

// Bit mask of what this machine has: 1 portable, 2 avx2, 4 avx512.
EXPORT int32_t bg_available_sets() { return 1 | (has_avx2() ? 2 : 0) | (has_avx512() ? 4 : 0); }

EXPORT int32_t bg_choose_set(const char* name) {
  if (std::strcmp(name, "portable") == 0) {
    chosen = &portable_kernels();
    return OK;
  }
  const bool avx2 = std::strcmp(name, "avx2") == 0, avx512 = std::strcmp(name, "avx512") == 0;
  if (!avx2 && !avx512) return UNKNOWN_SET;
  if ((avx2 && !has_avx2()) || (avx512 && !has_avx512())) return UNAVAILABLE_SET;
#ifdef BITGRAIN_X86
  chosen = avx2 ? &avx2_kernels() : &avx512_kernels();
#endif
  return OK;
}

// x [rows, k] of x_dtype; y and bias of x_dtype; the rest as GroupedArgs says.  `gather` is [units * 8] or null.
EXPORT int32_t bg_grouped(const void* x, int32_t x_dtype, int64_t rows, int64_t k, const int32_t* gather, const void* codes, int32_t code_kind,
                          const void* scale, int32_t scale_dtype, const void* zero, int32_t zero_is_float, float zero_constant,
                          const int32_t* group_ends, int64_t groups, int64_t units, int64_t n, const void* bias, void* y, int32_t threads) {
  const int64_t width = units * UNIT;
  const bool sums = zero != nullptr || zero_constant != 0.0f;
  try {
    std::vector<float> wide(size_t(rows * width)), totals(sums ? size_t(rows * groups) : 0);
    widen(x, x_dtype, rows, k, width, gather, wide.data(), threads);
    if (sums) group_sums(wide.data(), rows, width, group_ends, groups, totals.data(), threads);
    GroupedArgs args = {};
    args.x = wide.data();
    args.x_sums = sums ? totals.data() : nullptr;
    args.codes = static_cast<const uint8_t*>(codes);
    args.scale = scale;
    args.zero = zero;
    args.group_ends = group_ends;
    args.bias = bias;
    args.y = y;
    args.rows = rows;
    args.n = n;
    args.units = units;
    args.groups = groups;
    args.code_kind = code_kind;
    args.scale_dtype = scale_dtype;
    args.zero_is_float = zero_is_float;
    args.y_dtype = x_dtype;
    args.zero_constant = zero_constant;
    args.threads = threads;
    active().grouped(args);
  } catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
  }
  return OK;
}

// W8A8: quantizes x [rows, k] by row, multiplies in int32, scales.  `quads` is even; codes, scales and sums as IntegerArgs says.
EXPORT int32_t bg_integer(const void* x, int32_t x_dtype, int64_t rows, int64_t k, int32_t symmetric, int32_t dynamic, float static_scale,
                          int32_t static_zero, const void* codes, const float* w_scale, const int32_t* column_sums, int64_t quads, int64_t n,
                          const void* bias, void* y, int32_t threads) {
  try {
    std::vector<float> wide(x_dtype == F32 ? 0 : size_t(rows * k)), scale(static_cast<size_t>(rows));
    std::vector<int32_t> zero(static_cast<size_t>(rows));
    std::vector<uint8_t> a(size_t(rows * quads * 4));
    const float* values = static_cast<const float*>(x);
    if (x_dtype != F32) {
      widen(x, x_dtype, rows, k, k, nullptr, wide.data(), threads);
      values = wide.data();
    }
    active().quantize({values, a.data(), scale.data(), zero.data(), rows, k, quads, symmetric, dynamic, static_scale, static_zero, threads});
    active().integer({a.data(), scale.data(), zero.data(), static_cast<const uint8_t*>(codes), w_scale, column_sums, bias, y, rows, n, quads,
                      x_dtype, threads});
  } catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
  }
  return OK;
}

// The quantizer alone, for tests: codes + 128 in a [rows, quads * 4], scale [rows], zero point + 128 [rows].
EXPORT int32_t bg_quantize(const float* x, int64_t rows, int64_t k, int64_t quads, int32_t symmetric, int32_t dynamic, float static_scale,
                           int32_t static_zero, uint8_t* a, float* scale, int32_t* zero, int32_t threads) {
  active().quantize({x, a, scale, zero, rows, k, quads, symmetric, dynamic, static_scale, static_zero, threads});
  return OK;
}
