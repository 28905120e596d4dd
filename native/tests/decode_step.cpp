// bg_run_step: two small layers with every kind of operation, equal to the bit to the functions of the single operations, whatever the threads.
#include <cstdlib>
#include <memory>

#include "weights.hpp"

namespace {

enum Buffers : int64_t { HIDDEN, NORMED, MIXED_INPUT, ATTENDED, ADDED, PAIR, JOINED, LOGITS, BUFFERS };

constexpr int64_t LAYERS = 2, HEADS = 6, GROUPS = 3, SIZE = 16, VALUE_SIZE = 12, HIDDEN_SIZE = 96, JOINED_SIZE = 40, VOCABULARY = 70;
constexpr int64_t KEYS_AT = HEADS * SIZE, VALUES_AT = KEYS_AT + GROUPS * SIZE, INPUT_SIZE = VALUES_AT + GROUPS * VALUE_SIZE + 5;  // 5 that nothing writes
constexpr int64_t WIDTHS[BUFFERS] = {HIDDEN_SIZE, HIDDEN_SIZE, INPUT_SIZE, HEADS * VALUE_SIZE, HIDDEN_SIZE, 2 * JOINED_SIZE, JOINED_SIZE, VOCABULARY};

// What a step changes, each part in memory without slack.
struct Memory {
  std::vector<Numbers> buffers;  // [rows, width]
  std::vector<Numbers> stores;   // [rows][layers][keys, values] of as many tokens as the step leaves

  Memory copy() const {
    Memory other;
    for (const Numbers& numbers : buffers) other.buffers.push_back(copied(numbers));
    for (const Numbers& numbers : stores) other.stores.push_back(copied(numbers));
    return other;
  }

 private:
  static Numbers copied(const Numbers& from) {
    Numbers to(from.dtype, from.size());
    std::memcpy(to.data(), from.data(), size_t(from.size()) * (from.dtype == F32 ? 4 : 2));
    return to;
  }
};

class Step {
 public:
  Step(Random& random, int64_t rows, int32_t dtype, bool is_long) : random_(random), rows_(rows), dtype_(dtype), bytes_(dtype == F32 ? 4 : 2) {
    for (int64_t row = 0; row < rows; ++row) lengths_.push_back(row == 1 ? 0 : is_long && row % 2 == 0 ? random.between(400, 500) : random.between(0, 40));
    for (const int64_t turned : {SIZE, SIZE / 2}) {
      cosine_.push_back(random_numbers(random, dtype, rows * turned));
      sine_.push_back(random_numbers(random, dtype, rows * turned));
      angles_.push_back({cosine_.back().data(), sine_.back().data(), turned});
    }
    for (int64_t layer = 0; layer < LAYERS; ++layer) add_layer(layer);
    add_norm({HIDDEN, 0}, {NORMED, 0}, HIDDEN_SIZE, 1);
    add_dense({NORMED, 0}, {LOGITS, 0}, VOCABULARY, HIDDEN_SIZE);
  }

  Memory start() const {
    Memory memory;
    for (const int64_t width : WIDTHS) memory.buffers.push_back(random_numbers(random_, dtype_, rows_ * width));
    for (const int64_t length : lengths_) {
      for (int64_t place = 0; place < 2 * LAYERS; ++place) memory.stores.push_back(random_numbers(random_, dtype_, (length + 1) * store_width(place)));
    }
    return memory;
  }

  int32_t run(Memory& memory, int64_t threads) const {
    std::vector<void*> buffers, stores;
    std::vector<void* const*> rows;
    for (Numbers& numbers : memory.buffers) buffers.push_back(numbers.data());
    for (Numbers& numbers : memory.stores) stores.push_back(numbers.data());
    for (int64_t row = 0; row < rows_; ++row) rows.push_back(&stores[size_t(row * 2 * LAYERS)]);
    const StepState state = {buffers.data(), WIDTHS, angles_.data(), rows.data(), lengths_.data(), rows_, dtype_, threads};
    const int64_t count = int64_t(operations_.size()), size = native::bg_step_scratch(operations_.data(), count, &state);
    expect(size > 0 && size % 64 == 0, "scratch of a step");
    const std::unique_ptr<void, void (*)(void*)> scratch(std::aligned_alloc(64, size_t(size)), std::free);
    Buffer<int64_t> counters(count);
    for (int64_t i = 0; i < count; ++i) counters[i] = -7;  // the step begins with zeros of its own
    return native::bg_run_step(operations_.data(), count, &state, static_cast<uint8_t*>(scratch.get()), counters.data());
  }

  // The same by the other functions, row after row; where one range serves all rows, these together.
  void run_singly(Memory& memory) const {
    for (const StepOperation& operation : operations_) {
      if (operation.kind == STEP_INTEGER && static_cast<const IntegerCall*>(operation.call)->ranges == PER_TENSOR) {
        std::memcpy(const_cast<void*>(at(memory, operation.target, 0)), integer(operation, at(memory, operation.source, 0), rows_).data(),
                    size_t(rows_ * WIDTHS[operation.target.buffer] * bytes_));
        continue;
      }
      for (int64_t row = 0; row < rows_; ++row) run_row(memory, operation, row);
    }
  }

 private:
  static int64_t store_width(int64_t place) { return GROUPS * (place % 2 ? VALUE_SIZE : SIZE); }

  template <class T>
  const T* keep(T value) {
    const auto kept = std::make_shared<T>(std::move(value));
    kept_.push_back(kept);
    return kept.get();
  }

  template <class Call>
  void add(StepKind kind, StepPlace source, StepPlace second, StepPlace target, Call call) {
    operations_.push_back({kind, source, second, target, keep(call)});
  }

  const void* bias(int64_t n) { return keep(random_numbers(random_, dtype_, n))->or_null(random_.coin()); }

  void add_layer(int64_t layer) {
    add_norm({HIDDEN, 0}, {NORMED, 0}, HIDDEN_SIZE, 1);
    add_block({NORMED, 0}, {MIXED_INPUT, 0}, KEYS_AT, HIDDEN_SIZE);
    add_block({NORMED, 32}, {MIXED_INPUT, KEYS_AT}, INPUT_SIZE - 5 - KEYS_AT, 64);
    add_norm({MIXED_INPUT, 0}, {MIXED_INPUT, 0}, SIZE, HEADS);
    add_norm({MIXED_INPUT, KEYS_AT}, {MIXED_INPUT, KEYS_AT}, SIZE, GROUPS);
    add(STEP_ROTATE, {MIXED_INPUT, 0}, {}, {}, RotateCall{SIZE, HEADS, layer, layer});
    add(STEP_ROTATE, {MIXED_INPUT, KEYS_AT}, {}, {}, RotateCall{SIZE, GROUPS, layer, layer});
    add(STEP_APPEND, {MIXED_INPUT, KEYS_AT}, {MIXED_INPUT, VALUES_AT}, {}, AppendCall{layer, GROUPS * SIZE, GROUPS * VALUE_SIZE});
    const float* const sinks = keep(random_floats(random_, HEADS))->or_null(random_.coin());
    add(STEP_ATTEND, {MIXED_INPUT, 0}, {}, {ATTENDED, 0}, AttendCall{sinks, layer, HEADS, GROUPS, SIZE, VALUE_SIZE, layer ? 30 : 0, 0.25, random_.coin() ? 3.0 : 0.0});
    add_dense({ATTENDED, 0}, {ADDED, 0}, HIDDEN_SIZE, HEADS * VALUE_SIZE);
    add(STEP_ADD, {ADDED, 0}, {}, {HIDDEN, 0}, WidthCall{HIDDEN_SIZE});
    add_norm({HIDDEN, 0}, {NORMED, 0}, HIDDEN_SIZE, 1);
    add_grouped({NORMED, 0}, {PAIR, 0}, 2 * JOINED_SIZE, HIDDEN_SIZE);
    add(STEP_GATE, {PAIR, 0}, {PAIR, JOINED_SIZE}, {JOINED, 0}, WidthCall{JOINED_SIZE});
    add_integer({JOINED, 0}, {ADDED, 0}, HIDDEN_SIZE, JOINED_SIZE);
    add(STEP_ADD, {ADDED, 0}, {}, {HIDDEN, 0}, WidthCall{HIDDEN_SIZE});
  }

  void add_norm(StepPlace source, StepPlace target, int64_t size, int64_t heads) {
    const bool wide = random_.coin();
    const int32_t weight_dtype = wide && random_.coin() ? int32_t(F32) : dtype_;
    const void* const weight = keep(random_numbers(random_, weight_dtype, size))->data();
    add(STEP_NORM, source, {}, target, NormCall{weight, bias(size), size, heads, wide, weight_dtype, 1e-5});
  }

  void add_block(StepPlace source, StepPlace target, int64_t n, int64_t k) {
    const BlockFormat format = {int32_t(random_.below(BLOCK_CODES)), NO_SUB, random_.coin() ? NO_MINIMUM : ADDED_MINIMUM, int32_t(random_.below(3)), 32, 32, 8};
    const BlockWeights* const weight = keep(BlockWeights(random_, format, n, k));
    add(STEP_BLOCK, source, {}, target, BlockCall{&weight->format.code, weight->panels.data(), weight->factor.or_null(weight->has_factor), bias(n), n, k, random_.coin()});
  }

  void add_dense(StepPlace source, StepPlace target, int64_t n, int64_t k) {
    const Numbers* const weight = keep(random_numbers(random_, int32_t(random_.below(3)), n * k, 0.05));
    add(STEP_DENSE, source, {}, target, DenseCall{weight->data(), bias(n), n, k, weight->dtype});
  }

  void add_grouped(StepPlace source, StepPlace target, int64_t n, int64_t k) {
    const int32_t kinds[] = {NIBBLE, BYTE, E4M3, TABLE4, DENSE_BF16, DENSE_F16, DENSE_F32};  // halves overflow over E5M2, and without scales
    GroupedWeight made(random_, random_.of(kinds), n, k, random_.coin());
    while (!made.scaled) made = GroupedWeight(random_, random_.of(kinds), n, k, random_.coin());
    for (int64_t i = 0; i < made.scale.size(); ++i) made.scale.set(i, made.scale[i] / 256);
    const GroupedWeight& weight = *keep(std::move(made));
    add(STEP_GROUPED, source, {}, target,
        GroupedCall{weight.gather.or_null(weight.gathered), weight.codes.data(), weight.scale.or_null(weight.scaled), weight.second.or_null(weight.has_second),
                    weight.table.or_null(weight.kind == TABLE4), weight.whole_table.or_null(weight.whole), weight.zeros(), weight.group_ends.data(), bias(n), n, k,
                    weight.kind, weight.scale_dtype, weight.zero_is_float, weight.groups, weight.units, weight.zero_constant, weight.whole_step});
  }

  void add_integer(StepPlace source, StepPlace target, int64_t n, int64_t k) {
    IntegerWeight made(random_, n, k);
    for (int64_t i = 0; i < made.scale.size(); ++i) made.scale[i] /= 1024;
    const IntegerWeight& weight = *keep(std::move(made));
    const int64_t rules = random_.below(4), ranges = random_.below(3);
    add(STEP_INTEGER, source, {}, target, IntegerCall{weight.codes.data(), weight.scale.data(), weight.sums.data(), bias(n), n, k, weight.quads, rules, ranges,
                                                      rules & 1 ? 0 : 11, 0.02, rules & 2 ? 127.0 : 127.5});
  }

  const void* at(const Memory& memory, const StepPlace& place, int64_t row) const {
    return memory.buffers[size_t(place.buffer)].from(row * WIDTHS[place.buffer] + place.column);
  }

  void write(Memory& memory, const StepPlace& place, int64_t row, const Numbers& values) const {
    std::memcpy(const_cast<void*>(at(memory, place, row)), values.data(), size_t(values.size() * bytes_));
  }

  void run_row(Memory& memory, const StepOperation& operation, int64_t row) const {
    const void* const x = at(memory, operation.source, row);
    const int64_t length = lengths_[size_t(row)];
    Numbers* const stores = &memory.stores[size_t(row * 2 * LAYERS)];
    switch (operation.kind) {
      case STEP_NORM: {
        const NormCall& call = *static_cast<const NormCall*>(operation.call);
        Numbers y(dtype_, call.heads * call.size);
        native::bg_norm(x, call.heads, call.size, call.size, call.weight, int32_t(call.weight_dtype), call.bias, float(call.eps), int32_t(call.wide), dtype_, y.data(), 1);
        return write(memory, operation.target, row, y);
      }
      case STEP_ROTATE: {
        const RotateCall& call = *static_cast<const RotateCall*>(operation.call);
        const size_t which = size_t(call.angles);
        const int64_t turned = angles_[which].turned;
        Numbers y(dtype_, call.heads * call.size);
        native::bg_rotate(x, 1, call.heads, call.size, call.heads * call.size, cosine_[which].from(row * turned), sine_[which].from(row * turned), turned,
                          int32_t(call.interleaved), dtype_, y.data(), 1);
        return write(memory, operation.source, row, y);
      }
      case STEP_APPEND: {
        const AppendCall& call = *static_cast<const AppendCall*>(operation.call);
        Numbers &keys = stores[2 * call.layer], &values = stores[2 * call.layer + 1];
        std::memcpy(const_cast<void*>(keys.from(length * call.key_width)), x, size_t(call.key_width * bytes_));
        std::memcpy(const_cast<void*>(values.from(length * call.value_width)), at(memory, operation.second, row), size_t(call.value_width * bytes_));
        return;
      }
      case STEP_ATTEND: {
        const AttendCall& call = *static_cast<const AttendCall*>(operation.call);
        Numbers y(dtype_, call.heads * call.value_size);
        native::bg_attend(x, 1, call.heads, call.size, call.heads * call.size, stores[2 * call.layer].data(), call.groups * call.size, stores[2 * call.layer + 1].data(),
                          call.groups * call.value_size, length + 1, call.groups, call.value_size, call.window, call.sinks, float(call.scale), float(call.cap), dtype_,
                          y.data(), 1);
        return write(memory, operation.target, row, y);
      }
      case STEP_GATE: {
        const int64_t width = static_cast<const WidthCall*>(operation.call)->width;
        Numbers y(dtype_, width);
        native::bg_gate(x, at(memory, operation.second, row), 1, width, width, dtype_, y.data(), 1);
        return write(memory, operation.target, row, y);
      }
      case STEP_ADD: {
        const int64_t width = static_cast<const WidthCall*>(operation.call)->width;
        const Numbers &from = memory.buffers[size_t(operation.source.buffer)], &to = memory.buffers[size_t(operation.target.buffer)];
        Numbers y(dtype_, width);
        for (int64_t i = 0; i < width; ++i) y.set(i, float(from[row * width + i]) + float(to[row * width + i]));
        return write(memory, operation.target, row, y);
      }
      default: return write(memory, operation.target, row, product(operation, x));
    }
  }

  Numbers integer(const StepOperation& operation, const void* x, int64_t rows) const {
    const IntegerCall& call = *static_cast<const IntegerCall*>(operation.call);
    Numbers y(dtype_, rows * call.n);
    native::bg_integer(x, dtype_, rows, call.k, int32_t(call.rules), int32_t(call.ranges), float(call.static_scale), int32_t(call.static_zero), float(call.top), call.codes,
                       call.scale, call.column_sums, call.quads, call.n, call.bias, y.data(), 1);
    return y;
  }

  // One row times the matrix of an operation.
  Numbers product(const StepOperation& operation, const void* x) const {
    if (operation.kind == STEP_BLOCK) {
      const BlockCall& call = *static_cast<const BlockCall*>(operation.call);
      Numbers y(dtype_, call.n);
      native::bg_block_linear(x, dtype_, 1, call.k, call.format, call.data, call.factor, call.n, call.bias, y.data(), int32_t(call.precision), 1);
      return y;
    }
    if (operation.kind == STEP_DENSE) {
      const DenseCall& call = *static_cast<const DenseCall*>(operation.call);
      Numbers y(dtype_, call.n);
      native::bg_dense(x, 1, call.k, call.weight, int32_t(call.weight_dtype), call.n, call.bias, y.data(), dtype_, 1);
      return y;
    }
    if (operation.kind == STEP_INTEGER) return integer(operation, x, 1);
    const GroupedCall& call = *static_cast<const GroupedCall*>(operation.call);
    Numbers y(dtype_, call.n);
    native::bg_grouped_table(x, dtype_, 1, call.k, call.gather, call.codes, int32_t(call.code_kind), call.scale, int32_t(call.scale_dtype), call.second, call.table,
                             call.whole_table, float(call.whole_step), call.zero, int32_t(call.zero_is_float), float(call.zero_constant), call.group_ends, call.groups,
                             call.units, call.n, nullptr, call.bias, y.data(), dtype_, 1);
    return y;
  }

  Random& random_;
  const int64_t rows_;
  const int32_t dtype_;
  const int64_t bytes_;
  std::vector<int64_t> lengths_;
  std::vector<Numbers> cosine_, sine_;
  std::vector<Angles> angles_;
  std::vector<StepOperation> operations_;
  std::vector<std::shared_ptr<const void>> kept_;
};

void expect_equal(const std::vector<Numbers>& a, const std::vector<Numbers>& b, const std::string& what) {
  for (size_t place = 0; place < a.size(); ++place) {
    bool same = true;
    for (int64_t i = 0; i < a[place].size(); ++i) same = same && a[place].same_bits(i, b[place], i);
    expect(same, what + std::to_string(place));
  }
}

void check(Random& random, int64_t rows, int32_t dtype, bool is_long) {
  const Step step(random, rows, dtype, is_long);
  const Memory start = step.start();
  Memory want = start.copy();
  step.run_singly(want);
  const std::string what = std::string(is_long ? "long" : "short") + " step of " + std::to_string(rows) + " rows, dtype " + std::to_string(dtype);
  const Numbers& logits = want.buffers[LOGITS];
  for (int64_t i = 0; i < logits.size(); ++i) expect(std::isfinite(logits[i]), what + ": finite");
  for (int64_t threads = 1; threads <= 3; ++threads) {
    Memory got = start.copy();
    expect(step.run(got, threads) == 0, what + ": status");
    const std::string with = what + " with " + std::to_string(threads) + " threads";
    expect_equal(got.buffers, want.buffers, with + ": other bits in buffer ");
    expect_equal(got.stores, want.stores, with + ": other bits in keys or values ");
  }
}

}  // namespace

void test_decode_step() {
  const StepState nothing = {nullptr, nullptr, nullptr, nullptr, nullptr, 0, F32, 2};
  expect(native::bg_step_scratch(nullptr, 0, &nothing) == 0 && native::bg_run_step(nullptr, 0, &nothing, nullptr, nullptr) == 0, "a step of no operations");
  Random random(10);
  for (int32_t dtype = F32; dtype <= BF16; ++dtype) {
    for (const int64_t rows : {1, 2, 5}) {
      for (const bool is_long : {false, true}) check(random, rows, dtype, is_long);
    }
  }
}
