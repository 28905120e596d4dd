// The kernels of step_kernels.hpp in plain C++ over blocks of sixteen floats, which the compiler turns into vectors of
// the instruction set that the including file is compiled for.  Internal linkage.
#pragma once
#include "scalar.hpp"
#include "step_kernels.hpp"

namespace bitgrain {
namespace {

constexpr int64_t LANES = 16;
constexpr float NO_SCORE = -3.0e38f;

inline void widen_block(const void* from, int64_t at, int64_t count, int32_t dtype, float* to) {
  if (dtype == F32) {
    const float* x = static_cast<const float*>(from) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = x[i];
    return;
  }
  const uint16_t* x = static_cast<const uint16_t*>(from) + at;
  if (dtype == BF16) {
    for (int64_t i = 0; i < count; ++i) to[i] = bf16_to_float(x[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = half_to_float(x[i]);
  }
}

inline float rounded(float value, int32_t dtype) {
  return dtype == F32 ? value : dtype == BF16 ? bf16_to_float(float_to_bf16(value)) : half_to_float(float_to_half(value));
}

inline void round_block(float* values, int64_t count, int32_t dtype) {
  if (dtype == BF16) {
    for (int64_t i = 0; i < count; ++i) values[i] = bf16_to_float(float_to_bf16(values[i]));
  } else if (dtype == F16) {
    for (int64_t i = 0; i < count; ++i) values[i] = half_to_float(float_to_half(values[i]));
  }
}

inline void store_block(void* to, int64_t at, int64_t count, int32_t dtype, const float* values) {
  if (dtype == F32) {
    float* y = static_cast<float*>(to) + at;
    for (int64_t i = 0; i < count; ++i) y[i] = values[i];
    return;
  }
  uint16_t* y = static_cast<uint16_t*>(to) + at;
  if (dtype == BF16) {
    for (int64_t i = 0; i < count; ++i) y[i] = float_to_bf16(values[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) y[i] = float_to_half(values[i]);
  }
}

inline float sum_lanes(float* part) {
  for (int64_t half = LANES / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) part[i] += part[i + half];
  }
  return part[0];
}

inline float dot(const float* a, const float* b, int64_t count) {
  float part[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    for (int64_t j = 0; j < LANES; ++j) part[j] += a[i + j] * b[i + j];
  }
  float rest = 0.0f;
  for (; i < count; ++i) rest += a[i] * b[i];
  return sum_lanes(part) + rest;
}

inline void norm_rows(const NormArgs& args, int64_t first, int64_t last) {
  constexpr int64_t BLOCK = 256;
  float x[BLOCK], w[BLOCK];
  for (int64_t row = first; row < last; ++row) {
    float part[LANES] = {};
    for (int64_t at = 0; at < args.size; at += BLOCK) {
      const int64_t count = args.size - at < BLOCK ? args.size - at : BLOCK;
      widen_block(args.x, row * args.stride + at, count, args.dtype, x);
      for (int64_t i = count; i < (count + LANES - 1) / LANES * LANES; ++i) x[i] = 0.0f;
      for (int64_t i = 0; i < count; i += LANES) {
        for (int64_t j = 0; j < LANES; ++j) part[j] += x[i + j] * x[i + j];
      }
    }
    const float factor = 1.0f / __builtin_sqrtf(sum_lanes(part) / float(args.size) + args.eps);
    for (int64_t at = 0; at < args.size; at += BLOCK) {
      const int64_t count = args.size - at < BLOCK ? args.size - at : BLOCK;
      widen_block(args.x, row * args.stride + at, count, args.dtype, x);
      widen_block(args.weight, at, count, args.weight_dtype, w);
      for (int64_t i = 0; i < count; ++i) x[i] *= factor;
      if (!args.wide) round_block(x, count, args.dtype);
      for (int64_t i = 0; i < count; ++i) x[i] *= w[i];
      if (args.bias != nullptr) {
        round_block(x, count, args.dtype);
        widen_block(args.bias, at, count, args.dtype, w);
        for (int64_t i = 0; i < count; ++i) x[i] += w[i];
      }
      store_block(args.y, row * args.size + at, count, args.dtype, x);
    }
  }
}

// y[i] = round(round(x[i] * cosine[i]) + round(partner(x, i) * sine[i])) for pairs (a, b) of positions
inline void turn_head(const float* x, const float* cosine, const float* sine, int64_t turned, bool interleaved, int32_t dtype, float* y, float* other) {
  const int64_t half = turned / 2;
  if (interleaved) {
    for (int64_t i = 0; i < half; ++i) {
      other[2 * i] = -x[2 * i + 1];
      other[2 * i + 1] = x[2 * i];
    }
  } else {
    for (int64_t i = 0; i < half; ++i) {
      other[i] = -x[half + i];
      other[half + i] = x[i];
    }
  }
  for (int64_t i = 0; i < turned; ++i) y[i] = x[i] * cosine[i];
  for (int64_t i = 0; i < turned; ++i) other[i] *= sine[i];
  round_block(y, turned, dtype);
  round_block(other, turned, dtype);
  for (int64_t i = 0; i < turned; ++i) y[i] += other[i];
}

constexpr int64_t LARGEST_HEAD = 1024;  // step_interface.cpp refuses larger ones

inline void rotate_rows(const RotateArgs& args, int64_t first, int64_t last) {
  float x[LARGEST_HEAD], y[LARGEST_HEAD], other[LARGEST_HEAD], cosine[LARGEST_HEAD], sine[LARGEST_HEAD];
  for (int64_t row = first; row < last; ++row) {
    widen_block(args.cosine, row * args.turned, args.turned, args.dtype, cosine);
    widen_block(args.sine, row * args.turned, args.turned, args.dtype, sine);
    for (int64_t head = 0; head < args.heads; ++head) {
      widen_block(args.x, row * args.stride + head * args.size, args.size, args.dtype, x);
      turn_head(x, cosine, sine, args.turned, args.interleaved != 0, args.dtype, y, other);
      for (int64_t i = args.turned; i < args.size; ++i) y[i] = x[i];
      store_block(args.y, (row * args.heads + head) * args.size, args.size, args.dtype, y);
    }
  }
}

inline void gate_range(const GateArgs& args, int64_t first, int64_t last) {
  constexpr int64_t BLOCK = 256;
  float gate[BLOCK], up[BLOCK];
  for (int64_t at = first; at < last;) {
    const int64_t row = at / args.size, column = at % args.size;
    int64_t count = args.size - column < BLOCK ? args.size - column : BLOCK;
    count = last - at < count ? last - at : count;
    widen_block(args.gate, row * args.stride + column, count, args.dtype, gate);
    widen_block(args.up, row * args.stride + column, count, args.dtype, up);
    for (int64_t i = 0; i < count; ++i) gate[i] = gate[i] / (1.0f + exponential(-gate[i]));
    round_block(gate, count, args.dtype);
    for (int64_t i = 0; i < count; ++i) gate[i] *= up[i];
    store_block(args.y, at, count, args.dtype, gate);
    at += count;
  }
}

inline float capped(float score, float cap) {
  if (cap <= 0.0f) return score;
  const float twice = exponential(-2.0f * (score < 0 ? -score : score) / cap), magnitude = cap * (1.0f - twice) / (1.0f + twice);
  return score < 0 ? -magnitude : magnitude;
}

// One row, one group: all its query heads see each key and value once.
inline void attend_group(const AttendArgs& args, int64_t row, int64_t group, float* scratch) {
  const int64_t heads = args.heads / args.groups, seen = args.total - args.rows + row + 1;
  const int64_t start = args.window > 0 && seen > args.window ? seen - args.window : 0, count = seen - start;
  float* const q = scratch;
  float* const mixed = q + heads * args.size;
  float* const scores = mixed + heads * args.value_size;
  float* const one = scores + heads * args.total;
  for (int64_t h = 0; h < heads; ++h) widen_block(args.q, row * args.q_stride + (group * heads + h) * args.size, args.size, args.dtype, q + h * args.size);
  for (int64_t t = 0; t < count; ++t) {
    widen_block(args.keys, (start + t) * args.key_stride + group * args.size, args.size, args.dtype, one);
    for (int64_t h = 0; h < heads; ++h) scores[h * args.total + t] = capped(args.scale * dot(q + h * args.size, one, args.size), args.cap);
  }
  for (int64_t h = 0; h < heads; ++h) {
    float* const s = scores + h * args.total;
    const bool sink = args.sinks != nullptr;
    float top = sink ? args.sinks[group * heads + h] : NO_SCORE, part[LANES] = {}, sum = 0.0f;
    for (int64_t t = 0; t < count; ++t) top = s[t] > top ? s[t] : top;
    int64_t t = 0;
    for (; t + LANES <= count; t += LANES) {
      for (int64_t j = 0; j < LANES; ++j) {
        s[t + j] = exponential(s[t + j] - top);
        part[j] += s[t + j];
      }
    }
    for (; t < count; ++t) sum += s[t] = exponential(s[t] - top);
    sum += sum_lanes(part) + (sink ? exponential(args.sinks[group * heads + h] - top) : 0.0f);
    for (t = 0; t < count; ++t) s[t] /= sum;
  }
  for (int64_t i = 0; i < heads * args.value_size; ++i) mixed[i] = 0.0f;
  for (int64_t t = 0; t < count; ++t) {
    widen_block(args.values, (start + t) * args.value_stride + group * args.value_size, args.value_size, args.dtype, one);
    for (int64_t h = 0; h < heads; ++h) {
      const float p = scores[h * args.total + t];
      float* const to = mixed + h * args.value_size;
      for (int64_t i = 0; i < args.value_size; ++i) to[i] += p * one[i];
    }
  }
  store_block(args.y, (row * args.heads + group * heads) * args.value_size, heads * args.value_size, args.dtype, mixed);
}

inline void attend_range(const AttendArgs& args, int64_t first, int64_t last, float* scratch) {
  for (int64_t item = first; item < last; ++item) attend_group(args, item / args.groups, item % args.groups, scratch);
}

inline void add_range(const void* x, void* y, int64_t count, int32_t dtype) {
  constexpr int64_t BLOCK = 256;
  float a[BLOCK], b[BLOCK];
  for (int64_t at = 0; at < count; at += BLOCK) {
    const int64_t some = count - at < BLOCK ? count - at : BLOCK;
    widen_block(x, at, some, dtype, a);
    widen_block(y, at, some, dtype, b);
    for (int64_t i = 0; i < some; ++i) b[i] += a[i];
    store_block(y, at, some, dtype, b);
  }
}

}  // namespace
}  // namespace bitgrain
