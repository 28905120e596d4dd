#include "linear.hpp"

#include <algorithm>

namespace bitgrain {
namespace {

// As many rows of x as the second-level cache keeps while all panels pass over them.
constexpr int64_t CACHED_ROWS_BYTES = 1 << 20;

// Panels that one call computes at most: what it prepares of the activations serves all of them.
constexpr int64_t PANELS_TOGETHER = 8;

// Kernels with tiles read whole tiles: up to 15 rows and 63 bytes more.
constexpr int64_t TILE_ROWS = 16, TILE_SLACK = 64;

int64_t panels_at_once(int64_t panels, int32_t threads) { return std::max<int64_t>(1, std::min(PANELS_TOGETHER, panels / threads)); }

int64_t rows_at_once(int64_t row_bytes) { return std::max<int64_t>(8, (CACHED_ROWS_BYTES / row_bytes) & ~int64_t(7)); }

Tasks narrow_tasks(int64_t rows, int64_t n, int64_t row_step) { return {rows, row_step, count_panels(n), WIDE}; }

Tasks cached_tasks(int64_t rows, int64_t n, int64_t row_bytes, int32_t threads) {
  return {rows, rows_at_once(row_bytes), count_panels(n), panels_at_once(count_panels(n), threads)};
}

}  // namespace

GroupedProduct::GroupedProduct(const Kernels& kernels, const GroupedArgs& args, const void* x, int32_t x_dtype, int64_t k, const int32_t* gather, int32_t threads)
    : kernels_(kernels), args_(args), x_(x), x_dtype_(x_dtype), k_(k), gather_(gather),
      narrow_(x_dtype == BF16 && kernels.grouped16 != nullptr && whole_steps(args.group_ends, args.groups) && exact_in_bf16(args)),
      summed_(args.zero != nullptr || args.zero_constant != 0.0f), fixed_(!narrow_ && has_fixed(kernels, args)),
      tasks_(narrow_ ? narrow_tasks(args.rows, args.n, ROW_BLOCK) : cached_tasks(args.rows, args.n, args.units * UNIT * int64_t(sizeof(float)), threads)) {}

int64_t GroupedProduct::place(uint8_t* memory) {
  if (narrow_) return place_narrow(memory);
  Parts parts(memory);
  args_.x = wide_ = parts.take<float>(args_.rows * args_.units * UNIT);
  sums_ = parts.take<float>(summed_ ? args_.rows * args_.groups : 0);
  args_.x_sums = summed_ ? sums_ : nullptr;
  if (fixed_) {
    split_.row_bytes = split_row_bytes(args_.units);
    split_.chunk_count = count_chunks(args_.group_ends, args_.groups);
    split_.bytes = parts.take<uint8_t>(args_.rows * split_.row_bytes);
    split_.whole = parts.take<uint8_t>(args_.rows);
    split_.chunks = parts.take<Chunk>(args_.rows * split_.chunk_count);
    args_.split = &split_;
  }
  return parts.bytes();
}

int64_t GroupedProduct::place_narrow(uint8_t* memory) {
  const int64_t width = round_up(args_.units * UNIT, STEP), most = most_segments(args_);
  Parts parts(memory);
  padded_ = args_.rows <= 16 ? args_.rows : round_up(args_.rows, 16);
  const bool as_it_is = gather_ == nullptr && k_ == width && args_.rows == padded_;
  placed_ = as_it_is ? nullptr : parts.take<uint16_t>(padded_ * width);
  args_.x16 = as_it_is ? static_cast<const uint16_t*>(x_) : placed_;
  sums_ = parts.take<float>(summed_ ? args_.rows * args_.groups : 0);
  args_.x_sums = summed_ ? sums_ : nullptr;
  cut_ = parts.take<Cut>(1);
  blocks_ = parts.take<Block>(most);
  segments_ = parts.take<Segment>(most);
  return parts.bytes();
}

void GroupedProduct::prepare(int64_t first, int64_t last) const {
  if (narrow_) return prepare_narrow(first, last);
  const int64_t width = args_.units * UNIT;
  for (int64_t row = first; row < last; ++row) {
    float* const to = wide_ + row * width;
    widen_row(x_, x_dtype_, row, k_, width, gather_, to);
    if (summed_) sum_row(to, args_.group_ends, args_.groups, sums_ + row * args_.groups);
    if (fixed_) kernels_.split(to, args_.group_ends, args_.groups, split_, row);
  }
}

// The first row's thread cuts K, the last row's clears the rows behind it.
void GroupedProduct::prepare_narrow(int64_t first, int64_t last) const {
  if (first == last) return;
  const int64_t width = round_up(args_.units * UNIT, STEP);
  if (first == 0) *cut_ = cut_features(args_, blocks_, segments_);
  for (int64_t row = first; row < last; ++row) {
    if (placed_ != nullptr) place_row16(static_cast<const uint16_t*>(x_) + row * k_, k_, args_.units * UNIT, width, gather_, placed_ + row * width);
    if (summed_) sum_row16(args_.x16 + row * width, width, args_.group_ends, args_.groups, sums_ + row, args_.rows);
  }
  if (last == args_.rows && placed_ != nullptr) std::fill(placed_ + last * width, placed_ + padded_ * width, uint16_t(0));
}

void GroupedProduct::run(int64_t task, uint8_t* own) const {
  const int64_t panel = tasks_.panel(task), panel_end = tasks_.panel_end(task), row = tasks_.row(task), row_end = tasks_.row_end(task);
  if (narrow_) return kernels_.grouped16(args_, with_memory(*cut_, own), panel, panel_end, row, row_end);
  grouped_part(kernels_, args_, panel, panel_end, row, row_end);
}

void run_grouped(const Kernels& kernels, const GroupedArgs& args, const void* x, int32_t x_dtype, int64_t k, const int32_t* gather, int32_t threads) {
  run_alone(GroupedProduct(kernels, args, x, x_dtype, k, gather, threads), threads);
}

IntegerProduct::IntegerProduct(const Kernels& kernels, const QuantizeArgs& quantize, const IntegerArgs& args, const void* x, int32_t x_dtype, int32_t threads)
    : kernels_(kernels), quantize_(quantize), args_(args), x_(x), x_dtype_(x_dtype),
      tasks_(kernels.tiles ? narrow_tasks(args.rows, args.n, std::max<int64_t>(1, args.rows)) : cached_tasks(args.rows, args.n, args.quads * 4, threads)) {}

int64_t IntegerProduct::place(uint8_t* memory) {
  Parts parts(memory);
  const int64_t rows = args_.rows;
  wide_ = parts.take<float>(x_dtype_ == F32 ? 0 : rows * quantize_.k);
  ranges_ = parts.take<Range>(measures() ? rows : 0);
  quantize_.x = x_dtype_ == F32 ? static_cast<const float*>(x_) : wide_;
  args_.a = quantize_.a = parts.take<uint8_t>(round_up(rows, TILE_ROWS) * args_.quads * 4 + TILE_SLACK);
  args_.a_scale = quantize_.scale = parts.take<float>(rows);
  args_.a_zero = quantize_.zero = parts.take<int32_t>(rows);
  return parts.bytes();
}

void IntegerProduct::widen(int64_t row) const {
  if (x_dtype_ != F32) widen_row(x_, x_dtype_, row, quantize_.k, quantize_.k, nullptr, wide_ + row * quantize_.k);
}

void IntegerProduct::measure(int64_t first, int64_t last) const {
  for (int64_t row = first; row < last; ++row) {
    widen(row);
    ranges_[row] = Range();
    kernels_.widen_range(quantize_.x + row * quantize_.k, quantize_.k, ranges_[row]);
  }
}

void IntegerProduct::prepare(int64_t first, int64_t last) const {
  if (first == last) return;
  Range whole;
  for (int64_t row = 0; measures() && row < args_.rows; ++row) {
    whole = {std::min(whole.low, ranges_[row].low), std::max(whole.high, ranges_[row].high), whole.nan || ranges_[row].nan};
  }
  for (int64_t row = first; row < last; ++row) {
    if (!measures()) widen(row);
    kernels_.quantize(quantize_, whole, row, row + 1);
  }
  const int64_t row_bytes = args_.quads * 4;
  if (last == args_.rows) std::fill(quantize_.a + last * row_bytes, quantize_.a + round_up(last, TILE_ROWS) * row_bytes + TILE_SLACK, uint8_t(0));
}

void IntegerProduct::run(int64_t task, uint8_t*) const {
  kernels_.integer(args_, tasks_.panel(task), tasks_.panel_end(task), tasks_.row(task), tasks_.row_end(task));
}

void run_integer(const Kernels& kernels, const QuantizeArgs& quantize, const IntegerArgs& args, const void* x, int32_t x_dtype, int32_t threads) {
  run_alone(IntegerProduct(kernels, quantize, args, x, x_dtype, threads), threads);
}

DenseProduct::DenseProduct(const DenseArgs& args, const void* x) : args_(args), x_(x), kernel_(dense_kernel()) { args_.width = round_up(args.k, PANEL); }

int64_t DenseProduct::place(uint8_t* memory) {
  Parts parts(memory);
  args_.x = wide_ = parts.take<float>(args_.rows * args_.width);
  return parts.bytes();
}

void DenseProduct::prepare(int64_t first, int64_t last) const {
  for (int64_t row = first; row < last; ++row) widen_row(x_, args_.y_dtype, row, args_.k, args_.width, nullptr, wide_ + row * args_.width);
}

void DenseProduct::run(int64_t task, uint8_t*) const { kernel_(args_, task * DENSE_TASK, std::min((task + 1) * DENSE_TASK, args_.n)); }

void run_quantize(const Kernels& kernels, const QuantizeArgs& args, int32_t threads) {
  Range whole;
  if (args.dynamic == PER_TENSOR) kernels.widen_range(args.x, args.rows * args.k, whole);
#pragma omp parallel for schedule(static) num_threads(threads) if (args.rows > 3)
  for (int64_t row = 0; row < args.rows; ++row) kernels.quantize(args, whole, row, row + 1);
}

}  // namespace bitgrain
