// Codebook products in plain C++.
#include "units_portable.hpp"

#include "codebook_trellis.hpp"

namespace bitgrain {

const CodebookKernels& portable_codebooks() {
  static const CodebookKernels table = {run_additive, run_lattice, run_trellis, run_vector, run_lookup};
  return table;
}

}  // namespace bitgrain
