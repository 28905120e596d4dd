// One of the two matrices of every expert that has rows, ready to be multiplied in parts by any thread.
#pragma once
#include <vector>

#include "block_kernels.hpp"
#include "experts.hpp"
#include "rows.hpp"

namespace bitgrain {

// Rows [begin, end) of the pairs, which are ordered by expert, belong to one expert.
struct Share {
  int64_t expert, begin, end;
};

// A part that one thread computes.
struct Task {
  int64_t share, panel, panel_end, row, row_end;
};

// Where the input of each pair stands.
struct PairInput {
  const void* x;         // [.., k] of dtype
  int32_t dtype;
  const int32_t* rows;   // [pairs], or null: a row per pair
  int64_t distinct;      // rows of x
};

// One share's product by block_kernels.hpp.
struct BlockProduct {
  BlockWeight weight;
  uint8_t* input;
  const void* bias;
  void* y;
  int64_t rows;
};

// A thread's own memory.
struct ThreadMemory {
  std::unique_ptr<uint8_t[]> cut;  // CUT_BYTES, aligned()
  std::unique_ptr<float[]> row;
};

class ExpertProducts {
 public:
  // y: [pairs, n] of y_dtype.  Biases are added where `with_bias`.
  ExpertProducts(const Kernels& kernels, const ExpertMatrix* matrices, const ExpertSide& side, const std::vector<Share>& shares, const PairInput& input,
                 void* y, int32_t y_dtype, bool with_bias, const float* row_scale);

  // Rows to prepare, each once, by any thread; all of them before the first task.
  int64_t preparations() const { return shared_ ? input_.distinct : pairs_; }
  void prepare(int64_t row, ThreadMemory& memory);

  const std::vector<Task>& tasks() const { return tasks_; }
  void run(const Task& task, const ThreadMemory& memory) const;

  // Floats that prepare() needs in ThreadMemory::row.
  int64_t row_floats() const { return side_.family == INTEGER ? side_.k : 0; }
  bool narrow() const { return narrow_; }

 private:
  void plan_rows();
  void plan_share(int64_t share, int64_t& padded);
  void plan_tasks();
  void prepare_float(const GroupedArgs& args, const int32_t* gather, int64_t from, int64_t to, const SplitRows& split);
  void plan_blocks();
  int64_t panel_bytes(const Share& share) const;
  void prepare_narrow(int64_t share, int64_t pair);
  void prepare_integer(int64_t share, int64_t pair, ThreadMemory& memory);

  const Kernels& kernels_;
  const ExpertMatrix* matrices_;
  const ExpertSide& side_;
  const std::vector<Share>& shares_;
  PairInput input_;
  void* y_;
  int32_t y_dtype_;
  bool with_bias_;
  const float* row_scale_;
  int64_t pairs_ = 0;
  bool shared_ = false, narrow_ = false, summed_ = false, fixed_ = false;

  std::vector<int32_t> share_of_;  // [pairs]
  std::vector<GroupedArgs> grouped_;
  std::vector<IntegerArgs> integer_;
  std::vector<BlockProduct> blocks_;
  std::vector<SplitRows> splits_;  // of each share, or one for all
  std::vector<Cut> cuts_;
  std::vector<Block> cut_blocks_;
  std::vector<Segment> cut_segments_;
  std::vector<Task> tasks_;
  std::unique_ptr<float[]> wide_, sums_, scales_;
  std::unique_ptr<uint16_t[]> wide16_;
  std::unique_ptr<uint8_t[]> bytes_, whole_;
  std::unique_ptr<Chunk[]> chunks_;
  std::unique_ptr<int32_t[]> zeros_;
};

}  // namespace bitgrain
