// AVX2, FMA and F16C with AVX-VNNI: what differs from avx2.cpp.
#include "dot_avxvnni.hpp"
#include "quantize.hpp"

namespace bitgrain {
namespace {

inline __m256i load32(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

template <int ROWS>
inline void integer_tile(const IntegerArgs& args, const uint8_t* codes, int64_t panel, int64_t row) {
  __m256i sum[ROWS][2];
  const uint8_t* a[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    a[r] = args.a + (row + r) * args.quads * 4;
  }
  for (int64_t q = 0; q < args.quads; ++q) {
    const __m256i low = load32(codes + q * 64), high = load32(codes + q * 64 + 32);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const __m256i four = four_bytes(a[r] + q * 4);
      add_dots(sum[r][0], four, low);
      add_dots(sum[r][1], four, high);
    }
  }
  alignas(32) int32_t dots[ROWS][PANEL];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {  // unrolled, or the sums are kept in memory all along
    _mm256_store_si256(reinterpret_cast<__m256i*>(dots[r]), sum[r][0]);
    _mm256_store_si256(reinterpret_cast<__m256i*>(dots[r] + 8), sum[r][1]);
  }
  for (int r = 0; r < ROWS; ++r) store_integer(args, row + r, panel * PANEL, dots[r]);
}

inline void integer_rows(const IntegerArgs& args, int64_t panel, int64_t row, int64_t end) {
  const uint8_t* codes = args.codes + panel * args.quads * 64;
  for (; row + 4 <= end; row += 4) integer_tile<4>(args, codes, panel, row);
  for (; row + 2 <= end; row += 2) integer_tile<2>(args, codes, panel, row);
  for (; row < end; ++row) integer_tile<1>(args, codes, panel, row);
}

void integer(const IntegerArgs& args, int64_t panel, int64_t panel_end, int64_t row, int64_t row_end) {
  for (; panel < panel_end; ++panel) integer_rows(args, panel, row, row_end);
}

Kernels changed(Kernels table) {
  table.name = "avxvnni";
  table.integer = integer;
  return table;
}

}  // namespace

const Kernels& avxvnni_kernels() {
  static const Kernels table = changed(avx2_kernels());
  return table;
}

}  // namespace bitgrain
