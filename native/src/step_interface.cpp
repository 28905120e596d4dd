// The C interface of step_kernels.hpp: which instruction set, and how ranges are shared among threads.
#include <new>
#include <string_view>
#include <vector>

#include "step_kernels.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* bg_instruction_set();

namespace bitgrain {

const StepKernels& step_kernels() {
#ifdef BITGRAIN_X86
  const std::string_view name = bg_instruction_set();
  if (name == "avx2" || name == "avxvnni") return avx2_step_kernels();
  if (name != "portable") return avx512_step_kernels();
#endif
  return portable_step_kernels();
}

namespace {

enum Status : int32_t { OK = 0, OUT_OF_MEMORY = 3 };

// Elements below which a pass costs less than waking the other threads.
constexpr int64_t WORTH_SHARING = 1 << 16;

template <class Args, class Function>
void share(const Args& args, Function* function, int64_t items, int64_t grain, bool worth, int32_t threads) {
  if (!worth || threads < 2) return function(args, 0, items);
  const int64_t part = ((items + threads - 1) / threads + grain - 1) / grain * grain;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int32_t thread = 0; thread < threads; ++thread) {
    const int64_t first = thread * part, last = first + part < items ? first + part : items;
    if (first < last) function(args, first, last);
  }
}

}  // namespace
}  // namespace bitgrain

using namespace bitgrain;

EXPORT int32_t bg_norm(const void* x, int64_t rows, int64_t size, int64_t stride, const void* weight, int32_t weight_dtype, const void* bias, float eps,
                       int32_t wide, int32_t dtype, void* y, int32_t threads) {
  share(NormArgs{x, weight, bias, y, rows, size, stride, eps, wide, weight_dtype, dtype}, step_kernels().norm, rows, 1, rows > 1 && rows * size > WORTH_SHARING,
        threads);
  return OK;
}

EXPORT int32_t bg_rotate(const void* x, int64_t rows, int64_t heads, int64_t size, int64_t stride, const void* cosine, const void* sine, int64_t turned,
                         int32_t interleaved, int32_t dtype, void* y, int32_t threads) {
  share(RotateArgs{x, cosine, sine, y, rows, heads, size, turned, stride, interleaved, dtype}, step_kernels().rotate, rows, 1,
        rows > 1 && rows * heads * size > WORTH_SHARING, threads);
  return OK;
}

EXPORT int32_t bg_gate(const void* gate, const void* up, int64_t rows, int64_t size, int64_t stride, int32_t dtype, void* y, int32_t threads) {
  share(GateArgs{gate, up, y, rows, size, stride, dtype}, step_kernels().gate, rows * size, 64, rows * size > WORTH_SHARING, threads);
  return OK;
}

EXPORT int32_t bg_attend(const void* q, int64_t rows, int64_t heads, int64_t size, int64_t q_stride, const void* keys, int64_t key_stride, const void* values,
                         int64_t value_stride, int64_t total, int64_t groups, int64_t value_size, int64_t window, const float* sinks, float scale, float cap,
                         int32_t dtype, void* y, int32_t threads) {
  const AttendArgs args = {q, keys, values, sinks, y, rows, heads, groups, size, value_size, total, window, q_stride, key_stride, value_stride, scale, cap, dtype};
  const StepKernels& steps = step_kernels();
  const int64_t items = rows * groups, room = heads / groups * (total + size + value_size) + size + value_size;
  const int64_t used = items * total * size > WORTH_SHARING / 4 ? (items < threads ? items : threads) : 1;
  std::vector<float> scratch;
  try {
    scratch.resize(size_t(used * room));
  } catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
  }
  if (used < 2) {
    steps.attend(args, 0, items, scratch.data());
    return OK;
  }
#pragma omp parallel for schedule(static) num_threads(int(used))
  for (int64_t thread = 0; thread < used; ++thread) steps.attend(args, items * thread / used, items * (thread + 1) / used, scratch.data() + thread * room);
  return OK;
}
