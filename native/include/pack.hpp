// Packing stored codes into the layouts of kernels.hpp and block_kernels.hpp.
//
// Codes come as one dense little-endian bit stream per out feature: code j of a row takes bits [j * bits, (j + 1) * bits).
#pragma once
#include <cstdint>

namespace bitgrain {

struct CodeStream {
  const uint8_t* data;
  int64_t row_bytes;
  int64_t n, k;
  int32_t bits;  // 1 to 8
};

// Values that stand before the codes of a record: one per `step` in features, of `bytes` bytes each; null: there are none.
struct PackedField {
  const uint8_t* values;  // [n][row_values]
  int64_t row_values;
  int64_t step;
  int64_t bytes;
};

}  // namespace bitgrain
