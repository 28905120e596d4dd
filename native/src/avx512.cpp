// AVX-512 (F, BW, VL, DQ) with VNNI: sixteen lanes, one panel.
#include "avx512_values.hpp"
#include "grouped.hpp"
#include "quantize.hpp"

namespace bitgrain {
namespace {

// In place: the compiler's intrinsic copies every accumulator before the instruction (GCC 12).
inline void dot_in_place(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
#ifdef BITGRAIN_AVX512_EMULATED
  sum = _mm512_dpbusd_epi32(sum, unsigned_bytes, signed_bytes);
#else
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
#endif
}

template <int ROWS>
inline void integer_tile(const IntegerArgs& args, const uint8_t* codes, int64_t panel, int64_t row) {
  __m512i sum[ROWS][2];
  const uint8_t* a[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    sum[r][0] = sum[r][1] = _mm512_setzero_si512();
    a[r] = args.a + (row + r) * args.quads * 4;
  }
  for (int64_t q = 0; q < args.quads; q += 2) {  // quads is even
    const __m512i w0 = load64(codes + q * 64), w1 = load64(codes + q * 64 + 64);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      int32_t four[2];
      __builtin_memcpy(four, a[r] + q * 4, 8);
      dot_in_place(sum[r][0], _mm512_set1_epi32(four[0]), w0);
      dot_in_place(sum[r][1], _mm512_set1_epi32(four[1]), w1);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    alignas(64) int32_t dots[PANEL];
    _mm512_store_si512(dots, _mm512_add_epi32(sum[r][0], sum[r][1]));
    store_integer(args, row + r, panel * PANEL, dots);
  }
}

inline void integer_rows(const IntegerArgs& args, int64_t panel, int64_t row, int64_t end) {
  const uint8_t* codes = args.codes + panel * args.quads * 64;
  for (; row + 8 <= end; row += 8) integer_tile<8>(args, codes, panel, row);
  for (; row + 2 <= end; row += 2) integer_tile<2>(args, codes, panel, row);
  for (; row < end; ++row) integer_tile<1>(args, codes, panel, row);
}

void integer(const IntegerArgs& args, int64_t panel, int64_t panel_end, int64_t row, int64_t row_end) {
  for (; panel < panel_end; ++panel) integer_rows(args, panel, row, row_end);
}

}  // namespace

const Kernels& avx512_kernels() {
  static const Kernels table = {"avx512", grouped_by_kind<Decoders>, nullptr, nullptr, nullptr, integer, widen_range, quantize_rows, false};
  return table;
}

}  // namespace bitgrain
