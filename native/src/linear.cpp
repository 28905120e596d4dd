#include "linear.hpp"

#include <algorithm>
#include <omp.h>

#include "rows.hpp"

namespace bitgrain {
namespace {

// Activations, in elements, below which a pass over them costs less than waking the other threads.
constexpr int64_t WORTH_SHARING = 1 << 18;
// As many rows of x as the second-level cache keeps while all panels pass over them.
constexpr int64_t CACHED_ROWS_BYTES = 1 << 20;

// Panels that one call computes at most: what it prepares of the activations serves all of them.
constexpr int64_t PANELS_TOGETHER = 8;

int64_t panels_at_once(int64_t panels, int32_t threads) { return std::max<int64_t>(1, std::min(PANELS_TOGETHER, panels / threads)); }

int64_t rows_at_once(int64_t row_bytes) { return std::max<int64_t>(8, (CACHED_ROWS_BYTES / row_bytes) & ~int64_t(7)); }

void share_grouped(const Kernels& kernels, const GroupedArgs& args, int32_t threads) {
  const int64_t panels = count_panels(args.n), block = rows_at_once(args.units * UNIT * int64_t(sizeof(float))), step = panels_at_once(panels, threads);
#pragma omp parallel num_threads(threads) if (panels > 1)
  for (int64_t row = 0; row < args.rows; row += block) {
#pragma omp for schedule(static) nowait
    for (int64_t panel = 0; panel < panels; panel += step) {
      grouped_part(kernels, args, panel, std::min(panels, panel + step), row, std::min(args.rows, row + block));
    }
  }
}

void share_grouped16(const Kernels& kernels, const GroupedArgs& args, int32_t threads) {
  const CutPlan plan(args);
  const int64_t panels = count_panels(args.n), wide = (panels + WIDE - 1) / WIDE, row_blocks = (args.rows + ROW_BLOCK - 1) / ROW_BLOCK;
  std::vector<CutMemory> memory(static_cast<size_t>(threads));
  for (CutMemory& one : memory) one.allocate();
#pragma omp parallel num_threads(threads) if (wide > 1)
  {
    const Cut cut = memory[size_t(omp_get_thread_num())].with(plan);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < row_blocks * wide; ++task) {
      const int64_t panel = task % wide * WIDE, row = task / wide * ROW_BLOCK;
      kernels.grouped16(args, cut, panel, std::min(panel + WIDE, panels), row, std::min(row + ROW_BLOCK, args.rows));
    }
  }
}

void run_narrow(const Kernels& kernels, GroupedArgs& args, const uint16_t* x, int64_t k, const int32_t* gather, int32_t threads) {
  const int64_t width = round_up(args.units * UNIT, STEP), padded = args.rows <= 16 ? args.rows : round_up(args.rows, 16);
  std::unique_ptr<uint16_t[]> placed;
  std::unique_ptr<float[]> sums;
  args.x16 = x;
  if (gather != nullptr || k != width || args.rows != padded) {
    placed = uncleared<uint16_t>(padded * width);
#pragma omp parallel for schedule(static) num_threads(threads) if (args.rows * width > WORTH_SHARING)
    for (int64_t row = 0; row < args.rows; ++row) place_row16(x + row * k, k, args.units * UNIT, width, gather, placed.get() + row * width);
    std::fill(placed.get() + args.rows * width, placed.get() + padded * width, uint16_t(0));
    args.x16 = placed.get();
  }
  if (args.zero != nullptr || args.zero_constant != 0.0f) {
    sums = uncleared<float>(args.rows * args.groups);
#pragma omp parallel for schedule(static) num_threads(threads) if (args.rows * width > WORTH_SHARING)
    for (int64_t row = 0; row < args.rows; ++row) sum_row16(args.x16 + row * width, width, args.group_ends, args.groups, sums.get() + row, args.rows);
    args.x_sums = sums.get();
  }
  share_grouped16(kernels, args, threads);
}

}  // namespace

void run_grouped(const Kernels& kernels, GroupedArgs args, const void* x, int32_t x_dtype, int64_t k, const int32_t* gather, int32_t threads) {
  if (x_dtype == BF16 && kernels.grouped16 != nullptr && whole_steps(args.group_ends, args.groups) && exact_in_bf16(args)) {
    return run_narrow(kernels, args, static_cast<const uint16_t*>(x), k, gather, threads);
  }
  const int64_t rows = args.rows, width = args.units * UNIT;
  const bool summed = args.zero != nullptr || args.zero_constant != 0.0f, fixed = has_fixed(kernels, args);
  SplitRows split = {nullptr, nullptr, nullptr, split_row_bytes(args.units), fixed ? count_chunks(args.group_ends, args.groups) : 0};
  const auto wide = uncleared<float>(rows * width), sums = uncleared<float>(summed ? rows * args.groups : 0);
  const auto bytes = uncleared<uint8_t>(fixed ? rows * split.row_bytes : 0), whole = uncleared<uint8_t>(fixed ? rows : 0);
  const auto chunks = uncleared<Chunk>(rows * split.chunk_count);
  split.bytes = bytes.get();
  split.whole = whole.get();
  split.chunks = chunks.get();
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > 7)
  for (int64_t row = 0; row < rows; ++row) {
    float* to = wide.get() + row * width;
    widen_row(x, x_dtype, row, k, width, gather, to);
    if (summed) sum_row(to, args.group_ends, args.groups, sums.get() + row * args.groups);
    if (fixed) kernels.split(to, args.group_ends, args.groups, split, row);
  }
  args.x = wide.get();
  args.x_sums = summed ? sums.get() : nullptr;
  args.split = fixed ? &split : nullptr;
  share_grouped(kernels, args, threads);
}

void run_quantize(const Kernels& kernels, const QuantizeArgs& args, int32_t threads) {
  Range whole;
  if (args.dynamic == PER_TENSOR) kernels.widen_range(args.x, args.rows * args.k, whole);
#pragma omp parallel for schedule(static) num_threads(threads) if (args.rows > 3)
  for (int64_t row = 0; row < args.rows; ++row) kernels.quantize(args, whole, row, row + 1);
}

void run_integer(const Kernels& kernels, QuantizeArgs quantize, IntegerArgs args, const void* x, int32_t x_dtype, int32_t threads) {
  const int64_t rows = quantize.rows, k = quantize.k, panels = count_panels(args.n);
  const auto wide = uncleared<float>(x_dtype == F32 ? 0 : rows * k), scale = uncleared<float>(rows);
  const auto zero = uncleared<int32_t>(rows);
  // kernels with tiles read whole tiles: up to 15 rows and 63 bytes more
  const int64_t row_bytes = args.quads * 4, size = round_up(rows, 16) * row_bytes + 64;
  const auto a = uncleared<uint8_t>(size);
  std::fill(a.get() + rows * row_bytes, a.get() + size, uint8_t(0));
  if (x_dtype != F32) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > 7)
    for (int64_t row = 0; row < rows; ++row) widen_row(x, x_dtype, row, k, k, nullptr, wide.get() + row * k);
  }
  quantize.x = x_dtype == F32 ? static_cast<const float*>(x) : wide.get();
  args.a = quantize.a = a.get();
  args.a_scale = quantize.scale = scale.get();
  args.a_zero = quantize.zero = zero.get();
  run_quantize(kernels, quantize, threads);
  if (kernels.tiles) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (panels > WIDE)
    for (int64_t panel = 0; panel < panels; panel += WIDE) kernels.integer(args, panel, std::min(panel + WIDE, panels), 0, rows);
    return;
  }
  const int64_t block = rows_at_once(row_bytes), step = panels_at_once(panels, threads);
#pragma omp parallel num_threads(threads) if (panels > 1)
  for (int64_t row = 0; row < rows; row += block) {
#pragma omp for schedule(static) nowait
    for (int64_t panel = 0; panel < panels; panel += step) kernels.integer(args, panel, std::min(panels, panel + step), row, std::min(rows, row + block));
  }
}

}  // namespace bitgrain
