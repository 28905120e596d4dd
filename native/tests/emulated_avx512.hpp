// AVX-512 (F, BW, VL, DQ, VNNI, VBMI, BF16) and AMX as plain loops over vectors of 64 bytes: the sources of these sets run wherever AVX2
// does, slowly, to be tested (CMake: BITGRAIN_EMULATE_AVX512).  Included before anything else of such a source.  Only what the sources
// use is here, under the names of the compiler's header, which these names hide inside of `bitgrain`; what a source uses besides does
// not compile, for want of the instruction.  Meanings are those of Intel's manual (Software Developer's Manual, volume 2).
// Internal linkage.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

// without optimization some of the compiler's are macros
#undef _mm512_slli_epi32
#undef _mm512_srli_epi32
#undef _mm512_srai_epi32
#undef _mm512_slli_epi16
#undef _mm512_srli_epi16
#undef _mm512_ternarylogic_epi32
#undef _mm512_cmp_ps_mask
#undef _mm512_mask_blend_epi8
#undef _mm512_mask_blend_epi16
#undef _mm512_mask_blend_epi32
#undef _mm512_cvtps_ph
#undef _mm512_inserti64x4
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbusd

#define BITGRAIN_EMULATED [[maybe_unused, gnu::always_inline]] inline

namespace bitgrain {
namespace {

using Bytes64 = int8_t __attribute__((vector_size(64)));
using Words32 = int16_t __attribute__((vector_size(64)));
using HalfWords32 = uint16_t __attribute__((vector_size(64)));
using Ints16 = int32_t __attribute__((vector_size(64)));
using Unsigned16 = uint32_t __attribute__((vector_size(64)));

template <class To, class From>
BITGRAIN_EMULATED To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// The two halves of a vector, through the instruction of AVX2.
template <class Half, class Whole>
BITGRAIN_EMULATED Half half_of(const Whole& whole, int which) {
  Half half;
  std::memcpy(&half, reinterpret_cast<const char*>(&whole) + which * int(sizeof half), sizeof half);
  return half;
}

template <class Whole, class Half>
BITGRAIN_EMULATED Whole joined(const Half& low, const Half& high) {
  Whole whole;
  std::memcpy(&whole, &low, sizeof low);
  std::memcpy(reinterpret_cast<char*>(&whole) + sizeof low, &high, sizeof high);
  return whole;
}

template <class Whole>
BITGRAIN_EMULATED Whole read(const void* from) {
  Whole whole;
  std::memcpy(&whole, from, sizeof whole);
  return whole;
}

// ---------------------------------------------------------------- memory

// an instruction with an alignment faults where it is not kept
BITGRAIN_EMULATED void demand_alignment(const void* at) {
  if (reinterpret_cast<uintptr_t>(at) % 64) std::abort();
}

BITGRAIN_EMULATED __m512 _mm512_loadu_ps(const void* from) { return read<__m512>(from); }
BITGRAIN_EMULATED __m512i _mm512_loadu_si512(const void* from) { return read<__m512i>(from); }
BITGRAIN_EMULATED __m512i _mm512_load_si512(const void* from) {
  demand_alignment(from);
  return read<__m512i>(from);
}
BITGRAIN_EMULATED void _mm512_storeu_ps(void* to, __m512 v) { std::memcpy(to, &v, 64); }
BITGRAIN_EMULATED void _mm512_storeu_si512(void* to, __m512i v) { std::memcpy(to, &v, 64); }
BITGRAIN_EMULATED void _mm512_store_si512(void* to, __m512i v) {
  demand_alignment(to);
  std::memcpy(to, &v, 64);
}
BITGRAIN_EMULATED __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* from) {
  __m512 v = {};
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) v[i] = static_cast<const float*>(from)[i];
  }
  return v;
}
BITGRAIN_EMULATED void _mm512_mask_storeu_ps(void* to, __mmask16 mask, __m512 v) {
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) static_cast<float*>(to)[i] = v[i];
  }
}
BITGRAIN_EMULATED __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* from) {
  uint16_t v[16] = {};
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) v[i] = static_cast<const uint16_t*>(from)[i];
  }
  return read<__m256i>(v);
}
BITGRAIN_EMULATED void _mm256_mask_storeu_epi16(void* to, __mmask16 mask, __m256i v) {
  const auto words = bits_of<uint16_t __attribute__((vector_size(32)))>(v);
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) static_cast<uint16_t*>(to)[i] = words[i];
  }
}

// ---------------------------------------------------------------- constants, bits as they are

BITGRAIN_EMULATED __m512 _mm512_setzero_ps() { return __m512{}; }
BITGRAIN_EMULATED __m512i _mm512_setzero_si512() { return __m512i{}; }
BITGRAIN_EMULATED __m512 _mm512_set1_ps(float value) { return joined<__m512>(_mm256_set1_ps(value), _mm256_set1_ps(value)); }
BITGRAIN_EMULATED __m512i _mm512_set1_epi32(int32_t value) { return joined<__m512i>(_mm256_set1_epi32(value), _mm256_set1_epi32(value)); }
BITGRAIN_EMULATED __m512i _mm512_set1_epi8(char value) { return joined<__m512i>(_mm256_set1_epi8(value), _mm256_set1_epi8(value)); }
template <class... Values>
BITGRAIN_EMULATED __m512 _mm512_set_ps(Values... values) {  // the highest lane first
  static_assert(sizeof...(values) == 16);
  const float in_turn[16] = {float(values)...};
  __m512 v;
  for (int i = 0; i < 16; ++i) v[i] = in_turn[15 - i];
  return v;
}
BITGRAIN_EMULATED __m512i _mm512_broadcast_i32x4(__m128i v) {
  const __m256i two = _mm256_broadcastsi128_si256(v);
  return joined<__m512i>(two, two);
}
BITGRAIN_EMULATED __m512 _mm512_castsi512_ps(__m512i v) { return bits_of<__m512>(v); }
BITGRAIN_EMULATED __m512i _mm512_castps_si512(__m512 v) { return bits_of<__m512i>(v); }
BITGRAIN_EMULATED __m512i _mm512_castsi256_si512(__m256i v) { return joined<__m512i>(v, _mm256_set1_epi32(0x5a5a5a5a)); }  // the upper half is anything
BITGRAIN_EMULATED __m512i _mm512_inserti64x4(__m512i v, __m256i half, int which) {
  return which & 1 ? joined<__m512i>(half_of<__m256i>(v, 0), half) : joined<__m512i>(half, half_of<__m256i>(v, 1));
}

// ---------------------------------------------------------------- conversions

BITGRAIN_EMULATED __m512i _mm512_cvtepu8_epi32(__m128i v) {
  return joined<__m512i>(_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8)));
}
BITGRAIN_EMULATED __m512i _mm512_cvtepi8_epi32(__m128i v) {
  return joined<__m512i>(_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_srli_si128(v, 8)));
}
BITGRAIN_EMULATED __m512i _mm512_cvtepu16_epi32(__m256i v) {
  return joined<__m512i>(_mm256_cvtepu16_epi32(half_of<__m128i>(v, 0)), _mm256_cvtepu16_epi32(half_of<__m128i>(v, 1)));
}
BITGRAIN_EMULATED __m512i _mm512_cvtepi16_epi32(__m256i v) {
  return joined<__m512i>(_mm256_cvtepi16_epi32(half_of<__m128i>(v, 0)), _mm256_cvtepi16_epi32(half_of<__m128i>(v, 1)));
}
BITGRAIN_EMULATED __m256i _mm512_cvtepi32_epi16(__m512i v) {  // the lower halves
  uint16_t words[16];
  for (int i = 0; i < 16; ++i) words[i] = uint16_t(bits_of<Ints16>(v)[i]);
  return read<__m256i>(words);
}
BITGRAIN_EMULATED __m512 _mm512_cvtepi32_ps(__m512i v) {
  return joined<__m512>(_mm256_cvtepi32_ps(half_of<__m256i>(v, 0)), _mm256_cvtepi32_ps(half_of<__m256i>(v, 1)));
}
BITGRAIN_EMULATED __m512 _mm512_cvtph_ps(__m256i v) {
  return joined<__m512>(_mm256_cvtph_ps(half_of<__m128i>(v, 0)), _mm256_cvtph_ps(half_of<__m128i>(v, 1)));
}
BITGRAIN_EMULATED __m256i _mm512_cvtps_ph(__m512 v, int rounding) {
  if (rounding != (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) std::abort();
  return joined<__m256i>(_mm256_cvtps_ph(half_of<__m256>(v, 0), _MM_FROUND_TO_NEAREST_INT), _mm256_cvtps_ph(half_of<__m256>(v, 1), _MM_FROUND_TO_NEAREST_INT));
}

// ---------------------------------------------------------------- arithmetic

BITGRAIN_EMULATED __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
BITGRAIN_EMULATED __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
BITGRAIN_EMULATED __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
BITGRAIN_EMULATED __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return joined<__m512>(_mm256_fmadd_ps(half_of<__m256>(a, 0), half_of<__m256>(b, 0), half_of<__m256>(c, 0)),
                        _mm256_fmadd_ps(half_of<__m256>(a, 1), half_of<__m256>(b, 1), half_of<__m256>(c, 1)));
}
BITGRAIN_EMULATED __m512i _mm512_add_epi32(__m512i a, __m512i b) { return bits_of<__m512i>(bits_of<Unsigned16>(a) + bits_of<Unsigned16>(b)); }
BITGRAIN_EMULATED __m512i _mm512_sub_epi32(__m512i a, __m512i b) { return bits_of<__m512i>(bits_of<Unsigned16>(a) - bits_of<Unsigned16>(b)); }
BITGRAIN_EMULATED __m512i _mm512_mullo_epi32(__m512i a, __m512i b) { return bits_of<__m512i>(bits_of<Unsigned16>(a) * bits_of<Unsigned16>(b)); }
BITGRAIN_EMULATED __m512i _mm512_max_epi32(__m512i a, __m512i b) {
  const Ints16 x = bits_of<Ints16>(a), y = bits_of<Ints16>(b);
  return bits_of<__m512i>(x > y ? x : y);
}
BITGRAIN_EMULATED __m512i _mm512_abs_epi8(__m512i v) {  // -128 stays what it is
  return joined<__m512i>(_mm256_abs_epi8(half_of<__m256i>(v, 0)), _mm256_abs_epi8(half_of<__m256i>(v, 1)));
}
// not inlined: the block kernels have thousands of them
[[maybe_unused, gnu::noinline]] __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i unsigned_bytes, __m512i signed_bytes) {
  // sums of two products may exceed 16 bits: even and odd bytes apart
  const Words32 a = bits_of<Words32>(unsigned_bytes), b = bits_of<Words32>(signed_bytes);
  const Words32 even_a = a & 255, odd_a = bits_of<Words32>(bits_of<HalfWords32>(a) >> 8), even_b = bits_of<Words32>(bits_of<HalfWords32>(b) << 8) >> 8, odd_b = b >> 8;
  for (int half = 0; half < 2; ++half) {
    const __m256i even = _mm256_madd_epi16(half_of<__m256i>(even_a, half), half_of<__m256i>(even_b, half));
    const __m256i odd = _mm256_madd_epi16(half_of<__m256i>(odd_a, half), half_of<__m256i>(odd_b, half));
    const __m256i total = _mm256_add_epi32(half_of<__m256i>(sum, half), _mm256_add_epi32(even, odd));
    std::memcpy(reinterpret_cast<char*>(&sum) + 32 * half, &total, 32);
  }
  return sum;
}

// ---------------------------------------------------------------- bits, shifts, choices

BITGRAIN_EMULATED __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
BITGRAIN_EMULATED __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
BITGRAIN_EMULATED __m512i _mm512_slli_epi32(__m512i v, unsigned count) { return bits_of<__m512i>(bits_of<Unsigned16>(v) << count); }
BITGRAIN_EMULATED __m512i _mm512_srli_epi32(__m512i v, unsigned count) { return bits_of<__m512i>(bits_of<Unsigned16>(v) >> count); }
BITGRAIN_EMULATED __m512i _mm512_srai_epi32(__m512i v, unsigned count) { return bits_of<__m512i>(bits_of<Ints16>(v) >> int(count)); }
BITGRAIN_EMULATED __m512i _mm512_slli_epi16(__m512i v, unsigned count) { return bits_of<__m512i>(bits_of<HalfWords32>(v) << uint16_t(count)); }
BITGRAIN_EMULATED __m512i _mm512_srli_epi16(__m512i v, unsigned count) { return bits_of<__m512i>(bits_of<HalfWords32>(v) >> uint16_t(count)); }
BITGRAIN_EMULATED __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {  // bit abc of the table
  __m512i result = {};
  for (int place = 0; place < 8; ++place) {
    if (table >> place & 1) result |= (place & 4 ? a : ~a) & (place & 2 ? b : ~b) & (place & 1 ? c : ~c);
  }
  return result;
}
template <class Lanes>
BITGRAIN_EMULATED __m512i blend(uint64_t mask, __m512i without, __m512i with) {
  Lanes result = bits_of<Lanes>(without);
  const Lanes other = bits_of<Lanes>(with);
  for (size_t i = 0; i < 64 / sizeof result[0]; ++i) {
    if (mask >> i & 1) result[i] = other[i];
  }
  return bits_of<__m512i>(result);
}
BITGRAIN_EMULATED __m512i _mm512_mask_blend_epi8(__mmask64 mask, __m512i a, __m512i b) { return blend<Bytes64>(mask, a, b); }
BITGRAIN_EMULATED __m512i _mm512_mask_blend_epi16(__mmask32 mask, __m512i a, __m512i b) { return blend<Words32>(mask, a, b); }
BITGRAIN_EMULATED __m512i _mm512_mask_blend_epi32(__mmask16 mask, __m512i a, __m512i b) { return blend<Ints16>(mask, a, b); }
BITGRAIN_EMULATED __mmask64 _mm512_cmpeq_epi8_mask(__m512i a, __m512i b) {
  const Bytes64 equal = bits_of<Bytes64>(a) == bits_of<Bytes64>(b);
  __mmask64 mask = 0;
  for (int i = 0; i < 64; ++i) mask |= uint64_t(equal[i] & 1) << i;
  return mask;
}
BITGRAIN_EMULATED __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  if (predicate != _CMP_UNORD_Q) std::abort();
  __mmask16 mask = 0;
  for (int i = 0; i < 16; ++i) mask = __mmask16(mask | (a[i] != a[i] || b[i] != b[i]) << i);
  return mask;
}

// ---------------------------------------------------------------- lookups

BITGRAIN_EMULATED __m512i _mm512_shuffle_epi8(__m512i v, __m512i places) {
  return joined<__m512i>(_mm256_shuffle_epi8(half_of<__m256i>(v, 0), half_of<__m256i>(places, 0)),
                         _mm256_shuffle_epi8(half_of<__m256i>(v, 1), half_of<__m256i>(places, 1)));
}
[[maybe_unused, gnu::noinline]] __m512 _mm512_permutexvar_ps(__m512i places, __m512 table) {
  __m512 result;
  for (int i = 0; i < 16; ++i) result[i] = table[bits_of<Ints16>(places)[i] & 15];
  return result;
}
[[maybe_unused, gnu::noinline]] __m512i _mm512_permutexvar_epi16(__m512i places, __m512i table) {
  Words32 result;
  for (int i = 0; i < 32; ++i) result[i] = bits_of<Words32>(table)[bits_of<Words32>(places)[i] & 31];
  return bits_of<__m512i>(result);
}
[[maybe_unused, gnu::noinline]] __m512i _mm512_permutex2var_epi8(__m512i low, __m512i places, __m512i high) {
  uint8_t both[128], result[64], at[64];
  std::memcpy(both, &low, 64);
  std::memcpy(both + 64, &high, 64);
  std::memcpy(at, &places, 64);
  for (int i = 0; i < 64; ++i) result[i] = both[at[i] & 127];
  return read<__m512i>(result);
}

// ---------------------------------------------------------------- bfloat16

// numbers too small to be normal count as zero, before and after
BITGRAIN_EMULATED float without_subnormal(float value) { return __builtin_fabsf(value) < 1.17549435e-38f ? __builtin_copysignf(0.0f, value) : value; }

BITGRAIN_EMULATED float add_product(float sum, uint16_t a, uint16_t b) {
  const float x = bits_of<float>(uint32_t(a) << 16), y = bits_of<float>(uint32_t(b) << 16);
  return without_subnormal(__builtin_fmaf(without_subnormal(x), without_subnormal(y), without_subnormal(sum)));
}

[[maybe_unused, gnu::noinline]] __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const auto x = bits_of<HalfWords32>(a), y = bits_of<HalfWords32>(b);
  for (int i = 0; i < 16; ++i) sum[i] = add_product(add_product(sum[i], x[2 * i + 1], y[2 * i + 1]), x[2 * i], y[2 * i]);
  return sum;
}

// ---------------------------------------------------------------- tiles

struct Tile {
  int rows = 0, bytes = 0;
  alignas(64) uint8_t at[16][64] = {};
};

thread_local Tile emulated_tiles[8];
thread_local bool tiles_in_use = false;

BITGRAIN_EMULATED Tile& tile(int number) {
  if (!tiles_in_use || emulated_tiles[number].rows == 0) std::abort();  // the instruction is undefined then
  return emulated_tiles[number];
}

[[maybe_unused]] void _tile_loadconfig(const void* from) {
  const uint8_t* bytes = static_cast<const uint8_t*>(from);
  if (bytes[0] != 1 || bytes[1] != 0) std::abort();
  for (int i = 0; i < 8; ++i) {
    emulated_tiles[i] = Tile();
    emulated_tiles[i].rows = bytes[48 + i];
    emulated_tiles[i].bytes = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8;
    if (emulated_tiles[i].rows > 16 || emulated_tiles[i].bytes > 64) std::abort();
  }
  tiles_in_use = true;
}

[[maybe_unused]] void _tile_release() { tiles_in_use = false; }

[[maybe_unused]] void _tile_zero(int number) { std::memset(tile(number).at, 0, sizeof tile(number).at); }

[[maybe_unused]] void _tile_loadd(int number, const void* from, int64_t stride) {
  Tile& to = tile(number);
  std::memset(to.at, 0, sizeof to.at);
  for (int row = 0; row < to.rows; ++row) std::memcpy(to.at[row], static_cast<const char*>(from) + row * stride, size_t(to.bytes));
}

[[maybe_unused]] void _tile_stored(int number, void* to, int64_t stride) {
  const Tile& from = tile(number);
  for (int row = 0; row < from.rows; ++row) std::memcpy(static_cast<char*>(to) + row * stride, from.at[row], size_t(from.bytes));
}

// sum[m][n] += a[m][k] . b[k][n], four bytes at a time; the shapes have to fit.
template <class Sum>
void multiply_tiles(int to, int first, int second, Sum sum) {
  Tile& c = tile(to);
  const Tile &a = tile(first), &b = tile(second);
  if (c.rows != a.rows || c.bytes != b.bytes || a.bytes != 4 * b.rows) std::abort();
  for (int m = 0; m < c.rows; ++m) {
    for (int n = 0; n < c.bytes / 4; ++n) sum(c.at[m] + 4 * n, a.at[m], b, 4 * n);
  }
}

[[maybe_unused]] void _tile_dpbf16ps(int to, int first, int second) {  // even and odd products have a sum each
  multiply_tiles(to, first, second, [](uint8_t* c, const uint8_t* a, const Tile& b, int column) {
    float sums[2] = {}, total;
    for (int k = 0; k < b.rows; ++k) {
      for (int i = 0; i < 2; ++i) {
        uint16_t x, y;
        std::memcpy(&x, a + 4 * k + 2 * i, 2);
        std::memcpy(&y, b.at[k] + column + 2 * i, 2);
        sums[i] = add_product(sums[i], x, y);
      }
    }
    std::memcpy(&total, c, 4);
    total = without_subnormal(without_subnormal(total) + without_subnormal(sums[0] + sums[1]));
    std::memcpy(c, &total, 4);
  });
}

[[maybe_unused]] void _tile_dpbusd(int to, int first, int second) {  // unsigned bytes of a, signed bytes of b
  multiply_tiles(to, first, second, [](uint8_t* c, const uint8_t* a, const Tile& b, int column) {
    int32_t total;
    std::memcpy(&total, c, 4);
    for (int k = 0; k < b.rows; ++k) {
      for (int i = 0; i < 4; ++i) total += int32_t(a[4 * k + i]) * int8_t(b.at[k][column + i]);
    }
    std::memcpy(c, &total, 4);
  });
}

}  // namespace
}  // namespace bitgrain
