// Random weights in the layouts of kernels.hpp and block_kernels.hpp, and the numbers that they stand for.
#pragma once
#include <algorithm>

#include "checks.hpp"

// y = row_scale * sum over groups of scale * second * (code . x - zero * sum(x)) + bias
struct GroupedWeight {
  int32_t kind, scale_dtype, zero_is_float = 0;
  int64_t n, k, units, groups;
  bool gathered, scaled, has_second, has_zero, whole = false;
  float zero_constant = 0, whole_step = 1;
  Buffer<uint8_t> codes;
  Buffer<int32_t> group_ends, gather;
  Numbers scale;
  Buffer<float> second, table, zero;
  Buffer<int16_t> whole_zero;
  Buffer<int8_t> whole_table;

  GroupedWeight(Random& random, int32_t kind, int64_t n, int64_t k, bool gathered, int64_t groups_wanted = 3);
  int64_t panels() const { return (n + PANEL - 1) / PANEL; }
  double code(int64_t row, int64_t place) const;
  double scale_of(int64_t row, int64_t group) const;
  double zero_of(int64_t row, int64_t group) const;
  int64_t source(int64_t place) const { return gathered ? gather[place] : place < k ? place : -1; }  // -1: a zero
  const void* zeros() const { return !has_zero ? nullptr : zero_is_float ? static_cast<const void*>(zero.data()) : whole_zero.data(); }
  // Adds row `out` of the weight times x to sum and the magnitudes of the terms to size.
  void multiply(const double* x, int64_t out, double& sum, double& size) const;
  ExpertMatrix matrix(const void* bias) const;
};

// W8A8: codes [panels][quads][16][4]
struct IntegerWeight {
  int64_t n, k, quads;
  Buffer<int8_t> codes;
  Buffer<float> scale;
  Buffer<int32_t> sums;

  IntegerWeight(Random& random, int64_t n, int64_t k);
  int32_t code(int64_t row, int64_t place) const { return codes[((row / PANEL * quads + place / 4) * PANEL + row % PANEL) * 4 + place % 4]; }
};

// Codes of one row of x, as weights/activation.py defines them.
struct Quantization {
  int32_t rules, dynamic;  // as bg_integer
  float static_scale, top;
  int32_t static_zero;
};
struct QuantizedRow {
  std::vector<int32_t> codes;
  float scale;
  int32_t zero;
};
QuantizedRow quantized(const Quantization& how, const std::vector<float>& x, float low, float high, bool nan);

// Weights of block_kernels.hpp, before and after packing.
struct BlockWeights {
  BlockFormat format;
  int64_t n, k;
  Buffer<uint8_t> stream, points, sub, sub_minima, panels;
  Numbers scales, minima;
  Buffer<float> factor;
  bool has_factor;

  BlockWeights(Random& random, const BlockFormat& format, int64_t n, int64_t k);
  double value(int64_t row, int64_t column) const;

 private:
  int32_t stored(int64_t row, int64_t column) const;
};
std::vector<BlockFormat> block_formats();
