// Scalar conversions between float32 and the 16-bit types.  Everything here has internal linkage: files with different
// instruction sets must not share a copy.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernels.hpp"

namespace bitgrain {
namespace {

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude >= 0x0400) return bits_to_float(sign | ((magnitude << 13) + (112u << 23)));
  const float value = float(magnitude) * bits_to_float((127u - 24) << 23);  // subnormal: a multiple of 2^-24
  return sign ? -value : value;
}

inline float bf16_to_float(uint16_t value) { return bits_to_float(uint32_t(value) << 16); }

inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t((bits >> 16) | 0x40);  // NaN stays NaN
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);                 // nearest, ties to even
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to infinity
  if (magnitude < 0x38800000) {                                 // subnormal: adding 0.5 rounds at 2^-24
    const uint32_t rounded = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
    return uint16_t(sign | rounded);
  }
  return uint16_t(sign | ((magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}

inline float load_scalar(const void* from, int64_t i, int32_t dtype) {
  if (dtype == F32) return static_cast<const float*>(from)[i];
  const uint16_t raw = static_cast<const uint16_t*>(from)[i];
  return dtype == F16 ? half_to_float(raw) : bf16_to_float(raw);
}

inline void store_scalar(void* to, int64_t i, int32_t dtype, float value) {
  if (dtype == F32) {
    static_cast<float*>(to)[i] = value;
  } else {
    static_cast<uint16_t*>(to)[i] = dtype == F16 ? float_to_half(value) : float_to_bf16(value);
  }
}

// e^x for x up to 88, to about one unit in the last place, in steps that the compiler can do side by side; 0 below -87.
inline float exponential(float x) {
  const float limited = x > -87.0f ? (x > 88.0f ? 88.0f : x) : -87.0f;  // a NaN too has to become a whole number
  const float shifted = limited * 1.44269504f + 12582912.0f, whole = shifted - 12582912.0f;  // to the nearest whole number
  const float rest = (limited - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float sum = 1.9875691500e-4f;
  sum = sum * rest + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  const float value = sum * bits_to_float((uint32_t(int32_t(whole)) + 127u) << 23);
  return x != x ? x : x < -87.0f ? 0.0f : value;
}

}  // namespace
}  // namespace bitgrain
