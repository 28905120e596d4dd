// Blocks through NEON, as every 64-bit Arm processor has it.
#include "blocks_neon.hpp"

namespace bitgrain {

const BlockKernels& neon_blocks() {
  static const BlockKernels table = {"neon", prepare_rows, panels_by_code};
  return table;
}

}  // namespace bitgrain
