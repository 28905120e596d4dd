// Blocks through NEON with the dot products of bytes (FEAT_DotProd).
#include "blocks_neon.hpp"

namespace bitgrain {

const BlockKernels& neondot_blocks() {
  static const BlockKernels table = {"neondot", prepare_rows, panels_by_code};
  return table;
}

}  // namespace bitgrain
