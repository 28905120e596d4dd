#include "rows.hpp"

#include <algorithm>
#include <cstring>

#include "scalar.hpp"

namespace bitgrain {

void widen_row(const void* x, int32_t dtype, int64_t row, int64_t k, int64_t width, const int32_t* gather, float* to) {
  if (gather != nullptr) {
    for (int64_t i = 0; i < width; ++i) to[i] = gather[i] < 0 ? 0.0f : load_scalar(x, row * k + gather[i], dtype);
    return;
  }
  if (dtype == F32) {
    std::memcpy(to, static_cast<const float*>(x) + row * k, size_t(k) * 4);
  } else if (dtype == BF16) {
    const uint16_t* from = static_cast<const uint16_t*>(x) + row * k;
    for (int64_t i = 0; i < k; ++i) to[i] = bf16_to_float(from[i]);
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(x) + row * k;
    for (int64_t i = 0; i < k; ++i) to[i] = half_to_float(from[i]);
  }
  for (int64_t i = k; i < width; ++i) to[i] = 0.0f;
}

void sum_row(const float* x, const int32_t* group_ends, int64_t groups, float* sums) {
  int64_t at = 0;
  for (int64_t g = 0; g < groups; ++g) {
    float part[UNIT] = {};  // one chain of sums would take longer than the product of a row
    for (const int64_t end = int64_t(group_ends[g]) * UNIT; at < end; at += UNIT) {
      for (int64_t i = 0; i < UNIT; ++i) part[i] += x[at + i];
    }
    for (int64_t half = UNIT / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) part[i] += part[i + half];
    }
    sums[g] = part[0];
  }
}

void place_row16(const uint16_t* x, int64_t k, int64_t filled, int64_t width, const int32_t* gather, uint16_t* to) {
  if (gather == nullptr) {
    std::memcpy(to, x, size_t(k) * 2);
    filled = k;
  } else {
    for (int64_t i = 0; i < filled; ++i) to[i] = gather[i] < 0 ? uint16_t(0) : x[gather[i]];
  }
  std::memset(to + filled, 0, size_t(width - filled) * 2);
}

void sum_row16(const uint16_t* x, int64_t width, const int32_t* group_ends, int64_t groups, float* sums, int64_t step) {
  int64_t at = 0;
  for (int64_t g = 0; g < groups; ++g) {
    float part[16] = {};
    for (const int64_t end = g + 1 < groups ? int64_t(group_ends[g]) * UNIT : width; at < end; at += 16) {
      for (int64_t i = 0; i < 16; ++i) part[i] += bf16_to_float(x[at + i]);
    }
    for (int64_t half = 8; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) part[i] += part[i + half];
    }
    sums[g * step] = part[0];
  }
}

bool whole_steps(const int32_t* group_ends, int64_t groups) {
  for (int64_t g = 0; g + 1 < groups; ++g) {
    if (group_ends[g] % 4 != 0) return false;
  }
  return true;
}

int64_t split_row_bytes(int64_t units) { return (round_up(units * UNIT * 3, 1024) / 1024 | 1) * 1024; }

int64_t count_chunks(const int32_t* group_ends, int64_t groups) {
  int64_t count = 0, start = 0;
  for (int64_t g = 0; g < groups; ++g) {
    count += (group_ends[g] - start + CHUNK_UNITS - 1) / CHUNK_UNITS;
    start = group_ends[g];
  }
  return count;
}

bool exact_in_bf16(const GroupedArgs& args) {
  if (args.code_kind == DENSE_F16 || args.code_kind == DENSE_F32) return false;
  if (args.code_kind != TABLE4) return true;
  return std::all_of(args.table, args.table + 16, [](float value) { return (float_to_bits(value) & 0xffff) == 0; });
}

int64_t most_segments(const GroupedArgs& args) { return round_up(args.units * UNIT, SEGMENT) / SEGMENT + args.groups; }

Cut cut_features(const GroupedArgs& args, Block* blocks, Segment* segments) {
  const int64_t limit = args.rows <= 32 ? SEGMENT : BLOCK;  // few rows: weights are used once, keep them in the first cache
  int64_t step = 0, block_count = 0, segment_count = 0;
  for (int64_t g = 0; g < args.groups; ++g) {
    const int64_t end = (args.group_ends[g] * UNIT + STEP - 1) / STEP;  // groups other than the last end at whole steps
    for (bool opens = true; step < end; opens = false) {
      const int64_t last = std::min(step + SEGMENT / STEP, end), at = segment_count++;
      if (block_count == 0 || (last - blocks[block_count - 1].first) * STEP > limit) blocks[block_count++] = {step, step, at, at};
      segments[at] = {step, last, g, opens};
      blocks[block_count - 1].last = last;
      blocks[block_count - 1].segment_end = segment_count;
      step = last;
    }
  }
  return {blocks, block_count, segments, nullptr, nullptr};
}

void grouped_part(const Kernels& kernels, const GroupedArgs& args, int64_t panel, int64_t panel_end, int64_t row, int64_t row_end) {
  if (args.split == nullptr) return kernels.grouped(args, panel, panel_end, row, row_end);
  const auto whole = [&](int64_t at) { return args.split->whole[args.x_rows ? args.x_rows[at] : at]; };
  while (row < row_end) {
    int64_t end = row + 1;
    while (end < row_end && whole(end) == whole(row)) ++end;
    (whole(row) ? kernels.fixed : kernels.grouped)(args, panel, panel_end, row, end);
    row = end;
  }
}

}  // namespace bitgrain
