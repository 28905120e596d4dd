#include "expert_products.hpp"

#include <algorithm>
#include <cstring>

#include "scalar.hpp"

namespace bitgrain {
namespace {

// Bytes of packed weights of one task: enough to hide its start, few enough to spread over the threads.
constexpr int64_t TASK_BYTES = 96 * 1024;
// Rows of one task: what a core's second-level cache keeps of them while panels pass over.
constexpr int64_t TASK_ROWS = 64;
// Panels that the block kernels take at once.
constexpr int64_t BLOCK_PANELS = 4;

int64_t unit_bytes(int64_t code_kind) {
  switch (code_kind) {
    case NIBBLE:
    case TABLE4: return 64;
    case DENSE_BF16:
    case DENSE_F16: return 256;
    case DENSE_F32: return 512;
    default: return 128;
  }
}

}  // namespace

ExpertProducts::ExpertProducts(const Kernels& kernels, const ExpertMatrix* matrices, const ExpertSide& side, const std::vector<Share>& shares,
                               const PairInput& input, void* y, int32_t y_dtype, bool with_bias, const float* row_scale)
    : kernels_(kernels), matrices_(matrices), side_(side), shares_(shares), input_(input), y_(y), y_dtype_(y_dtype), with_bias_(with_bias), row_scale_(row_scale) {
  for (const Share& share : shares_) {
    share_of_.resize(size_t(share.end), int32_t(&share - shares_.data()));
    pairs_ = share.end;
  }
  plan_rows();
  plan_tasks();
}

void ExpertProducts::plan_rows() {
  if (shares_.empty()) return;
  if (side_.family == BLOCKS) return plan_blocks();
  if (side_.family == INTEGER) {
    integer_.resize(shares_.size());
  } else {
    grouped_.resize(shares_.size());
    splits_.resize(shares_.size());
  }
  int64_t padded = 0;
  for (size_t i = 0; i < shares_.size(); ++i) plan_share(int64_t(i), padded);
  if (side_.family == INTEGER) {
    const int64_t row_bytes = matrices_[0].units * 4, size = padded * row_bytes + 64;
    bytes_ = uncleared<uint8_t>(size);
    scales_ = uncleared<float>(padded);
    zeros_ = uncleared<int32_t>(padded);
    int64_t at = 0;
    for (size_t i = 0; i < shares_.size(); ++i) {
      const int64_t rows = integer_[i].rows, end = round_up(rows, 16);
      integer_[i].a = bytes_.get() + at * row_bytes;
      integer_[i].a_scale = scales_.get() + at;
      integer_[i].a_zero = zeros_.get() + at;
      std::memset(bytes_.get() + (at + rows) * row_bytes, 0, size_t((end - rows) * row_bytes));  // kernels with tiles read whole tiles
      at += end;
    }
    std::memset(bytes_.get() + padded * row_bytes, 0, 64);
    return;
  }
  int64_t width = 0, groups = 0, chunks = 0;
  for (size_t i = 0; i < shares_.size(); ++i) {
    width = std::max(width, grouped_[i].units * UNIT);
    groups = std::max(groups, grouped_[i].groups);
    chunks = std::max(chunks, splits_[i].chunk_count);
  }
  if (narrow_) {
    const int64_t row_width = round_up(width, STEP);
    wide16_ = uncleared<uint16_t>(padded * row_width);
    sums_ = uncleared<float>(summed_ ? pairs_ * groups : 0);
    int64_t at = 0, most = 0;
    for (const GroupedArgs& args : grouped_) most += most_segments(args);
    cut_blocks_.resize(size_t(most));
    cut_segments_.resize(size_t(most));
    most = 0;
    for (size_t i = 0; i < shares_.size(); ++i) {
      GroupedArgs& args = grouped_[i];
      const int64_t end = args.rows <= 16 ? args.rows : round_up(args.rows, 16), own = round_up(args.units * UNIT, STEP);
      args.x16 = wide16_.get() + at * row_width;
      if (summed_) args.x_sums = sums_.get() + shares_[i].begin * groups;
      std::memset(wide16_.get() + at * row_width + args.rows * own, 0, size_t((end - args.rows) * own) * 2);
      at += end;
      cuts_.push_back(cut_features(args, cut_blocks_.data() + most, cut_segments_.data() + most));
      most += most_segments(args);
    }
    return;
  }
  shared_ = !side_.gathered && input_.rows != nullptr;
  const int64_t rows = shared_ ? input_.distinct : pairs_, row_bytes = split_row_bytes(width / UNIT);
  wide_ = uncleared<float>(rows * width);
  sums_ = uncleared<float>(summed_ ? rows * groups : 0);
  bytes_ = uncleared<uint8_t>(fixed_ ? rows * row_bytes : 0);
  whole_ = uncleared<uint8_t>(fixed_ ? rows : 0);
  chunks_ = uncleared<Chunk>(rows * chunks);
  for (size_t i = 0; i < shares_.size(); ++i) {
    GroupedArgs& args = grouped_[i];
    const int64_t first = shared_ ? 0 : shares_[i].begin;
    args.x = wide_.get() + first * width;
    args.x_rows = shared_ ? input_.rows + shares_[i].begin : nullptr;
    if (summed_) args.x_sums = sums_.get() + first * groups;
    splits_[i] = {bytes_.get() + first * row_bytes, chunks_.get() + first * chunks, whole_.get() + first, row_bytes, splits_[i].chunk_count};
    if (fixed_) args.split = &splits_[i];
  }
}

void ExpertProducts::plan_blocks() {
  std::vector<int64_t> starts;
  int64_t size = 0;
  for (const Share& share : shares_) {
    starts.push_back(size);
    size += round_up(block_input_bytes(share.end - share.begin, side_.k), 64);
  }
  bytes_ = uncleared<uint8_t>(size);
  const int64_t row_bytes = side_.n * (y_dtype_ == F32 ? 4 : 2);
  for (size_t i = 0; i < shares_.size(); ++i) {
    const Share& share = shares_[i];
    const ExpertMatrix& matrix = matrices_[share.expert];
    BlockFormat format;
    std::memcpy(&format, matrix.scale, sizeof format);
    blocks_.push_back({{format, matrix.codes, matrix.second, side_.n, side_.k},
                       bytes_.get() + starts[i],
                       with_bias_ ? matrix.bias : nullptr,
                       static_cast<uint8_t*>(y_) + share.begin * row_bytes,
                       share.end - share.begin});
  }
}

void ExpertProducts::plan_share(int64_t share, int64_t& padded) {
  const Share& part = shares_[size_t(share)];
  const ExpertMatrix& matrix = matrices_[part.expert];
  const int64_t rows = part.end - part.begin, row_bytes = side_.n * (y_dtype_ == F32 ? 4 : 2);
  void* y = static_cast<uint8_t*>(y_) + part.begin * row_bytes;
  const void* bias = with_bias_ ? matrix.bias : nullptr;
  if (side_.family == INTEGER) {
    integer_[size_t(share)] = {nullptr, nullptr, nullptr, matrix.codes, static_cast<const float*>(matrix.scale), matrix.column_sums, bias, y, rows, side_.n, matrix.units, y_dtype_};
    padded += round_up(rows, 16);
    return;
  }
  GroupedArgs& args = grouped_[size_t(share)];
  args = {};
  args.codes = matrix.codes;
  args.scale = matrix.scale;
  args.zero = matrix.zero;
  args.second = matrix.second;
  args.table = matrix.table;
  args.whole_table = matrix.whole_table;
  args.group_ends = matrix.group_ends;
  args.row_scale = row_scale_ ? row_scale_ + part.begin : nullptr;
  args.bias = bias;
  args.y = y;
  args.rows = rows;
  args.n = side_.n;
  args.units = matrix.units;
  args.groups = matrix.groups;
  args.code_kind = int32_t(side_.code_kind);
  args.scale_dtype = int32_t(side_.scale_dtype);
  args.zero_is_float = int32_t(side_.zero_is_float);
  args.y_dtype = y_dtype_;
  args.zero_constant = float(matrix.zero_constant);
  args.whole_step = float(matrix.whole_step);
  // the experts of a layer are alike: groups end at whole steps in all of them or in none, and so on
  if (share == 0) {
    narrow_ = input_.dtype == BF16 && kernels_.grouped16 != nullptr;
    for (const Share& each : shares_) narrow_ = narrow_ && whole_steps(matrices_[each.expert].group_ends, matrices_[each.expert].groups);
    narrow_ = narrow_ && exact_in_bf16(args);
    summed_ = false;
    for (const Share& each : shares_) summed_ = summed_ || matrices_[each.expert].zero != nullptr || matrices_[each.expert].zero_constant != 0.0;
    fixed_ = !narrow_ && has_fixed(kernels_, args);
  }
  if (fixed_) splits_[size_t(share)].chunk_count = count_chunks(args.group_ends, args.groups);
  padded += rows <= 16 ? rows : round_up(rows, 16);
}

int64_t ExpertProducts::panel_bytes(const Share& share) const {
  const ExpertMatrix& matrix = matrices_[share.expert];
  if (side_.family == BLOCKS) return block_panel_bytes(blocks_[0].weight.format, side_.k);
  return matrix.units * (side_.family == INTEGER ? 64 : unit_bytes(side_.code_kind));
}

void ExpertProducts::plan_tasks() {
  const int64_t panels = count_panels(side_.n);
  const bool tiles = side_.family == INTEGER && kernels_.tiles;
  for (size_t i = 0; i < shares_.size(); ++i) {
    const int64_t rows = shares_[i].end - shares_[i].begin, fitting = TASK_BYTES / panel_bytes(shares_[i]);
    const int64_t step = narrow_ || tiles ? int64_t(WIDE) : std::max<int64_t>(side_.family == BLOCKS ? BLOCK_PANELS : 1, fitting);
    const int64_t row_step = narrow_ ? ROW_BLOCK : tiles || side_.family == BLOCKS ? rows : TASK_ROWS;
    for (int64_t row = 0; row < rows; row += row_step) {
      for (int64_t panel = 0; panel < panels; panel += step) {
        tasks_.push_back({int64_t(i), panel, std::min(panels, panel + step), row, std::min(rows, row + row_step)});
      }
    }
  }
}

void ExpertProducts::prepare(int64_t row, ThreadMemory& memory) {
  if (shared_) {
    prepare_float(grouped_[0], nullptr, row, row, splits_[0]);
    return;
  }
  const int64_t share = share_of_[size_t(row)];
  if (side_.family == BLOCKS) {
    const BlockProduct& product = blocks_[size_t(share)];
    const int64_t at = row - shares_[size_t(share)].begin, from = input_.rows ? input_.rows[row] : row;
    const uint8_t* x = static_cast<const uint8_t*>(input_.x) + from * side_.k * (input_.dtype == F32 ? 4 : 2);
    // a stride of zero: the row is the one that x points at
    return block_kernels().prepare(product.weight.format, x, input_.dtype, 0, side_.k, product.rows, at, at + 1, EXACT_INPUT, product.input);
  }
  if (side_.family == INTEGER) return prepare_integer(share, row, memory);
  if (narrow_) return prepare_narrow(share, row);
  prepare_float(grouped_[size_t(share)], matrices_[shares_[size_t(share)].expert].gather, input_.rows ? input_.rows[row] : row,
                row - shares_[size_t(share)].begin, splits_[size_t(share)]);
}

void ExpertProducts::prepare_float(const GroupedArgs& args, const int32_t* gather, int64_t from, int64_t to, const SplitRows& split) {
  const int64_t width = args.units * UNIT;
  float* x = const_cast<float*>(args.x) + to * width;
  widen_row(input_.x, input_.dtype, from, side_.k, width, gather, x);
  if (summed_) sum_row(x, args.group_ends, args.groups, const_cast<float*>(args.x_sums) + to * args.groups);
  if (fixed_) kernels_.split(x, args.group_ends, args.groups, split, to);
}

void ExpertProducts::prepare_narrow(int64_t share, int64_t pair) {
  const GroupedArgs& args = grouped_[size_t(share)];
  const int64_t begin = shares_[size_t(share)].begin, width = round_up(args.units * UNIT, STEP), from = input_.rows ? input_.rows[pair] : pair;
  uint16_t* x = const_cast<uint16_t*>(args.x16) + (pair - begin) * width;
  place_row16(static_cast<const uint16_t*>(input_.x) + from * side_.k, side_.k, args.units * UNIT, width, matrices_[shares_[size_t(share)].expert].gather, x);
  if (summed_) sum_row16(x, width, args.group_ends, args.groups, const_cast<float*>(args.x_sums) + (pair - begin), args.rows);
}

void ExpertProducts::prepare_integer(int64_t share, int64_t pair, ThreadMemory& memory) {
  const IntegerArgs& args = integer_[size_t(share)];
  const ExpertMatrix& matrix = matrices_[shares_[size_t(share)].expert];
  const int64_t at = pair - shares_[size_t(share)].begin;
  widen_row(input_.x, input_.dtype, input_.rows ? input_.rows[pair] : pair, side_.k, side_.k, nullptr, memory.row.get());
  const QuantizeArgs quantize = {memory.row.get(),
                                 const_cast<uint8_t*>(args.a) + at * args.quads * 4,
                                 const_cast<float*>(args.a_scale) + at,
                                 const_cast<int32_t*>(args.a_zero) + at,
                                 1,
                                 side_.k,
                                 args.quads,
                                 int32_t(side_.rules & 1),
                                 int32_t(side_.ranges),
                                 float(matrix.static_scale),
                                 int32_t(matrix.static_zero),
                                 float(side_.top),
                                 int32_t(side_.rules & 2)};
  kernels_.quantize(quantize, Range(), 0, 1);
}

void ExpertProducts::run(const Task& task, const ThreadMemory& memory) const {
  if (side_.family == INTEGER) return kernels_.integer(integer_[size_t(task.share)], task.panel, task.panel_end, task.row, task.row_end);
  if (side_.family == BLOCKS) {
    const BlockProduct& product = blocks_[size_t(task.share)];
    return block_kernels().panels(product.weight, product.input, product.rows, task.panel, task.panel_end, product.bias, product.y, y_dtype_, side_.n);
  }
  const GroupedArgs& args = grouped_[size_t(task.share)];
  if (narrow_) return kernels_.grouped16(args, with_memory(cuts_[size_t(task.share)], aligned(memory.cut)), task.panel, task.panel_end, task.row, task.row_end);
  grouped_part(kernels_, args, task.panel, task.panel_end, task.row, task.row_end);
}

}  // namespace bitgrain
