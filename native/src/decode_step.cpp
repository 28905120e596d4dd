// Runs a decode step in one parallel region: each thread owns some of the rows, and does by itself whatever concerns one row alone;
// around each matrix, and around the attention of long contexts, all threads meet.
#include "decode_step.hpp"

#include <omp.h>

#include <algorithm>
#include <cstring>

#include "block_kernels.hpp"
#include "linear.hpp"
#include "step_kernels.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace bitgrain {
namespace {

// Multiplications of an attention below which meeting costs more than sharing saves.
constexpr int64_t WORTH_MEETING = 1 << 14;
constexpr int64_t BLOCK_TASK = 4;  // panels that one thread takes at a time

template <class Call>
const Call& call_of(const StepOperation& operation) {
  return *static_cast<const Call*>(operation.call);
}

uint8_t* at(const StepState& state, const StepPlace& place, int64_t row) {
  const int64_t bytes = state.dtype == F32 ? 4 : 2;
  return static_cast<uint8_t*>(state.buffers[place.buffer]) + (row * state.widths[place.buffer] + place.column) * bytes;
}

int64_t longest(const StepState& state) { return state.rows ? 1 + *std::max_element(state.lengths, state.lengths + state.rows) : 1; }

int64_t attention_room(const AttendCall& call, int64_t total) {
  return call.heads / call.groups * (total + call.size + call.value_size) + call.size + call.value_size;
}

// The matrices, as linear.hpp has its own.

class BlockProduct : public Unmeasured {
 public:
  BlockProduct(const StepOperation& operation, const StepState& state)
      : call_(call_of<BlockCall>(operation)), operation_(operation), state_(state), kernels_(block_kernels()),
        weight_{{}, static_cast<const uint8_t*>(call_.data), call_.factor, call_.n, call_.k} {
    std::memcpy(&weight_.format, call_.format, sizeof weight_.format);
  }

  int64_t rows() const { return state_.rows; }
  int64_t tasks() const { return (count_panels(call_.n) + BLOCK_TASK - 1) / BLOCK_TASK; }
  int64_t own_bytes() const { return 0; }

  int64_t place(uint8_t* memory) {
    input_ = memory;
    return block_input_bytes(state_.rows, call_.k);
  }

  void prepare(int64_t first, int64_t last) const {
    if (first == last) return;
    kernels_.prepare(weight_.format, at(state_, operation_.source, 0), int32_t(state_.dtype), state_.widths[operation_.source.buffer], call_.k, state_.rows,
                     first, last, int32_t(call_.precision), input_);
  }

  void run(int64_t task, uint8_t*) const {
    const int64_t first = task * BLOCK_TASK, last = std::min(first + BLOCK_TASK, count_panels(call_.n));
    kernels_.panels(weight_, input_, state_.rows, first, last, call_.bias, at(state_, operation_.target, 0), int32_t(state_.dtype),
                    state_.widths[operation_.target.buffer]);
  }

 private:
  const BlockCall& call_;
  const StepOperation& operation_;
  const StepState& state_;
  const BlockKernels& kernels_;
  BlockWeight weight_;
  uint8_t* input_ = nullptr;
};

DenseProduct dense_product(const StepOperation& operation, const StepState& state) {
  const DenseCall& call = call_of<DenseCall>(operation);
  return DenseProduct({nullptr, call.weight, call.bias, at(state, operation.target, 0), state.rows, call.n, call.k, 0, int32_t(call.weight_dtype),
                       int32_t(state.dtype)}, at(state, operation.source, 0));
}

GroupedProduct grouped_product(const StepOperation& operation, const StepState& state) {
  const GroupedCall& call = call_of<GroupedCall>(operation);
  GroupedArgs args = {};
  args.codes = static_cast<const uint8_t*>(call.codes);
  args.scale = call.scale;
  args.zero = call.zero;
  args.second = call.second;
  args.table = call.table;
  args.whole_table = call.whole_table;
  args.group_ends = call.group_ends;
  args.bias = call.bias;
  args.y = at(state, operation.target, 0);
  args.rows = state.rows;
  args.n = call.n;
  args.units = call.units;
  args.groups = call.groups;
  args.code_kind = int32_t(call.code_kind);
  args.scale_dtype = int32_t(call.scale_dtype);
  args.zero_is_float = int32_t(call.zero_is_float);
  args.y_dtype = int32_t(state.dtype);
  args.zero_constant = float(call.zero_constant);
  args.whole_step = float(call.whole_step);
  return GroupedProduct(active_kernels(), args, at(state, operation.source, 0), int32_t(state.dtype), call.k, call.gather, int32_t(state.threads));
}

IntegerProduct integer_product(const StepOperation& operation, const StepState& state) {
  const IntegerCall& call = call_of<IntegerCall>(operation);
  const int32_t dtype = int32_t(state.dtype), rules = int32_t(call.rules);
  const QuantizeArgs quantize = {nullptr, nullptr, nullptr, nullptr, state.rows, call.k, call.quads, rules & 1, int32_t(call.ranges), float(call.static_scale),
                                 int32_t(call.static_zero), float(call.top), rules & 2};
  const IntegerArgs args = {nullptr, nullptr, nullptr, static_cast<const uint8_t*>(call.codes), call.scale, call.column_sums, call.bias,
                            at(state, operation.target, 0), state.rows, call.n, call.quads, dtype};
  return IntegerProduct(active_kernels(), quantize, args, at(state, operation.source, 0), dtype, int32_t(state.threads));
}

// Calls `use` with the product of an operation that is a matrix.
template <class Use>
void with_product(const StepOperation& operation, const StepState& state, Use use) {
  switch (operation.kind) {
    case STEP_BLOCK: return use(BlockProduct(operation, state));
    case STEP_DENSE: return use(dense_product(operation, state));
    case STEP_GROUPED: return use(grouped_product(operation, state));
    case STEP_INTEGER: return use(integer_product(operation, state));
  }
}

// Bytes of one thread's own memory, and of the prepared rows of a matrix.
struct Room {
  int64_t own = 0, input = 0;

  Room(const StepOperation* operations, int64_t count, const StepState& state) {
    const int64_t total = longest(state);
    for (const StepOperation* one = operations; one != operations + count; ++one) {
      if (one->kind == STEP_ATTEND) own = std::max(own, attention_room(call_of<AttendCall>(*one), total) * int64_t(sizeof(float)));
      with_product(*one, state, [&](auto&& product) {
        own = std::max(own, product.own_bytes());
        input = std::max(input, product.place(nullptr));
      });
    }
    own = round_up(own, 64);
    input = round_up(input, 64);
  }
};

// One thread's view of a step.
class Worker {
 public:
  Worker(const StepState& state, const Room& room, uint8_t* scratch, int64_t thread, int64_t threads)
      : state_(state), steps_(step_kernels()), bytes_(state.dtype == F32 ? 4 : 2), thread_(thread),
        threads_(threads), first_(first_row(state.rows, thread, threads)), last_(first_row(state.rows, thread + 1, threads)), input_(scratch),
        own_(scratch + room.input + thread * room.own) {}

  void run(const StepOperation& operation, int64_t* next) {
    switch (operation.kind) {
      case STEP_NORM: return norm(operation);
      case STEP_ROTATE: return rotate(operation);
      case STEP_APPEND: return append(operation);
      case STEP_ATTEND: return attend(operation);
      case STEP_GATE: return gate(operation);
      case STEP_ADD: return add(operation);
      default: return with_product(operation, state_, [&](auto&& product) { multiply(product, next); });
    }
  }

 private:
  uint8_t* at(const StepPlace& place, int64_t row) const { return bitgrain::at(state_, place, row); }

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
      steps_.attend(args, first - row * call.groups, end - row * call.groups, reinterpret_cast<float*>(own_));
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

  template <class Product>
  void multiply(Product& product, int64_t* next) const {
    product.place(input_);
    take_part(product, thread_, threads_, next, own_);
#pragma omp barrier
  }

  const StepState& state_;
  const StepKernels& steps_;
  const int64_t bytes_, thread_, threads_, first_, last_;
  uint8_t *const input_, *const own_;
};

}  // namespace
}  // namespace bitgrain

using namespace bitgrain;

// Bytes of scratch memory that bg_run_step needs for these rows and lengths.
EXPORT int64_t bg_step_scratch(const StepOperation* operations, int64_t count, const StepState* state) {
  const Room room(operations, count, *state);
  return room.input + state->threads * room.own;
}

// Runs the operations in order; `scratch` is aligned to 64 bytes, `counters` [count] are the threads' own.  Returns 0.
EXPORT int32_t bg_run_step(const StepOperation* operations, int64_t count, const StepState* state, uint8_t* scratch, int64_t* counters) {
  const Room room(operations, count, *state);
  std::fill(counters, counters + count, int64_t(0));
#pragma omp parallel num_threads(int(state->threads))
  {
    Worker worker(*state, room, scratch, omp_get_thread_num(), omp_get_num_threads());
    for (int64_t i = 0; i < count; ++i) worker.run(operations[i], counters + i);
  }
  return 0;
}
