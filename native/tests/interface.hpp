// The C interface as a caller sees it.  Every exported function has a line in FUNCTIONS, and is called through `native::`,
// which notes that it was; tests/kernels/test_native_checks.py compares the list with the library's symbols.
#pragma once
#include <atomic>
#include <cstdint>
#include <vector>

#include "block_kernels.hpp"
#include "codebook.hpp"
#include "decode_step.hpp"
#include "experts.hpp"
#include "hadamard.hpp"
#include "pack.hpp"

extern "C" {
using bitgrain::CodeProduct;

int32_t bg_abi_version();
const char* bg_instruction_set();
int32_t bg_available_sets();
int32_t bg_choose_set(const char* name);
int32_t bg_grouped_table(const void* x, int32_t x_dtype, int64_t rows, int64_t k, const int32_t* gather, const void* codes, int32_t code_kind, const void* scale,
                         int32_t scale_dtype, const float* second, const float* table, const int8_t* whole_table, float whole_step, const void* zero,
                         int32_t zero_is_float, float zero_constant, const int32_t* group_ends, int64_t groups, int64_t units, int64_t n, const float* row_scale,
                         const void* bias, void* y, int32_t y_dtype, int32_t threads);
int32_t bg_grouped(const void* x, int32_t x_dtype, int64_t rows, int64_t k, const int32_t* gather, const void* codes, int32_t code_kind, const void* scale,
                   int32_t scale_dtype, const void* zero, int32_t zero_is_float, float zero_constant, const int32_t* group_ends, int64_t groups, int64_t units,
                   int64_t n, const float* row_scale, const void* bias, void* y, int32_t y_dtype, int32_t threads);
int32_t bg_integer(const void* x, int32_t x_dtype, int64_t rows, int64_t k, int32_t rules, int32_t dynamic, float static_scale, int32_t static_zero, float top,
                   const void* codes, const float* w_scale, const int32_t* column_sums, int64_t quads, int64_t n, const void* bias, void* y, int32_t threads);
int32_t bg_quantize(const float* x, int64_t rows, int64_t k, int64_t quads, int32_t rules, int32_t dynamic, float static_scale, int32_t static_zero, float top,
                    uint8_t* a, float* scale, int32_t* zero, int32_t threads);
int32_t bg_experts(const void* gate_up, const void* down, const void* sides, int64_t count, int64_t size, const void* x, int32_t dtype, int64_t rows,
                   const void* weight, int32_t weight_dtype, const int64_t* chosen, int64_t per_token, int32_t join, float alpha, float limit, void* y,
                   int32_t threads);
int32_t bg_experts_product(const void* matrices, const void* side, int64_t count, const void* x, int32_t dtype, const int64_t* ends, const float* row_scale,
                           void* y, int32_t y_dtype, int32_t threads);
int64_t bg_block_panel_bytes(const int32_t* format, int64_t k);
int32_t bg_block_linear(const void* x, int32_t dtype, int64_t rows, int64_t k, const int32_t* format, const void* data, const float* factor, int64_t n,
                        const void* bias, void* y, int32_t precision, int32_t threads);
int32_t bg_pack_blocks(const bitgrain::CodeStream* codes, const bitgrain::PackedField* fields, int32_t field_count, const int32_t* format, int64_t panel_bytes,
                       uint8_t* out, int32_t threads);
int32_t bg_pack_units(const bitgrain::CodeStream* codes, const int32_t* gather, int64_t units, int32_t layout, int32_t fill, int32_t flip, uint8_t* out,
                      int32_t threads);
int32_t bg_additive(const CodeProduct* product, const bitgrain::AdditiveCodes* codes);
int32_t bg_lattice(const CodeProduct* product, const bitgrain::LatticeCodes* codes);
int32_t bg_trellis(const CodeProduct* product, const bitgrain::TrellisCodes* codes);
int32_t bg_vector(const CodeProduct* product, const bitgrain::VectorCodes* sections, int32_t count);
int32_t bg_lookup(const CodeProduct* product, const bitgrain::LookupCodes* codes);
int32_t bg_hadamard(const bitgrain::HadamardArgs* given);
int32_t bg_norm(const void* x, int64_t rows, int64_t size, int64_t stride, const void* weight, int32_t weight_dtype, const void* bias, float eps, int32_t wide,
                int32_t dtype, void* y, int32_t threads);
int32_t bg_rotate(const void* x, int64_t rows, int64_t heads, int64_t size, int64_t stride, const void* cosine, const void* sine, int64_t turned,
                  int32_t interleaved, int32_t dtype, void* y, int32_t threads);
int32_t bg_gate(const void* gate, const void* up, int64_t rows, int64_t size, int64_t stride, int32_t dtype, void* y, int32_t threads);
int32_t bg_attend(const void* q, int64_t rows, int64_t heads, int64_t size, int64_t q_stride, const void* keys, int64_t key_stride, const void* values,
                  int64_t value_stride, int64_t total, int64_t groups, int64_t value_size, int64_t window, const float* sinks, float scale, float cap,
                  int32_t dtype, void* y, int32_t threads);
int32_t bg_dense(const void* x, int64_t rows, int64_t k, const void* weight, int32_t weight_dtype, int64_t n, const void* bias, void* y, int32_t y_dtype,
                 int32_t threads);
int64_t bg_step_scratch(const bitgrain::StepOperation* operations, int64_t count, const bitgrain::StepState* state);
int32_t bg_run_step(const bitgrain::StepOperation* operations, int64_t count, const bitgrain::StepState* state, uint8_t* scratch, int64_t* counters);
double bg_peak(int32_t kind, int32_t threads);
uint64_t bg_read(const uint64_t* data, int64_t words, int32_t threads);
}

#define FUNCTIONS(F)                                                                                                                              \
  F(bg_abi_version) F(bg_instruction_set) F(bg_available_sets) F(bg_choose_set) F(bg_grouped_table) F(bg_grouped) F(bg_integer) F(bg_quantize)    \
  F(bg_experts) F(bg_experts_product) F(bg_block_panel_bytes) F(bg_block_linear) F(bg_pack_blocks) F(bg_pack_units) F(bg_additive) F(bg_lattice) \
  F(bg_trellis) F(bg_vector) F(bg_lookup) F(bg_hadamard) F(bg_norm) F(bg_rotate) F(bg_gate) F(bg_attend) F(bg_dense) F(bg_step_scratch)          \
  F(bg_run_step) F(bg_peak) F(bg_read)

struct Called {
  const char* name;
  std::atomic<int64_t> times{0};
  explicit Called(const char* name) : name(name) { all().push_back(this); }
  static std::vector<Called*>& all() {
    static std::vector<Called*> functions;
    return functions;
  }
};

template <class Signature>
struct Function;

template <class Result, class... Given>
struct Function<Result(Given...)> : Called {
  Result (*function)(Given...);
  Function(const char* name, Result (*function)(Given...)) : Called(name), function(function) {}
  Result operator()(Given... given) {
    ++times;
    return function(given...);
  }
};

namespace native {
#define NOTED(name) inline Function<decltype(::name)> name{#name, ::name};
FUNCTIONS(NOTED)
#undef NOTED
}  // namespace native
