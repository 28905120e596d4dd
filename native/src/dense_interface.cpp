// The C interface of dense.hpp.
#include <cstring>
#include <new>

#include "linear.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* bg_instruction_set();

namespace bitgrain {

DenseKernel dense_kernel() {
#ifdef BITGRAIN_X86
  if (std::strcmp(bg_instruction_set(), "portable") != 0) return avx2_dense;
#endif
  return portable_dense;
}

}  // namespace bitgrain

using namespace bitgrain;

// y [rows, n] of y_dtype = x [rows, k] of y_dtype times weight [n, k] of weight_dtype, plus bias [n] of y_dtype or null.
EXPORT int32_t bg_dense(const void* x, int64_t rows, int64_t k, const void* weight, int32_t weight_dtype, int64_t n, const void* bias, void* y,
                        int32_t y_dtype, int32_t threads) {
  const DenseArgs args = {nullptr, weight, bias, y, rows, n, k, 0, weight_dtype, y_dtype};
  try {
    run_alone(DenseProduct(args, x), threads);
  } catch (const std::bad_alloc&) {
    return 3;
  }
  return 0;
}
