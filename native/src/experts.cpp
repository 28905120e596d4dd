#include "experts.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <omp.h>
#include <stdexcept>

#include "expert_products.hpp"
#include "scalar.hpp"

namespace bitgrain {
namespace {

// Token and place of every pair of a row and one of its experts, ordered by expert, then by row.
struct Pairs {
  std::vector<Share> shares;
  std::vector<int32_t> row;      // [pairs]
  std::vector<float> weight;     // [pairs]
  std::vector<int32_t> of_row;   // pairs of each row, in the order of experts
  std::vector<int32_t> row_end;  // [rows]: end in of_row
};

float load_weight(const ExpertsArgs& args, int64_t at) { return load_scalar(args.weight, at, args.weight_dtype); }

Pairs order_pairs(const ExpertsArgs& args) {
  Pairs pairs;
  std::vector<int64_t> next(size_t(args.count) + 1);
  pairs.row_end.resize(size_t(args.rows));
  for (int64_t row = 0; row < args.rows; ++row) {
    int32_t taken = 0;
    for (int64_t p = 0; p < args.per_token; ++p) {
      const int64_t expert = args.chosen[row * args.per_token + p];
      if (expert < 0) continue;
      if (expert >= args.count) throw std::out_of_range("expert");
      ++next[size_t(expert) + 1];
      ++taken;
    }
    pairs.row_end[size_t(row)] = taken + (row > 0 ? pairs.row_end[size_t(row) - 1] : 0);
  }
  for (int64_t e = 0; e < args.count; ++e) {
    next[size_t(e) + 1] += next[size_t(e)];
    if (next[size_t(e) + 1] > next[size_t(e)]) pairs.shares.push_back({e, next[size_t(e)], next[size_t(e) + 1]});
  }
  const size_t total = size_t(next[size_t(args.count)]);
  pairs.row.resize(total);
  pairs.weight.resize(total);
  pairs.of_row.resize(total);
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t p = 0; p < args.per_token; ++p) {
      const int64_t at = row * args.per_token + p, expert = args.chosen[at];
      if (expert < 0) continue;
      const size_t pair = size_t(next[size_t(expert)]++);
      pairs.row[pair] = int32_t(row);
      pairs.weight[pair] = load_weight(args, at);
    }
  }
  std::vector<int32_t> filled(size_t(args.rows));
  for (size_t pair = 0; pair < total; ++pair) {
    const size_t row = size_t(pairs.row[pair]), begin = row > 0 ? size_t(pairs.row_end[row - 1]) : 0;
    pairs.of_row[begin + size_t(filled[row]++)] = int32_t(pair);
  }
  return pairs;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

struct Bf16 {
  static float round(float value) { return bf16_to_float(float_to_bf16(value)); }
};

struct Half {
  static float round(float value) { return half_to_float(float_to_half(value)); }
};

struct Float {
  static float round(float value) { return value; }
};

template <class Type, class Activation>
void join_with(const float* gate, const float* up, int64_t count, float* to, Activation activation) {
  for (int64_t i = 0; i < count; ++i) to[i] = Type::round(activation(Type::round(gate[i]))) * Type::round(up[i]);
}

// to[i] = act(gate[i]) * up[i], or what the kind says; every step but the last rounded as a module of its own rounds it.
template <class Type>
void join_as(const ExpertsArgs& args, const float* gate, const float* up, float* to) {
  const int64_t count = args.size;
  switch (args.join) {
    case SILU: return join_with<Type>(gate, up, count, to, [](float x) { return x * sigmoid(x); });
    case GELU: return join_with<Type>(gate, up, count, to, [](float x) { return 0.5f * x * (1.0f + std::erf(x * 0.70710678f)); });
    case GELU_TANH:
      return join_with<Type>(gate, up, count, to, [](float x) { return 0.5f * x * (1.0f + std::tanh(0.79788456f * (x + 0.044715f * x * x * x))); });
    case RELU: return join_with<Type>(gate, up, count, to, [](float x) { return x < 0.0f ? 0.0f : x; });
    default: {
      const float limit = Type::round(args.join_limit), alpha = args.join_alpha;
      for (int64_t i = 0; i < count; ++i) {
        const float wide = Type::round(gate[i]), g = wide > limit ? limit : wide, u = Type::round(up[i]), cut = u > limit ? limit : u < -limit ? -limit : u;
        to[i] = Type::round(cut + 1.0f) * Type::round(g * Type::round(sigmoid(Type::round(g * alpha))));
      }
    }
  }
}

void join_row(const ExpertsArgs& args, const float* gate, const float* up, float* to) {
  if (args.dtype == BF16) join_as<Bf16>(args, gate, up, to);
  else if (args.dtype == F16) join_as<Half>(args, gate, up, to);
  else join_as<Float>(args, gate, up, to);
}

// h of one pair from its products, biases added.
void join_pair(const ExpertsArgs& args, const void* bias, float* products, void* h, int64_t pair) {
  if (bias != nullptr) {
    for (int64_t i = 0; i < 2 * args.size; ++i) products[i] += load_scalar(bias, i, args.dtype);
  }
  join_row(args, products, products + args.size, products);
  for (int64_t i = 0; i < args.size; ++i) store_scalar(h, pair * args.size + i, args.dtype, products[i]);
}

void sum_pairs(const ExpertsArgs& args, const Pairs& pairs, const std::vector<int32_t>& expert_of, const float* parts, int64_t row, float* sum) {
  const int64_t hidden = args.sides[0].k;
  std::fill(sum, sum + hidden, 0.0f);
  for (int32_t at = row > 0 ? pairs.row_end[size_t(row) - 1] : 0; at < pairs.row_end[size_t(row)]; ++at) {
    const int32_t pair = pairs.of_row[size_t(at)];
    const float weight = pairs.weight[size_t(pair)], *part = parts + pair * hidden;
    const void* bias = args.down[expert_of[size_t(pair)]].bias;
    if (bias == nullptr) {
      for (int64_t i = 0; i < hidden; ++i) sum[i] += weight * part[i];
    } else {
      for (int64_t i = 0; i < hidden; ++i) sum[i] += weight * (part[i] + load_scalar(bias, i, args.dtype));
    }
  }
  for (int64_t i = 0; i < hidden; ++i) store_scalar(args.y, row * hidden + i, args.dtype, sum[i]);
}

std::vector<ThreadMemory> thread_memory(int32_t threads, int64_t floats, bool cuts) {
  std::vector<ThreadMemory> memory(static_cast<size_t>(threads));
  for (ThreadMemory& one : memory) {
    one.row = uncleared<float>(floats);
    if (cuts) one.cut = uncleared<uint8_t>(CUT_BYTES + 64);
  }
  return memory;
}

}  // namespace

void run_experts(const Kernels& kernels, const ExpertsArgs& args) {
  const Pairs pairs = order_pairs(args);
  const int64_t total = int64_t(pairs.row.size()), hidden = args.sides[0].k;
  const auto products = uncleared<float>(total * 2 * args.size), parts = uncleared<float>(total * hidden);
  const auto h = uncleared<uint8_t>(total * args.size * (args.dtype == F32 ? 4 : 2));
  ExpertProducts first(kernels, args.gate_up, args.sides[0], pairs.shares, {args.x, args.dtype, pairs.row.data(), args.rows}, products.get(), F32, false, nullptr);
  ExpertProducts second(kernels, args.down, args.sides[1], pairs.shares, {h.get(), args.dtype, nullptr, total}, parts.get(), F32, false, nullptr);
  std::vector<int32_t> expert_of;
  for (const Share& share : pairs.shares) expert_of.resize(size_t(share.end), int32_t(share.expert));
  std::vector<ThreadMemory> memory = thread_memory(args.threads, std::max({first.row_floats(), second.row_floats(), hidden}), first.narrow() || second.narrow());
#pragma omp parallel num_threads(args.threads)
  {
    ThreadMemory& mine = memory[size_t(omp_get_thread_num())];
#pragma omp for schedule(static)
    for (int64_t row = 0; row < first.preparations(); ++row) first.prepare(row, mine);
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < first.tasks().size(); ++i) first.run(first.tasks()[i], mine);
#pragma omp for schedule(static)
    for (int64_t pair = 0; pair < total; ++pair) {
      join_pair(args, args.gate_up[expert_of[size_t(pair)]].bias, products.get() + pair * 2 * args.size, h.get(), pair);
      second.prepare(pair, mine);
    }
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < second.tasks().size(); ++i) second.run(second.tasks()[i], mine);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < args.rows; ++row) sum_pairs(args, pairs, expert_of, parts.get(), row, mine.row.get());
  }
}

void run_experts_product(const Kernels& kernels, const ExpertsProductArgs& args) {
  std::vector<Share> shares;
  int64_t total = 0;
  for (int64_t e = 0; e < args.count; total = args.ends[e++]) {
    if (args.ends[e] > total) shares.push_back({e, total, args.ends[e]});
  }
  ExpertProducts product(kernels, args.matrices, *args.side, shares, {args.x, args.dtype, nullptr, total}, args.y, args.y_dtype, true, args.row_scale);
  std::vector<ThreadMemory> memory = thread_memory(args.threads, product.row_floats(), product.narrow());
#pragma omp parallel num_threads(args.threads)
  {
    ThreadMemory& mine = memory[size_t(omp_get_thread_num())];
#pragma omp for schedule(static)
    for (int64_t row = 0; row < product.preparations(); ++row) product.prepare(row, mine);
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < product.tasks().size(); ++i) product.run(product.tasks()[i], mine);
  }
}

}  // namespace bitgrain
