// How the bfloat16 kernels cut K: segments that end at every group and at least every SEGMENT in features, and blocks of
// segments whose decoded weights stay in a core's cache.  The cut depends on K and the groups only, never on the rows, so
// that the order of summation of one output does not either.
#pragma once
#include <vector>

#include "kernels.hpp"

namespace bitgrain {
namespace {

constexpr int64_t STEP = 32;       // in features of one step: 16 pairs
constexpr int64_t SEGMENT = 512;   // longest chain of sums in one accumulator
constexpr int64_t BLOCK = 1024;    // in features that are decoded at once, at most
constexpr int64_t ROW_BLOCK = 512;  // rows whose running sums are kept at once

struct Segment {
  int64_t first, last;  // in steps
  int64_t group;
  bool opens;  // the first one of its group
};

struct Block {
  int64_t first, last;  // in steps
  std::vector<Segment> segments;
};

// Groups other than the last end at whole steps (see whole_steps in interface.cpp).
inline std::vector<Block> cut_blocks(const GroupedArgs& args) {
  std::vector<Block> blocks;
  const int64_t limit = args.rows <= 32 ? SEGMENT : BLOCK;  // few rows: weights are used once, keep them in the first cache
  int64_t step = 0;
  for (int64_t g = 0; g < args.groups; ++g) {
    const int64_t end = (args.group_ends[g] * UNIT + STEP - 1) / STEP;
    for (bool opens = true; step < end; opens = false) {
      const int64_t last = step + SEGMENT / STEP < end ? step + SEGMENT / STEP : end;
      if (blocks.empty() || (last - blocks.back().first) * STEP > limit) blocks.push_back({step, step, {}});
      blocks.back().segments.push_back({step, last, g, opens});
      blocks.back().last = last;
      step = last;
    }
  }
  return blocks;
}

}  // namespace
}  // namespace bitgrain
