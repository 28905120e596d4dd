// One row of one panel, from float32 to y's dtype, bias added before the one rounding.  Internal linkage.
#pragma once
#include "avx512_values.hpp"

namespace bitgrain {
namespace {

inline __m512i to_bf16(__m512 values) {  // nearest, ties to even, NaN stays NaN; 16-bit results in 32-bit lanes
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i nan = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  return _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q), rounded, nan);
}

template <class Args>
inline void store_panel(const Args& args, int64_t row, int64_t first, __m512 values) {
  const int64_t left = args.n - first, count = left < PANEL ? left : PANEL;
  if (count <= 0) return;
  const __mmask16 lanes = __mmask16((1u << count) - 1);
  if (args.y_dtype == F32) {
    if (args.bias) values = _mm512_add_ps(values, _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(args.bias) + first));
    return _mm512_mask_storeu_ps(static_cast<float*>(args.y) + row * args.n + first, lanes, values);
  }
  const uint16_t* bias = args.bias ? static_cast<const uint16_t*>(args.bias) + first : nullptr;
  uint16_t* to = static_cast<uint16_t*>(args.y) + row * args.n + first;
  const __m256i raw = bias ? _mm256_maskz_loadu_epi16(lanes, bias) : _mm256_setzero_si256();
  if (args.y_dtype == BF16) {
    if (bias) values = _mm512_add_ps(values, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16)));
    return _mm256_mask_storeu_epi16(to, lanes, _mm512_cvtepi32_epi16(to_bf16(values)));
  }
  if (bias) values = _mm512_add_ps(values, _mm512_cvtph_ps(raw));
  _mm256_mask_storeu_epi16(to, lanes, _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

}  // namespace
}  // namespace bitgrain
