// See peaks.hpp: what the compiler makes of a plain loop for any processor.
#include "peaks.hpp"

namespace bitgrain {
namespace {

constexpr int WIDE = 32;

// The compiler may neither drop nor foresee what stands there.
inline void hold(float* values) { asm volatile("" : : "r"(values) : "memory"); }

void float32(int64_t rounds) {
  float x[WIDE] = {}, y[WIDE] = {}, sums[WIDE] = {};
  hold(x);
  hold(y);
  hold(sums);
  for (int64_t round = 0; round < rounds; ++round) {
    for (int i = 0; i < WIDE; ++i) sums[i] = sums[i] * x[i] + y[i];
  }
  hold(sums);
}

}  // namespace

const Peaks& portable_peaks() {
  static const Peaks peaks = {{float32, WIDE * 2}, {nullptr, 0}, {nullptr, 0}, {nullptr, 0}};
  return peaks;
}

}  // namespace bitgrain
