// NEON with the dot products of bytes (FEAT_DotProd): what differs from neon.cpp.
#include "neon_values.hpp"

#include "fixed_neon.hpp"
#include "quantize.hpp"

namespace bitgrain {
namespace {

// Both sides are signed: 128 is taken from the codes of `a`, and 128 times the column sums added at the end.
template <int ROWS>
inline void integer_tile(const IntegerArgs& args, const uint8_t* codes, int64_t panel, int64_t row) {
  int32x4_t sum[ROWS][4];
  const uint8_t* a[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) sum[r][part] = vmulq_n_s32(vld1q_s32(args.column_sums + panel * PANEL + part * 4), 128);
    a[r] = args.a + (row + r) * args.quads * 4;
  }
  for (int64_t q = 0; q < args.quads; q += 2) {  // quads is even
    int8x8_t eight[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) eight[r] = vreinterpret_s8_u8(veor_u8(vld1_u8(a[r] + q * 4), vdup_n_u8(0x80)));
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      const uint8_t* at = codes + q * 64 + part * 16;
      const int8x16_t first = vreinterpretq_s8_u8(vld1q_u8(at)), second = vreinterpretq_s8_u8(vld1q_u8(at + 64));
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) sum[r][part] = vdotq_lane_s32(vdotq_lane_s32(sum[r][part], first, eight[r], 0), second, eight[r], 1);
    }
  }
  int32_t dots[ROWS][PANEL];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {  // unrolled, or the sums are kept in memory all along
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) vst1q_s32(dots[r] + 4 * part, sum[r][part]);
  }
  for (int r = 0; r < ROWS; ++r) store_integer(args, row + r, panel * PANEL, dots[r]);
}

inline void integer_rows(const IntegerArgs& args, int64_t panel, int64_t row, int64_t end) {
  const uint8_t* codes = args.codes + panel * args.quads * 64;
  for (; row + 4 <= end; row += 4) integer_tile<4>(args, codes, panel, row);
  for (; row < end; ++row) integer_tile<1>(args, codes, panel, row);
}

void integer(const IntegerArgs& args, int64_t panel, int64_t panel_end, int64_t row, int64_t row_end) {
  for (; panel < panel_end; ++panel) integer_rows(args, panel, row, row_end);
}

Kernels changed(Kernels table) {
  table.name = "neondot";
  table.fixed = fixed_by_kind;
  table.split = split_row;
  table.integer = integer;
  return table;
}

}  // namespace

const Kernels& neondot_kernels() {
  static const Kernels table = changed(neon_kernels());
  return table;
}

}  // namespace bitgrain
