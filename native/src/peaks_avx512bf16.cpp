// See peaks.hpp.
#include "peaks_avx512.hpp"

namespace bitgrain {
namespace {

#define BITGRAIN_PEAK_INSTRUCTION "vdpbf16ps"
void bfloat16(int64_t rounds) { BITGRAIN_PEAK_BODY(rounds) }
#undef BITGRAIN_PEAK_INSTRUCTION

}  // namespace

const Peaks& avx512bf16_peaks() {
  static const Peaks peaks = {{float32, 12 * 16 * 2}, {bfloat16, 12 * 32 * 2}, {int8, 12 * 64 * 2}, {nullptr, 0}};
  return peaks;
}

}  // namespace bitgrain
