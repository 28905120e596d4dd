// The table of kernels that each instruction set fills, and the plain arguments that they take.
#pragma once
#include <cstdint>

namespace bitgrain {

constexpr int64_t PANEL = 16;  // out features that lie side by side
constexpr int64_t UNIT = 8;    // in features that lie side by side

enum Dtype : int32_t { F32 = 0, F16 = 1, BF16 = 2 };
enum Ranges : int32_t { STATIC = 0, PER_TOKEN = 1, PER_TENSOR = 2 };
enum Codes : int32_t { NIBBLE = 0, BYTE = 1, E4M3 = 2, E5M2 = 3, TABLE4 = 4, DENSE_BF16 = 5, DENSE_F16 = 6, DENSE_F32 = 7 };

// x as whole numbers: each chunk of up to CHUNK_UNITS units, which ends where a group ends, has a power of two, and its values
// are multiples of that from -2^22 to 2^22, in three signed bytes.
constexpr int64_t CHUNK_UNITS = 16;

struct Chunk {
  float step;           // x = number * step
  int32_t upper, lower;  // less the sums over the chunk: numbers = 256 * upper parts + lower bytes
};

struct SplitRows {
  uint8_t* bytes;   // [rows][units][even, odd in features][lowest, middle, top byte][4 in features], row_bytes from row to row
  Chunk* chunks;    // [rows][chunk_count]
  uint8_t* whole;   // [rows]: 0 where x is not finite or too small, and the row has no such numbers
  int64_t row_bytes, chunk_count;
};

// y[m, n] = row_scale[m] * sum over groups g of scale[n, g] * (dot(code[n, k in g], x[m, k in g]) - zero[n, g] * sum(x[m, k in g])) + bias[n]
//
// Codes of panel p, unit u (16 out features, 8 in features):
//   NIBBLE  64 bytes: one 32-bit lane per out feature, nibble j holds in feature 8u + j; value = nibble - 8
//   BYTE   128 bytes: two vectors of 16 lanes, lane byte j of vector v holds in feature 8u + 4v + j; value = signed byte
//   E4M3   128 bytes: eight rows (in features) of 16 bytes; value = float8 / 256, the scale holds the rest
//   E5M2   128 bytes: likewise; value = float8
//   TABLE4      64 bytes as NIBBLE; value = table[nibble]
//   DENSE_BF16 256 bytes: four pairs of in features, per pair one 32-bit lane per out feature, the even in feature in its low half
//   DENSE_F16  256 bytes: eight rows (in features) of 16 halves
//   DENSE_F32  512 bytes: likewise, of float32
struct GroupedArgs {
  const float* x;             // [rows, units * 8], zero beyond K
  const uint16_t* x16;        // grouped16 instead of x: bfloat16 [rows up to 16 or a multiple of it, units * 8 up to a multiple of 32]
  const int32_t* x_rows;      // [rows]: the row of x and of x_sums that each row reads; null: its own.  Not for grouped16
  const float* x_sums;        // [rows, groups], for grouped16 [groups, rows]; null when zero points need none
  const SplitRows* split;     // x in whole numbers, where the fixed-point kernel runs; else null
  const uint8_t* codes;       // [panels][units][bytes per unit]
  const void* scale;          // [panels][groups][16] of scale_dtype
  const void* zero;           // [panels][groups][16]: int16 or float32; null: zero_constant
  const float* second;        // [panels * 16]: scales are multiplied by it first; null: 1
  const float* table;         // [16], TABLE4
  const int8_t* whole_table;  // [16], TABLE4: twice, four times, ... the table, all whole numbers from -12 to 12; null: it has others
  const int32_t* group_ends;  // [groups], in units, ascending; the last is `units`
  const float* row_scale;     // [rows]; null: 1
  const void* bias;           // [n] of y_dtype, or null
  void* y;                    // [rows, n] of y_dtype
  int64_t rows, n, units, groups;
  int32_t code_kind, scale_dtype, zero_is_float, y_dtype;
  float zero_constant;
  float whole_step;  // table = whole_table * whole_step
};

// y[m, n] = (dot(a[m], w[n]) - a_zero[m] * column_sum[n]) * a_scale[m] * w_scale[n] + bias[n], the dot product in int32
struct IntegerArgs {
  const uint8_t* a;            // [rows, quads * 4]: signed code + 128, 128 beyond K
  const float* a_scale;        // [rows]
  const int32_t* a_zero;       // [rows], zero point + 128
  const uint8_t* codes;        // [panels][quads][16][4], signed
  const float* w_scale;        // [panels * 16]
  const int32_t* column_sums;  // [panels * 16]: sum of a row of w
  const void* bias;
  void* y;
  int64_t rows, n, quads;
  int32_t y_dtype;
};

// Per row: amax or (min, max), scale, zero point, codes; the formulas stand in weights/activation.py.  A row with a NaN, or of
// a tensor with one, gets the scale NaN.
struct QuantizeArgs {
  const float* x;    // [rows, k]
  uint8_t* a;        // [rows, quads * 4]
  float* scale;      // [rows]
  int32_t* zero;     // [rows], + 128
  int64_t rows, k, quads;
  int32_t symmetric, dynamic;  // dynamic: one of Ranges
  float static_scale;
  int32_t static_zero;
  float top;  // symmetric and dynamic: the code that the largest magnitude stands for
  int32_t reciprocal;  // codes are x * (1 / scale) rounded, plus the zero point, instead of x / scale plus it, rounded
};

struct Range {
  float low = 0.0f, high = 0.0f;  // zero is always inside
  bool nan = false;
};

// How the bfloat16 kernels cut K; schedule.cpp makes it.
struct Segment {
  int64_t first, last;  // in steps of 32 in features
  int64_t group;
  bool opens;  // the first one of its group
};

struct Block {
  int64_t first, last;                  // in steps
  int64_t segment_begin, segment_end;  // in Cut::segments
};

struct Cut {
  const Block* blocks;
  int64_t block_count;
  const Segment* segments;
  uint8_t* weights;  // this thread's: CUT_WEIGHTS bytes, 64-byte aligned
  float* totals;     // this thread's: CUT_TOTALS
};

constexpr int WIDE = 2;              // panels that the bfloat16 and tile kernels multiply together
constexpr int64_t STEP = 32;         // in features of one step: 16 pairs
constexpr int64_t SEGMENT = 512;     // longest chain of sums in one accumulator
constexpr int64_t BLOCK = 1024;      // in features that are decoded at once, at most
constexpr int64_t ROW_BLOCK = 512;   // rows whose running sums are kept at once
constexpr int64_t CUT_WEIGHTS = WIDE * (BLOCK / STEP) * 1024;
constexpr int64_t CUT_TOTALS = ROW_BLOCK * WIDE * PANEL;

// Each function computes a part on the calling thread: out features [panel, panel_end) in panels, rows [row, row_end).
// Cut into parts in any way, an output has the same bits.
struct Kernels {
  const char* name;
  void (*grouped)(const GroupedArgs&, int64_t panel, int64_t panel_end, int64_t row, int64_t row_end);
  // Takes x16, groups of whole 32 in features except the last; WIDE panels and ROW_BLOCK rows at most, row % 32 == 0.  Null: there is none.
  void (*grouped16)(const GroupedArgs&, const Cut&, int64_t panel, int64_t panel_end, int64_t row, int64_t row_end);
  // Takes `split`: NIBBLE, and TABLE4 of whole numbers.  Null: there is none.
  void (*fixed)(const GroupedArgs&, int64_t panel, int64_t panel_end, int64_t row, int64_t row_end);
  // Fills one row of SplitRows; x [width].
  void (*split)(const float* x, const int32_t* group_ends, int64_t groups, const SplitRows& out, int64_t row);
  void (*integer)(const IntegerArgs&, int64_t panel, int64_t panel_end, int64_t row, int64_t row_end);
  void (*widen_range)(const float* x, int64_t count, Range&);
  // `whole` is the range of all rows, and is read for PER_TENSOR only.
  void (*quantize)(const QuantizeArgs&, const Range& whole, int64_t row, int64_t row_end);
  bool tiles;  // `integer` takes WIDE panels, row % 32 == 0, and reads up to 15 rows and 63 bytes beyond `a`
};

const Kernels& portable_kernels();
#ifdef BITGRAIN_X86
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif
#ifdef BITGRAIN_NEON
const Kernels& neon_kernels();
const Kernels& neondot_kernels();
#endif
#ifdef BITGRAIN_VNNI
const Kernels& avxvnni_kernels();
#endif
#ifdef BITGRAIN_BF16
const Kernels& avx512bf16_kernels();
const Kernels& amx_kernels();
bool request_tiles();  // true when the system lets this process use the tile registers
#endif

}  // namespace bitgrain
