// Steps that turn one row of activations into what a kernel reads.  The same on every instruction set.
#pragma once
#include <memory>

#include "kernels.hpp"

namespace bitgrain {

// Memory that is not cleared first.
template <class T>
std::unique_ptr<T[]> uncleared(int64_t count) {
  return std::unique_ptr<T[]>(new T[size_t(count)]);
}

// One row of k values as float32 [width]: columns taken by `gather` (-1: a zero) or in order, zero beyond K.
void widen_row(const void* x, int32_t dtype, int64_t row, int64_t k, int64_t width, const int32_t* gather, float* to);

// Sums of the groups of one row of float32.
void sum_row(const float* x, const int32_t* group_ends, int64_t groups, float* sums);

// One row of bfloat16 [width], columns as in widen_row; `filled` is units * 8.
void place_row16(const uint16_t* x, int64_t k, int64_t filled, int64_t width, const int32_t* gather, uint16_t* to);

// Sums of the groups of one padded row of bfloat16: sixteen partial sums each, added in order; `step` floats apart.
void sum_row16(const uint16_t* x, int64_t width, const int32_t* group_ends, int64_t groups, float* sums, int64_t step);

// True when every group but the last ends at a whole step of 32 in features.
bool whole_steps(const int32_t* group_ends, int64_t groups);

// Bytes from one row of SplitRows to the next.  Loads from rows that lie a multiple of 4096 bytes apart wait for one
// another (half the speed of a tile): an odd multiple of 1024 keeps four rows apart.
int64_t split_row_bytes(int64_t units);

int64_t count_chunks(const int32_t* group_ends, int64_t groups);

// True when the bfloat16 kernels decode the weight exactly.
bool exact_in_bf16(const GroupedArgs& args);

// True when the fixed-point kernel takes the weight.
inline bool has_fixed(const Kernels& kernels, const GroupedArgs& args) {
  return kernels.fixed != nullptr && (args.code_kind == NIBBLE || (args.code_kind == TABLE4 && args.whole_table != nullptr));
}

// At least as many segments, and blocks, as cut_features makes.
int64_t most_segments(const GroupedArgs& args);

// The bfloat16 kernels' cut of K, still without a thread's memory.  It depends on K and the groups only (blocks also on whether rows
// are few, which changes no sum), so that the order of summation of one output does not depend on the other rows.
Cut cut_features(const GroupedArgs& args, Block* blocks, Segment* segments);

constexpr int64_t CUT_BYTES = CUT_WEIGHTS + CUT_TOTALS * int64_t(sizeof(float));

// The cut with a thread's CUT_BYTES of memory, aligned to 64 bytes.
inline Cut with_memory(Cut cut, uint8_t* memory) {
  cut.weights = memory;
  cut.totals = reinterpret_cast<float*>(memory + CUT_WEIGHTS);
  return cut;
}

// The 64-byte boundary in the first bytes of memory that has 64 more than it needs.
inline uint8_t* aligned(const std::unique_ptr<uint8_t[]>& memory) { return memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) % 64; }

// `grouped`, or `fixed` for the rows that `split` has.
void grouped_part(const Kernels& kernels, const GroupedArgs& args, int64_t panel, int64_t panel_end, int64_t row, int64_t row_end);

inline int64_t count_panels(int64_t n) { return (n + PANEL - 1) / PANEL; }
inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

}  // namespace bitgrain
