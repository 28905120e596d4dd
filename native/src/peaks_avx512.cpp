// See peaks.hpp.
#include "peaks_avx512.hpp"

namespace bitgrain {

const Peaks& avx512_peaks() {
  static const Peaks peaks = {{float32, 12 * 16 * 2}, {nullptr, 0}, {int8, 12 * 64 * 2}, {nullptr, 0}};
  return peaks;
}

}  // namespace bitgrain
