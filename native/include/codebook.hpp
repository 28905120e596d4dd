// Products with weights whose codes are looked up while they are multiplied; the dense weight never exists.
#pragma once
#include <cstdint>

#include "kernels.hpp"

namespace bitgrain {

constexpr int64_t CODE_LANES = 8;          // in features of one vector of weights: a unit
constexpr int64_t CODE_ROW_BLOCK = 32;     // out features that one thread takes at a time
constexpr int64_t CODE_CHUNK_UNITS = 128;  // units whose products are summed in one chain; sums of chunks are added in order
constexpr int64_t CODE_SKEW = 16;          // floats between rows in scratch, so that rows do not fall on the same lines of a cache
constexpr int64_t CODE_BLOCK_STRIDE = CODE_CHUNK_UNITS * CODE_LANES + CODE_SKEW;

// What every kind of codebook shares: y[m, n] = (sum over k of x'[m, k] w[n, k]) * scale[n / scale_rows] * factor + offset[m] + bias[n]
// where x'[m, i] = x[m, gather[i]] * column_scale[gather[i]] in float32 and offset[m] = sum over k of x[m, k] * column_offset[k].
struct CodeProduct {
  const void* x;               // [rows, k] of x_dtype
  int32_t x_dtype;
  int64_t rows, k, n, units;   // units: vectors of eight columns that codes and x' have, zeros beyond the columns
  const int32_t* gather;       // [units * 8], -1: a zero; null: in order
  const float* column_scale;   // [k], or null
  const float* column_offset;  // [k], or null
  const void* scale;           // [ceil(n / scale_rows)] of scale_dtype, or null
  int32_t scale_dtype;
  int64_t scale_rows;
  float factor;
  const void* bias;            // [n] of y_dtype, or null
  void* y;                     // [rows, n] of y_dtype
  int32_t y_dtype;
  int32_t threads;
  float* scratch;              // scratch_floats(...) of them
};

inline int64_t codebook_thread_floats(int64_t rows) { return CODE_ROW_BLOCK * (CODE_BLOCK_STRIDE + rows) + 64; }

// x', offsets and a block of decoded weights with its sums for each thread.
inline int64_t codebook_scratch_floats(int64_t rows, int64_t units, int32_t threads) {
  return rows * (units * CODE_LANES + CODE_SKEW) + rows + 64 + threads * codebook_thread_floats(rows);
}

// w[h o + i, g j + l] = sum over c of books[c, code[o, j, c], i, l]
struct AdditiveCodes {
  const void* codes;  // [n / h, k / g, count], bytes of `code_bytes`, the low `bits` bits count
  int32_t code_bytes, bits;
  int64_t count;      // codebooks
  const void* books;  // [count, 2^bits, h, g] of book_dtype
  int32_t book_dtype;
  int64_t h, g;
};

// w[n, 8 c + j] = e8p(codes[n, c])[j] + second(residual[n, c])[j], see numerics/e8_lattice.py
struct LatticeCodes {
  const uint16_t* codes;    // [n, units]
  const void* residual;     // null; bytes: rows of `second`; 16 bits: e8p codes, multiplied by `residual_factor`
  int32_t residual_bytes;   // 0, 1 or 2
  float residual_factor;
  const float* magnitudes;  // [256, 8]
  const int32_t* signs;     // [256, 8]: the top bit, by the low byte
  const float* shifts;      // [256], by the low byte
  const float* second;      // [256, 8]
};

enum TrellisDecoder : int32_t { LUT = 0, QUANTLUT = 1, QUANTLUT_SYM = 2, ONE_MAD = 3, TWO_MAD = 4, THREE_INST = 5 };

// Tiles of 16 x 16 weights as circular bit streams, see weights/trellis.py
struct TrellisCodes {
  const uint8_t* packed;  // [n / 16, k / 16, 32 bits]
  int32_t bits, window, step, decoder, table_bits, fragments;
  const float* table;     // [2^table_bits, step], or null
};

// One book of vectors of consecutive rows of a column: value[n, t] = book[group[t], codes[n / v, t], n % v], and a residual likewise.
struct VectorBook {
  const void* codes;     // [ceil(n / v), columns]
  const void* book;      // [groups * entries, v] of the dtype of the whole call
  int32_t code_bytes;
  const int32_t* start;  // [units * 8]: entries * group[t], zeros beyond the columns; null for one group
};

struct VectorCodes {
  VectorBook main, residual;  // residual.codes is null where there is none
  int32_t dtype;              // of the books
  int64_t v, columns, units;
};

// w[n, k] = table[n or 0, code[n, k]] * scale[n, k / 8 / units_per_group]
struct LookupCodes {
  const uint8_t* packed;  // [n, row_bytes], then 16 bytes more; a dense little-endian stream per row
  int64_t row_bytes;
  int32_t bits;
  const float* table;     // [n or 1, table_stride]
  int64_t table_stride;   // entries from one row's table to the next; 0: one for all
  const void* scale;      // [n, groups]
  int32_t scale_dtype;
  int64_t groups, units_per_group;
};

struct CodebookKernels {
  void (*additive)(const CodeProduct&, const AdditiveCodes&);
  void (*lattice)(const CodeProduct&, const LatticeCodes&);
  void (*trellis)(const CodeProduct&, const TrellisCodes&);
  void (*vector)(const CodeProduct&, const VectorCodes* sections, int32_t count);  // sections stand side by side in x'
  void (*lookup)(const CodeProduct&, const LookupCodes&);
};

const CodebookKernels& portable_codebooks();
#ifdef BITGRAIN_X86
const CodebookKernels& avx2_codebooks();  // also where AVX-512 is
#endif
#ifdef BITGRAIN_NEON
const CodebookKernels& neon_codebooks();
#endif

}  // namespace bitgrain
