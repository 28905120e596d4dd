// The C interface: plain pointers and sizes, error codes, no dependence on any framework.
#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>
#include <stdexcept>

#include "experts.hpp"
#include "linear.hpp"

#if defined(BITGRAIN_VNNI)
#include <cpuid.h>
#elif defined(BITGRAIN_NEON) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace bitgrain {
namespace {

enum Status : int32_t { OK = 0, UNKNOWN_SET = 1, UNAVAILABLE_SET = 2, OUT_OF_MEMORY = 3, UNKNOWN_EXPERT = 4 };

std::atomic<const Kernels*> chosen{nullptr};  // calls may come from several threads at once

#ifdef BITGRAIN_X86
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

#ifdef BITGRAIN_AVX512_EMULATED
bool has_avx512() { return has_avx2(); }
#else
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}
#endif
#endif

#ifdef BITGRAIN_VNNI
// The dot product of bytes without AVX-512: leaf 7, subleaf 1, which names of older compilers do not reach.
bool has_avxvnni() {
#ifdef BITGRAIN_VNNI_EMULATED
  return has_avx2();
#else
  unsigned a = 0, b = 0, c = 0, d = 0;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
#endif
}
#endif

#ifdef BITGRAIN_NEON
bool has_dot_products() {
#ifdef __linux__
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return false;
#endif
}
#endif

#ifdef BITGRAIN_BF16
#ifdef BITGRAIN_AVX512_EMULATED
bool has_avx512bf16() { return has_avx2(); }
bool has_amx() { return has_avx2(); }
#else
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16"); }

bool has_amx() {
  return has_avx512bf16() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8") &&
         request_tiles();
}
#endif

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
#ifdef BITGRAIN_VNNI
    {"avxvnni", has_avxvnni, has_avxvnni, avxvnni_kernels},
#endif
    {"avx512", has_avx512, has_avx512, avx512_kernels},
#endif
#ifdef BITGRAIN_NEON
    {"neon", always, always, neon_kernels},
    {"neondot", has_dot_products, has_dot_products, neondot_kernels},
#endif
#ifdef BITGRAIN_BF16
    {"avx512bf16", has_avx512bf16, gains_from_bf16, avx512bf16_kernels},
    {"amx", has_amx, has_amx, amx_kernels},
#endif
};
const char* const NAMES[] = {"portable", "avx2", "avx512", "avx512bf16", "amx", "avxvnni", "neon", "neondot"};

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

}  // namespace

const Kernels& active_kernels() {
  const Kernels* set = chosen.load(std::memory_order_acquire);
  if (set == nullptr) {
    const Kernels* found = &best();
    if (chosen.compare_exchange_strong(set, found)) set = found;  // else another thread was first, and `set` is what it chose
  }
  return *set;
}

}  // namespace bitgrain

using namespace bitgrain;

EXPORT int32_t bg_abi_version() { return 6; }

EXPORT const char* bg_instruction_set() { return active_kernels().name; }

// Bit mask of what this machine and this build have: 1 portable, 2 avx2, 4 avx512, 8 avx512bf16, 16 amx, 32 avxvnni, 64 neon, 128 neondot.
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
    chosen.store(&set->kernels(), std::memory_order_release);
    return OK;
  }
  for (const char* known : NAMES) {
    if (std::strcmp(name, known) == 0) return UNAVAILABLE_SET;
  }
  return UNKNOWN_SET;
}

// x [rows, k] of x_dtype; y and bias of y_dtype; the rest as GroupedArgs says.  `gather` is [units * 8] or null.
EXPORT int32_t bg_grouped_table(const void* x, int32_t x_dtype, int64_t rows, int64_t k, const int32_t* gather, const void* codes, int32_t code_kind,
                                const void* scale, int32_t scale_dtype, const float* second, const float* table, const int8_t* whole_table,
                                float whole_step, const void* zero, int32_t zero_is_float, float zero_constant, const int32_t* group_ends, int64_t groups,
                                int64_t units, int64_t n, const float* row_scale, const void* bias, void* y, int32_t y_dtype, int32_t threads) {
  GroupedArgs args = {};
  args.codes = static_cast<const uint8_t*>(codes);
  args.scale = scale;
  args.zero = zero;
  args.second = second;
  args.table = table;
  args.whole_table = whole_table;
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
  args.whole_step = whole_step;
  try {
    run_grouped(active_kernels(), args, x, x_dtype, k, gather, threads);
  } catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
  }
  return OK;
}

// As bg_grouped_table, for the kinds of codes that need no table.
EXPORT int32_t bg_grouped(const void* x, int32_t x_dtype, int64_t rows, int64_t k, const int32_t* gather, const void* codes, int32_t code_kind,
                          const void* scale, int32_t scale_dtype, const void* zero, int32_t zero_is_float, float zero_constant,
                          const int32_t* group_ends, int64_t groups, int64_t units, int64_t n, const float* row_scale, const void* bias, void* y,
                          int32_t y_dtype, int32_t threads) {
  return bg_grouped_table(x, x_dtype, rows, k, gather, codes, code_kind, scale, scale_dtype, nullptr, nullptr, nullptr, 1.0f, zero, zero_is_float,
                          zero_constant, group_ends, groups, units, n, row_scale, bias, y, y_dtype, threads);
}

// W8A8: quantizes x [rows, k] by row, multiplies in int32, scales.  `quads` is even; codes, scales and sums as IntegerArgs says.
// `rules`: 1 symmetric, 2 multiplied by the reciprocal of the scale instead of divided by the scale.
EXPORT int32_t bg_integer(const void* x, int32_t x_dtype, int64_t rows, int64_t k, int32_t rules, int32_t dynamic, float static_scale,
                          int32_t static_zero, float top, const void* codes, const float* w_scale, const int32_t* column_sums, int64_t quads, int64_t n,
                          const void* bias, void* y, int32_t threads) {
  const QuantizeArgs quantize = {nullptr, nullptr, nullptr, nullptr, rows, k, quads, rules & 1, dynamic, static_scale, static_zero, top, rules & 2};
  const IntegerArgs args = {nullptr, nullptr, nullptr, static_cast<const uint8_t*>(codes), w_scale, column_sums, bias, y, rows, n, quads, x_dtype};
  try {
    run_integer(active_kernels(), quantize, args, x, x_dtype, threads);
  } catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
  }
  return OK;
}

// The quantizer alone, for tests: codes + 128 in a [rows, quads * 4], scale [rows], zero point + 128 [rows].
EXPORT int32_t bg_quantize(const float* x, int64_t rows, int64_t k, int64_t quads, int32_t rules, int32_t dynamic, float static_scale,
                           int32_t static_zero, float top, uint8_t* a, float* scale, int32_t* zero, int32_t threads) {
  run_quantize(active_kernels(), {x, a, scale, zero, rows, k, quads, rules & 1, dynamic, static_scale, static_zero, top, rules & 2}, threads);
  return OK;
}

// Tables and arguments as ExpertsArgs says; `gate_up` and `down` have a row of 16 numbers per expert, `sides` two rows of 10.
EXPORT int32_t bg_experts(const void* gate_up, const void* down, const void* sides, int64_t count, int64_t size, const void* x, int32_t dtype, int64_t rows,
                          const void* weight, int32_t weight_dtype, const int64_t* chosen, int64_t per_token, int32_t join, float alpha, float limit, void* y,
                          int32_t threads) {
  ExpertsArgs args = {};
  args.gate_up = static_cast<const ExpertMatrix*>(gate_up);
  args.down = static_cast<const ExpertMatrix*>(down);
  args.sides = static_cast<const ExpertSide*>(sides);
  args.x = x;
  args.weight = weight;
  args.chosen = chosen;
  args.y = y;
  args.count = count;
  args.rows = rows;
  args.per_token = per_token;
  args.size = size;
  args.dtype = dtype;
  args.weight_dtype = weight_dtype;
  args.join = join;
  args.join_alpha = alpha;
  args.join_limit = limit;
  args.threads = threads;
  try {
    run_experts(active_kernels(), args);
  } catch (const std::out_of_range&) {
    return UNKNOWN_EXPERT;
  } catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
  }
  return OK;
}

// One matrix of every expert: x [ends[count - 1], k] of dtype, ordered by expert; y of y_dtype, biases added.
EXPORT int32_t bg_experts_product(const void* matrices, const void* side, int64_t count, const void* x, int32_t dtype, const int64_t* ends,
                                  const float* row_scale, void* y, int32_t y_dtype, int32_t threads) {
  try {
    run_experts_product(active_kernels(), {static_cast<const ExpertMatrix*>(matrices), static_cast<const ExpertSide*>(side), x, ends, row_scale, y, count, dtype, y_dtype, threads});
  } catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
  }
  return OK;
}
