// The C interface of dense.hpp: rows widened, out features shared among threads.
#include <cstring>
#include <new>

#include "dense.hpp"
#include "rows.hpp"

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
  const int64_t width = round_up(k, PANEL);
  const std::unique_ptr<float[]> wide(new (std::nothrow) float[size_t(rows * width)]);
  if (!wide) return 3;
  for (int64_t row = 0; row < rows; ++row) widen_row(x, y_dtype, row, k, width, nullptr, wide.get() + row * width);
  const DenseArgs args = {wide.get(), weight, bias, y, rows, n, k, width, weight_dtype, y_dtype};
  const DenseKernel run = dense_kernel();
  const int64_t tasks = (n + DENSE_TASK - 1) / DENSE_TASK;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (tasks > 1)
  for (int64_t task = 0; task < tasks; ++task) run(args, task * DENSE_TASK, task + 1 < tasks ? (task + 1) * DENSE_TASK : n);
  return 0;
}
