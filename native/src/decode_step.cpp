// Runs a decode step in one parallel region: each thread owns some of the rows, and does by itself whatever concerns one row alone;
// around each matrix, and around the attention of long contexts, all threads meet.
#include "decode_step.hpp"

#include <omp.h>

#include <algorithm>
#include <cstring>

#include "block_kernels.hpp"
#include "dense.hpp"
#include "rows.hpp"
#include "scalar.hpp"
#include "step_kernels.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int32_t bg_grouped_table(const void*, int32_t, int64_t, int64_t, const int32_t*, const void*, int32_t, const void*, int32_t, const float*, const float*,
                                const int8_t*, float, const void*, int32_t, float, const int32_t*, int64_t, int64_t, int64_t, const float*, const void*, void*,
                                int32_t, int32_t);
EXPORT int32_t bg_integer(const void*, int32_t, int64_t, int64_t, int32_t, int32_t, float, int32_t, float, const void*, const float*, const int32_t*, int64_t,
                          int64_t, const void*, void*, int32_t);

namespace bitgrain {
namespace {

// Multiplications of an attention below which meeting costs more than sharing saves.
constexpr int64_t WORTH_MEETING = 1 << 14;
constexpr int64_t BLOCK_TASK = 4;  // panels that one thread takes at a time

template <class Call>
const Call& call_of(const StepOperation& operation) {
  return *static_cast<const Call*>(operation.call);
}

bool runs_alone(const StepOperation& operation) { return operation.kind == STEP_GROUPED || operation.kind == STEP_INTEGER; }

// Whether threads share any of these operations.
bool is_shared(const StepOperation* first, const StepOperation* last, const StepState& state) {
  return state.rows > 1 || std::any_of(first, last, [](const StepOperation& one) {
           return one.kind == STEP_BLOCK || one.kind == STEP_DENSE || one.kind == STEP_ATTEND;
         });
}

int64_t longest(const StepState& state) { return state.rows ? 1 + *std::max_element(state.lengths, state.lengths + state.rows) : 1; }

int64_t attention_room(const AttendCall& call, int64_t total) {
  return call.heads / call.groups * (total + call.size + call.value_size) + call.size + call.value_size;
}

// Bytes of one thread's attention, and of the prepared rows of a matrix.
struct Room {
  int64_t attention = 0, input = 0;

  Room(const StepOperation* operations, int64_t count, const StepState& state) {
    const int64_t total = longest(state);
    for (const StepOperation* one = operations; one != operations + count; ++one) {
      if (one->kind == STEP_ATTEND) attention = std::max(attention, attention_room(call_of<AttendCall>(*one), total) * int64_t(sizeof(float)));
      if (one->kind == STEP_BLOCK) input = std::max(input, block_input_bytes(state.rows, call_of<BlockCall>(*one).k));
      if (one->kind == STEP_DENSE) input = std::max(input, state.rows * round_up(call_of<DenseCall>(*one).k, PANEL) * int64_t(sizeof(float)));
    }
    attention = round_up(attention, 64);
    input = round_up(input, 64);
  }
};

// One thread's view of a step.
class Worker {
 public:
  Worker(const StepState& state, const Room& room, uint8_t* scratch, int64_t thread, int64_t threads)
      : state_(state), steps_(step_kernels()), blocks_(block_kernels()), dense_(dense_kernel()), bytes_(state.dtype == F32 ? 4 : 2), thread_(thread),
        threads_(threads), first_(state.rows * thread / threads), last_(state.rows * (thread + 1) / threads), input_(scratch),
        scores_(reinterpret_cast<float*>(scratch + room.input + thread * room.attention)) {}

  void run(const StepOperation& operation, int64_t* next) {
    switch (operation.kind) {
      case STEP_NORM: return norm(operation);
      case STEP_ROTATE: return rotate(operation);
      case STEP_APPEND: return append(operation);
      case STEP_ATTEND: return attend(operation);
      case STEP_GATE: return gate(operation);
      case STEP_ADD: return add(operation);
      case STEP_BLOCK: return block(operation, next);
      case STEP_DENSE: return dense(operation, next);
    }
  }

 private:
  uint8_t* at(const StepPlace& place, int64_t row) const {
    return static_cast<uint8_t*>(state_.buffers[place.buffer]) + (row * state_.widths[place.buffer] + place.column) * bytes_;
  }

  uint8_t* store(int64_t row, int64_t place) const { return static_cast<uint8_t*>(state_.stores[row][place]); }

  void norm(const StepOperation& operation) const {
    const NormCall& call = call_of<NormCall>(operation);
    for (int64_t row = first_; row < last_; ++row) {
      steps_.norm({at(operation.source, row), call.weight, call.bias, at(operation.target, row), call.heads, call.size, call.size, float(call.eps),
                   int32_t(call.wide), int32_t(call.weight_dtype), int32_t(state_.dtype)}, 0, call.heads);
    }
  }

  void rotate(const StepOperation& operation) const {
    const RotateCall& call = call_of<RotateCall>(operation);
    const Angles& angles = state_.angles[call.angles];
    for (int64_t row = first_; row < last_; ++row) {
      uint8_t* const heads = at(operation.source, row);
      const int64_t skipped = row * angles.turned * bytes_;
      steps_.rotate({heads, static_cast<const uint8_t*>(angles.cosine) + skipped, static_cast<const uint8_t*>(angles.sine) + skipped, heads, 1, call.heads,
                     call.size, angles.turned, 0, int32_t(call.interleaved), int32_t(state_.dtype)}, 0, 1);
    }
  }

  void append(const StepOperation& operation) const {
    const AppendCall& call = call_of<AppendCall>(operation);
    const int64_t key_bytes = call.key_width * bytes_, value_bytes = call.value_width * bytes_;
    for (int64_t row = first_; row < last_; ++row) {
      std::memcpy(store(row, 2 * call.layer) + state_.lengths[row] * key_bytes, at(operation.source, row), size_t(key_bytes));
      std::memcpy(store(row, 2 * call.layer + 1) + state_.lengths[row] * value_bytes, at(operation.second, row), size_t(value_bytes));
    }
  }

  void attend(const StepOperation& operation) const {
    const AttendCall& call = call_of<AttendCall>(operation);
    const int64_t items = state_.rows * call.groups;
    int64_t work = 0;
    for (int64_t row = 0; row < state_.rows; ++row) work += (state_.lengths[row] + 1) * call.groups * call.size;
    if (threads_ < 2 || work <= WORTH_MEETING) return attend_items(operation, first_ * call.groups, last_ * call.groups);
#pragma omp barrier
    attend_items(operation, items * thread_ / threads_, items * (thread_ + 1) / threads_);
#pragma omp barrier
  }

  // Pairs of a row and a group.
  void attend_items(const StepOperation& operation, int64_t first, int64_t last) const {
    const AttendCall& call = call_of<AttendCall>(operation);
    while (first < last) {
      const int64_t row = first / call.groups, end = std::min(last, (row + 1) * call.groups);
      const AttendArgs args = {at(operation.source, row), store(row, 2 * call.layer), store(row, 2 * call.layer + 1), call.sinks, at(operation.target, row),
                               1, call.heads, call.groups, call.size, call.value_size, state_.lengths[row] + 1, call.window, 0, call.groups * call.size,
                               call.groups * call.value_size, float(call.scale), float(call.cap), int32_t(state_.dtype)};
      steps_.attend(args, first - row * call.groups, end - row * call.groups, scores_);
      first = end;
    }
  }

  void gate(const StepOperation& operation) const {
    const int64_t width = call_of<WidthCall>(operation).width;
    for (int64_t row = first_; row < last_; ++row) {
      steps_.gate({at(operation.source, row), at(operation.second, row), at(operation.target, row), 1, width, width, int32_t(state_.dtype)}, 0, width);
    }
  }

  void add(const StepOperation& operation) const {
    const int64_t width = call_of<WidthCall>(operation).width;
    for (int64_t row = first_; row < last_; ++row) steps_.add(at(operation.source, row), at(operation.target, row), width, int32_t(state_.dtype));
  }

  void block(const StepOperation& operation, int64_t* next) const {
    const BlockCall& call = call_of<BlockCall>(operation);
    BlockWeight weight = {{}, static_cast<const uint8_t*>(call.data), call.factor, call.n, call.k};
    std::memcpy(&weight.format, call.format, sizeof weight.format);
    if (first_ < last_) {
      blocks_.prepare(weight.format, at(operation.source, 0), int32_t(state_.dtype), state_.widths[operation.source.buffer], call.k, state_.rows, first_, last_,
                      int32_t(call.precision), input_);
    }
    const int64_t panels = count_panels(call.n);
#pragma omp barrier
    for (int64_t first; (first = take(next, BLOCK_TASK)) < panels;) {
      blocks_.panels(weight, input_, state_.rows, first, std::min(first + BLOCK_TASK, panels), call.bias, at(operation.target, 0), int32_t(state_.dtype),
                     state_.widths[operation.target.buffer]);
    }
#pragma omp barrier
  }

  void dense(const StepOperation& operation, int64_t* next) const {
    const DenseCall& call = call_of<DenseCall>(operation);
    const int64_t width = round_up(call.k, PANEL);
    float* const x = reinterpret_cast<float*>(input_);
    for (int64_t row = first_; row < last_; ++row) widen_row(at(operation.source, row), int32_t(state_.dtype), 0, call.k, width, nullptr, x + row * width);
    const DenseArgs args = {x, call.weight, call.bias, at(operation.target, 0), state_.rows, call.n, call.k, width, int32_t(call.weight_dtype), int32_t(state_.dtype)};
#pragma omp barrier
    for (int64_t first; (first = take(next, DENSE_TASK)) < call.n;) dense_(args, first, std::min(first + DENSE_TASK, call.n));
#pragma omp barrier
  }

  static int64_t take(int64_t* next, int64_t count) { return __atomic_fetch_add(next, count, __ATOMIC_RELAXED); }

  const StepState& state_;
  const StepKernels& steps_;
  const BlockKernels& blocks_;
  const DenseKernel dense_;
  const int64_t bytes_, thread_, threads_, first_, last_;
  uint8_t* const input_;
  float* const scores_;
};

// Matrices whose functions share themselves out among threads.
int32_t run_alone(const StepOperation& operation, const StepState& state) {
  const int64_t bytes = state.dtype == F32 ? 4 : 2;
  const uint8_t* const x = static_cast<const uint8_t*>(state.buffers[operation.source.buffer]) + operation.source.column * bytes;
  uint8_t* const y = static_cast<uint8_t*>(state.buffers[operation.target.buffer]) + operation.target.column * bytes;
  const int32_t dtype = int32_t(state.dtype), threads = int32_t(state.threads);
  if (operation.kind == STEP_INTEGER) {
    const IntegerCall& call = call_of<IntegerCall>(operation);
    return bg_integer(x, dtype, state.rows, call.k, int32_t(call.rules), int32_t(call.ranges), float(call.static_scale), int32_t(call.static_zero),
                      float(call.top), call.codes, call.scale, call.column_sums, call.quads, call.n, call.bias, y, threads);
  }
  const GroupedCall& call = call_of<GroupedCall>(operation);
  return bg_grouped_table(x, dtype, state.rows, call.k, call.gather, call.codes, int32_t(call.code_kind), call.scale, int32_t(call.scale_dtype), call.second,
                          call.table, call.whole_table, float(call.whole_step), call.zero, int32_t(call.zero_is_float), float(call.zero_constant),
                          call.group_ends, call.groups, call.units, call.n, nullptr, call.bias, y, dtype, threads);
}

}  // namespace
}  // namespace bitgrain

using namespace bitgrain;

// Bytes of scratch memory that bg_run_step needs for these rows and lengths.
EXPORT int64_t bg_step_scratch(const StepOperation* operations, int64_t count, const StepState* state) {
  const Room room(operations, count, *state);
  return room.input + state->threads * room.attention;
}

// Runs the operations in order; `scratch` is aligned to 64 bytes, `counters` [count] are the threads' own.  0, or what a matrix's function returned.
EXPORT int32_t bg_run_step(const StepOperation* operations, int64_t count, const StepState* state, uint8_t* scratch, int64_t* counters) {
  const Room room(operations, count, *state);
  std::fill(counters, counters + count, int64_t(0));
  for (int64_t first = 0; first < count;) {
    if (runs_alone(operations[first])) {
      if (const int32_t status = run_alone(operations[first], *state)) return status;
      ++first;
      continue;
    }
    int64_t last = first;
    while (last < count && !runs_alone(operations[last])) ++last;
#pragma omp parallel num_threads(int(state->threads)) if (is_shared(operations + first, operations + last, *state))
    {
      Worker worker(*state, room, scratch, omp_get_thread_num(), omp_get_num_threads());
      for (int64_t i = first; i < last; ++i) worker.run(operations[i], counters + i);
    }
    first = last;
  }
  return 0;
}
