// Codebook products with NEON.
#include "neon_values.hpp"

#include "codebook_trellis.hpp"

namespace bitgrain {

const CodebookKernels& neon_codebooks() {
  static const CodebookKernels table = {run_additive, run_lattice, run_trellis, run_vector, run_lookup};
  return table;
}

}  // namespace bitgrain
