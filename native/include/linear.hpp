// One matrix times all rows, in parts that the threads of one parallel region share out: rows are measured where the scheme asks
// for it, then prepared, then multiplied; between those all threads meet.
#pragma once
#include <omp.h>

#include "dense.hpp"
#include "rows.hpp"

namespace bitgrain {

const Kernels& active_kernels();  // of the instruction set in use

// Consecutive parts of one piece of memory, aligned to 64 bytes as the memory is.  Without memory they are only counted.
class Parts {
 public:
  explicit Parts(uint8_t* memory) : memory_(memory) {}

  template <class T>
  T* take(int64_t count) {
    T* const part = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + bytes_);
    bytes_ += round_up(count * int64_t(sizeof(T)), 64);
    return part;
  }

  int64_t bytes() const { return bytes_; }

 private:
  uint8_t* memory_;
  int64_t bytes_ = 0;
};

// Tasks by rows first, so that threads read the same rows at about the same time.
struct Tasks {
  int64_t rows, row_step, panels, panel_step;

  int64_t per_rows() const { return (panels + panel_step - 1) / panel_step; }
  int64_t count() const { return (rows + row_step - 1) / row_step * per_rows(); }
  int64_t panel(int64_t task) const { return task % per_rows() * panel_step; }
  int64_t row(int64_t task) const { return task / per_rows() * row_step; }
  int64_t panel_end(int64_t task) const { return panel(task) + panel_step < panels ? panel(task) + panel_step : panels; }
  int64_t row_end(int64_t task) const { return row(task) + row_step < rows ? row(task) + row_step : rows; }
};

// Both products are small: every thread may make its own, of the same arguments and memory.  In this order:
//   place(memory)          where prepared rows lie; returns the bytes, also without memory
//   measure(first, last)   only where measures()
//   prepare(first, last)   all threads have measured
//   run(task, own)         all threads have prepared; `own`: own_bytes() of the thread, aligned to 64 bytes
// Each row is measured and prepared once, each task run once, by any thread, without allocations.

// What does not depend on the other rows.
struct Unmeasured {
  bool measures() const { return false; }
  void measure(int64_t, int64_t) const {}
};

class GroupedProduct : public Unmeasured {
 public:
  // x [rows, k] of x_dtype, columns taken by `gather` where it is given; `args` lacks what it says of x.
  GroupedProduct(const Kernels& kernels, const GroupedArgs& args, const void* x, int32_t x_dtype, int64_t k, const int32_t* gather, int32_t threads);
  GroupedProduct(const GroupedProduct&) = delete;  // points to itself

  int64_t rows() const { return args_.rows; }
  int64_t tasks() const { return tasks_.count(); }
  int64_t own_bytes() const { return narrow_ ? CUT_BYTES : 0; }
  int64_t place(uint8_t* memory);
  void prepare(int64_t first, int64_t last) const;
  void run(int64_t task, uint8_t* own) const;

 private:
  int64_t place_narrow(uint8_t* memory);
  void prepare_narrow(int64_t first, int64_t last) const;

  const Kernels& kernels_;
  GroupedArgs args_;
  const void* x_;
  int32_t x_dtype_;
  int64_t k_;
  const int32_t* gather_;
  bool narrow_, summed_, fixed_;
  Tasks tasks_;
  SplitRows split_ = {};
  float *wide_ = nullptr, *sums_ = nullptr;
  uint16_t* placed_ = nullptr;  // rows of bfloat16, where x itself will not do
  int64_t padded_ = 0;          // rows of it
  Cut* cut_ = nullptr;          // without a thread's memory
  Block* blocks_ = nullptr;
  Segment* segments_ = nullptr;
};

class IntegerProduct {
 public:
  // Quantizes the rows of x, k of x_dtype each.  `quantize` and `args` lack what lies between the two.
  IntegerProduct(const Kernels& kernels, const QuantizeArgs& quantize, const IntegerArgs& args, const void* x, int32_t x_dtype, int32_t threads);

  int64_t rows() const { return args_.rows; }
  int64_t tasks() const { return tasks_.count(); }
  int64_t own_bytes() const { return 0; }
  int64_t place(uint8_t* memory);
  bool measures() const { return quantize_.dynamic == PER_TENSOR; }
  void measure(int64_t first, int64_t last) const;
  void prepare(int64_t first, int64_t last) const;
  void run(int64_t task, uint8_t* own) const;

 private:
  void widen(int64_t row) const;

  const Kernels& kernels_;
  QuantizeArgs quantize_;
  IntegerArgs args_;
  const void* x_;
  int32_t x_dtype_;
  Tasks tasks_;
  float* wide_ = nullptr;
  Range* ranges_ = nullptr;  // of each row
};

class DenseProduct : public Unmeasured {
 public:
  // x [args.rows, args.k] of args.y_dtype; `args` lacks what it says of x.
  DenseProduct(const DenseArgs& args, const void* x);

  int64_t rows() const { return args_.rows; }
  int64_t tasks() const { return (args_.n + DENSE_TASK - 1) / DENSE_TASK; }
  int64_t own_bytes() const { return 0; }
  int64_t place(uint8_t* memory);
  void prepare(int64_t first, int64_t last) const;
  void run(int64_t task, uint8_t* own) const;

 private:
  DenseArgs args_;
  const void* x_;
  const DenseKernel kernel_;
  float* wide_ = nullptr;
};

// Alone, in a parallel region of its own.
void run_grouped(const Kernels& kernels, const GroupedArgs& args, const void* x, int32_t x_dtype, int64_t k, const int32_t* gather, int32_t threads);
void run_integer(const Kernels& kernels, const QuantizeArgs& quantize, const IntegerArgs& args, const void* x, int32_t x_dtype, int32_t threads);

void run_quantize(const Kernels& kernels, const QuantizeArgs& args, int32_t threads);

namespace {

// Rows [first_row, first_row of the next) are this thread's; the first row is the first thread's, which never has to be woken.
inline int64_t first_row(int64_t rows, int64_t thread, int64_t threads) { return (rows * thread + threads - 1) / threads; }

inline int64_t take(int64_t* next, int64_t count) { return __atomic_fetch_add(next, count, __ATOMIC_RELAXED); }

// One thread's part of a placed product, in a region all of whose threads come here; `next` counts the tasks that are taken.
template <class Product>
void take_part(const Product& product, int64_t thread, int64_t threads, int64_t* next, uint8_t* own) {
  const int64_t first = first_row(product.rows(), thread, threads), last = first_row(product.rows(), thread + 1, threads), tasks = product.tasks();
  if (product.measures()) {
    product.measure(first, last);
#pragma omp barrier
  }
  product.prepare(first, last);
#pragma omp barrier
  for (int64_t task; (task = take(next, 1)) < tasks;) product.run(task, own);
}

template <class Product>
void run_alone(Product&& product, int32_t threads) {
  const int64_t own_bytes = product.own_bytes();
  const auto memory = uncleared<uint8_t>(product.place(nullptr) + 64), own = uncleared<uint8_t>(threads * own_bytes + 64);
  product.place(aligned(memory));
  int64_t next = 0;
#pragma omp parallel num_threads(threads) if (product.tasks() > 1)
  {
    const int64_t thread = omp_get_thread_num();
    take_part(product, thread, omp_get_num_threads(), &next, aligned(own) + thread * own_bytes);
  }
}

}  // namespace
}  // namespace bitgrain
