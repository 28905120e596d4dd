// The C interface of peaks.hpp, and the rate at which memory is read.
#include <algorithm>
#include <chrono>
#include <cstring>

#include "peaks.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* bg_instruction_set();

namespace bitgrain {
namespace {

// A run of a millisecond fits between two interruptions also where others use the processor; the best of these counts.
constexpr double RUN_SECONDS = 1e-3;
constexpr int RUNS = 8;

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

const Peaks& active_peaks() {
#ifdef BITGRAIN_X86
  const char* name = bg_instruction_set();
  if (std::strcmp(name, "portable") == 0) return portable_peaks();
#ifdef BITGRAIN_AVX512_EMULATED
  return avx2_peaks();
#else
#ifdef BITGRAIN_BF16
  if (std::strcmp(name, "amx") == 0) return amx_peaks();
  if (std::strcmp(name, "avx512bf16") == 0) return avx512bf16_peaks();
#endif
  if (std::strcmp(name, "avx512") == 0) return avx512_peaks();
  return avx2_peaks();
#endif
#else
  return portable_peaks();
#endif
}

// Operations per second of the calling thread.
double rate(const Peak& peak) {
  int64_t rounds = 64;
  double taken = 0.0;
  do {
    rounds *= 2;
    const auto start = Clock::now();
    peak.run(rounds);
    taken = seconds_since(start);
  } while (taken < RUN_SECONDS);
  for (int run = 0; run < RUNS; ++run) {
    const auto start = Clock::now();
    peak.run(rounds);
    taken = std::min(taken, seconds_since(start));
  }
  return double(rounds * peak.operations) / taken;
}

}  // namespace
}  // namespace bitgrain

using namespace bitgrain;

// Operations per second of all threads together, 0 where the instruction set in use has none.  `kind`: 0 float32, 1 bfloat16, 2 int8,
// 3 int4, as Peaks says.
EXPORT double bg_peak(int32_t kind, int32_t threads) {
  const Peaks& peaks = active_peaks();
  const Peak* const kinds[] = {&peaks.float32, &peaks.bfloat16, &peaks.int8, &peaks.int4};
  const Peak& peak = *kinds[kind];
  if (peak.run == nullptr) return 0.0;
  double total = 0.0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
  total += rate(peak);
  return total;
}

// Reads `words` whole numbers of eight bytes, a share of them by each thread; their exclusive or.
EXPORT uint64_t bg_read(const uint64_t* data, int64_t words, int32_t threads) {
  uint64_t total = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(^ : total)
  for (int32_t thread = 0; thread < threads; ++thread) {
    constexpr int64_t LINE = 16;  // words that are read together: their sums fit into the plainest registers
    const int64_t first = words * thread / threads, last = words * (thread + 1) / threads;
    uint64_t sums[LINE] = {};
    int64_t at = first;
    for (; at + LINE <= last; at += LINE) {
      for (int64_t i = 0; i < LINE; ++i) sums[i] ^= data[at + i];
    }
    for (; at < last; ++at) sums[0] ^= data[at];
    for (uint64_t sum : sums) total ^= sum;
  }
  return total;
}
