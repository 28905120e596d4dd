// The C interface: plain pointers and sizes, error codes, no dependence on any framework.
#include <cstdint>
#include <cstring>
#include <vector>

#include "scalar.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace bitgrain {
namespace {

enum Status : int32_t { OK = 0, UNKNOWN_SET = 1, UNAVAILABLE_SET = 2, OUT_OF_MEMORY = 3 };

// Activations, in elements, below which a pass over them costs less than waking the other threads.
constexpr int64_t WORTH_SHARING = 1 << 18;

const Kernels* chosen = nullptr;

#ifdef BITGRAIN_X86
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}
#endif

#ifdef BITGRAIN_BF16
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16"); }

bool has_amx() {
  return has_avx512bf16() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8") &&
         request_tiles();
}

// Where one bfloat16 instruction takes as long as the two float32 ones that it replaces, AVX-512 alone is faster: it needs no
// decoded copy of the weights.  Measured so on Sapphire Rapids; Zen 4 issues one per cycle.
bool gains_from_bf16() { return has_avx512bf16() && __builtin_cpu_is("amd"); }
#endif

struct InstructionSet {
  const char* name;
  bool (*available)();
  bool (*preferred)();  // over those before
  const Kernels& (*kernels)();
};

bool always() { return true; }

// From the plainest to the best; bg_available_sets numbers the names.
const InstructionSet SETS[] = {
    {"portable", always, always, portable_kernels},
#ifdef BITGRAIN_X86
    {"avx2", has_avx2, has_avx2, avx2_kernels},
    {"avx512", has_avx512, has_avx512, avx512_kernels},
#endif
#ifdef BITGRAIN_BF16
    {"avx512bf16", has_avx512bf16, gains_from_bf16, avx512bf16_kernels},
    {"amx", has_amx, has_amx, amx_kernels},
#endif
};
const char* const NAMES[] = {"portable", "avx2", "avx512", "avx512bf16", "amx"};

const InstructionSet* find_set(const char* name) {
  for (const InstructionSet& set : SETS) {
    if (std::strcmp(name, set.name) == 0) return &set;
  }
  return nullptr;
}

const Kernels& best() {
  const Kernels* found = &portable_kernels();
  for (const InstructionSet& set : SETS) {
    if (set.preferred()) found = &set.kernels();
  }
  return *found;
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

// True when every group but the last ends at a whole step of 32 in features.
bool whole_steps(const int32_t* ends, int64_t groups) {
  for (int64_t g = 0; g + 1 < groups; ++g) {
    if (ends[g] % 4 != 0) return false;
  }
  return true;
}

// x as bfloat16 [rows up to 16 or the next multiple of 16, width], columns as in `widen`; zeros where there is nothing
void pad_rows(const uint16_t* x, int64_t rows, int64_t padded, int64_t k, int64_t units, int64_t width, const int32_t* gather, uint16_t* out, int32_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > WORTH_SHARING)
  for (int64_t row = 0; row < padded; ++row) {
    uint16_t* to = out + row * width;
    int64_t filled = 0;
    if (row < rows && gather != nullptr) {
      for (filled = 0; filled < units * UNIT; ++filled) to[filled] = gather[filled] < 0 ? 0 : x[row * k + gather[filled]];
    } else if (row < rows) {
      std::memcpy(to, x + row * k, size_t(k) * 2);
      filled = k;
    }
    std::memset(to + filled, 0, size_t(width - filled) * 2);
  }
}

// Sums of whole steps, sixteen partial sums each, added in order; [groups, rows], so that a tile reads neighbours.
void group_sums16(const uint16_t* x, int64_t rows, int64_t width, const int32_t* ends, int64_t groups, float* sums, int32_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > WORTH_SHARING)
  for (int64_t row = 0; row < rows; ++row) {
    int64_t at = 0;
    for (int64_t g = 0; g < groups; ++g) {
      float part[16] = {};
      for (const int64_t end = g + 1 < groups ? int64_t(ends[g]) * UNIT : width; at < end; at += 16) {
        for (int64_t i = 0; i < 16; ++i) part[i] += bf16_to_float(x[row * width + at + i]);
      }
      for (int64_t half = 8; half > 0; half /= 2) {
        for (int64_t i = 0; i < half; ++i) part[i] += part[i + half];
      }
      sums[g * rows + row] = part[0];
    }
  }
}

}  // namespace
}  // namespace bitgrain

using namespace bitgrain;

EXPORT int32_t bg_abi_version() { return 4; }

EXPORT const char* bg_instruction_set() { return active().name; }

// Bit mask of what this machine and this build have: 1 portable, 2 avx2, 4 avx512, 8 avx512bf16, 16 amx.
EXPORT int32_t bg_available_sets() {
  int32_t mask = 0, bit = 1;
  for (const char* name : NAMES) {
    const InstructionSet* set = find_set(name);
    if (set != nullptr && set->available()) mask |= bit;
    bit <<= 1;
  }
  return mask;
}

EXPORT int32_t bg_choose_set(const char* name) {
  const InstructionSet* set = find_set(name);
  if (set != nullptr && set->available()) {
    chosen = &set->kernels();
    return OK;
  }
  for (const char* known : NAMES) {
    if (std::strcmp(name, known) == 0) return UNAVAILABLE_SET;
  }
  return UNKNOWN_SET;
}

// x [rows, k] of x_dtype; y and bias of y_dtype; the rest as GroupedArgs says.  `gather` is [units * 8] or null.
EXPORT int32_t bg_grouped(const void* x, int32_t x_dtype, int64_t rows, int64_t k, const int32_t* gather, const void* codes, int32_t code_kind,
                          const void* scale, int32_t scale_dtype, const void* zero, int32_t zero_is_float, float zero_constant,
                          const int32_t* group_ends, int64_t groups, int64_t units, int64_t n, const float* row_scale, const void* bias, void* y,
                          int32_t y_dtype, int32_t threads) {
  const int64_t width = units * UNIT;
  const bool sums = zero != nullptr || zero_constant != 0.0f;
  const bool narrow = x_dtype == BF16 && active().grouped16 != nullptr && whole_steps(group_ends, groups);
  try {
    std::vector<float> wide(narrow ? 0 : size_t(rows * width)), totals(sums ? size_t(rows * groups) : 0);
    std::vector<uint16_t> padded;
    GroupedArgs args = {};
    if (narrow) {
      const int64_t steps_width = (width + 31) / 32 * 32, padded_rows = rows <= 16 ? rows : (rows + 15) / 16 * 16;
      args.x16 = static_cast<const uint16_t*>(x);
      if (gather != nullptr || k != steps_width || rows != padded_rows) {
        padded.resize(size_t(padded_rows * steps_width));
        pad_rows(args.x16, rows, padded_rows, k, units, steps_width, gather, padded.data(), threads);
        args.x16 = padded.data();
      }
      if (sums) group_sums16(args.x16, rows, steps_width, group_ends, groups, totals.data(), threads);
    } else {
      widen(x, x_dtype, rows, k, width, gather, wide.data(), threads);
      if (sums) group_sums(wide.data(), rows, width, group_ends, groups, totals.data(), threads);
    }
    args.x = wide.data();
    args.x_sums = sums ? totals.data() : nullptr;
    args.codes = static_cast<const uint8_t*>(codes);
    args.scale = scale;
    args.zero = zero;
    args.group_ends = group_ends;
    args.row_scale = row_scale;
    args.bias = bias;
    args.y = y;
    args.rows = rows;
    args.n = n;
    args.units = units;
    args.groups = groups;
    args.code_kind = code_kind;
    args.scale_dtype = scale_dtype;
    args.zero_is_float = zero_is_float;
    args.y_dtype = y_dtype;
    args.zero_constant = zero_constant;
    args.threads = threads;
    narrow ? active().grouped16(args) : active().grouped(args);
  } catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
  }
  return OK;
}

// W8A8: quantizes x [rows, k] by row, multiplies in int32, scales.  `quads` is even; codes, scales and sums as IntegerArgs says.
EXPORT int32_t bg_integer(const void* x, int32_t x_dtype, int64_t rows, int64_t k, int32_t symmetric, int32_t dynamic, float static_scale,
                          int32_t static_zero, float top, const void* codes, const float* w_scale, const int32_t* column_sums, int64_t quads, int64_t n,
                          const void* bias, void* y, int32_t threads) {
  try {
    std::vector<float> wide(x_dtype == F32 ? 0 : size_t(rows * k)), scale(static_cast<size_t>(rows));
    std::vector<int32_t> zero(static_cast<size_t>(rows));
    // kernels with tiles read whole tiles: up to 15 rows and 63 bytes more
    std::vector<uint8_t> a(size_t((rows + 15) / 16 * 16 * quads * 4 + 64));
    const float* values = static_cast<const float*>(x);
    if (x_dtype != F32) {
      widen(x, x_dtype, rows, k, k, nullptr, wide.data(), threads);
      values = wide.data();
    }
    active().quantize({values, a.data(), scale.data(), zero.data(), rows, k, quads, symmetric, dynamic, static_scale, static_zero, top,
                       threads});
    active().integer({a.data(), scale.data(), zero.data(), static_cast<const uint8_t*>(codes), w_scale, column_sums, bias, y, rows, n, quads,
                      x_dtype, threads});
  } catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
  }
  return OK;
}

// The quantizer alone, for tests: codes + 128 in a [rows, quads * 4], scale [rows], zero point + 128 [rows].
EXPORT int32_t bg_quantize(const float* x, int64_t rows, int64_t k, int64_t quads, int32_t symmetric, int32_t dynamic, float static_scale,
                           int32_t static_zero, float top, uint8_t* a, float* scale, int32_t* zero, int32_t threads) {
  active().quantize({x, a, scale, zero, rows, k, quads, symmetric, dynamic, static_scale, static_zero, top, threads});
  return OK;
}
