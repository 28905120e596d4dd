// Blocks through AVX2, FMA and F16C with AVX-VNNI: eight out features, half a panel; products of bytes are added in 32 bits.
#include "block_values_avx2.hpp"
#include "dot_avxvnni.hpp"

namespace bitgrain {
namespace {

constexpr bool takes_words(const BlockFormat&) { return false; }

constexpr int parts_of(const BlockFormat& format) { return format.group == 16 ? 2 : 1; }

template <class Code, int COUNT>
struct Vectors {
  static constexpr float STEP = 1.0f / 256;
  __m256i codes[COUNT];

  void read(const uint8_t* unit, int half, int first) {
#pragma GCC unroll 8
    for (int v = 0; v < COUNT; ++v) codes[v] = Code::value(unit, half, first + v).v;
  }
  V dot(const UnitInput& x, int digit, int first, int32_t correction) const {
    const int8_t* digits = x.bytes[digit] + first;
    __m256i sum = _mm256_set1_epi32(correction);
#pragma GCC unroll 8
    for (int v = 0; v < COUNT; ++v) add_dots(sum, codes[v], four(digits + 4 * v));
    return {_mm256_cvtepi32_ps(sum)};
  }
};

}  // namespace
}  // namespace bitgrain

#include "block_codes.hpp"

namespace bitgrain {

const BlockKernels& avxvnni_blocks() {
  static const BlockKernels table = {"avxvnni", prepare_rows, panels_by_code};
  return table;
}

}  // namespace bitgrain
