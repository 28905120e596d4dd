// What the bfloat16 kernels share before their inner loops: one thread's buffers, and the way out.  Internal linkage.
#pragma once
#include "avx512_store.hpp"
#include "bf16_values.hpp"
#include "grouped.hpp"

namespace bitgrain {
namespace {

struct Work {
  const GroupedArgs& args;
  const Cut& cut;
  int64_t width;     // in features of a padded row of args.x16
  uint8_t* weights;  // [WIDE][BLOCK / STEP][16][64]
  float* totals;     // [ROW_BLOCK][WIDE][16]
};

template <int PANELS>
inline void store_totals(const Work& work, int64_t panel, int64_t base, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    const __m512 row_scale = _mm512_set1_ps(work.args.row_scale ? work.args.row_scale[base + r] : 1.0f);
    for (int p = 0; p < PANELS; ++p) {
      const __m512 total = _mm512_loadu_ps(work.totals + (r * WIDE + p) * PANEL);
      store_panel(work.args, base + r, (panel + p) * PANEL, _mm512_mul_ps(total, row_scale));
    }
  }
}

}  // namespace
}  // namespace bitgrain
