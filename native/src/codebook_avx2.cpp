// Codebook products with AVX2, FMA and F16C.
#include "units_avx2.hpp"

#include "codebook_trellis.hpp"

namespace bitgrain {

const CodebookKernels& avx2_codebooks() {
  static const CodebookKernels table = {run_additive, run_lattice, run_trellis, run_vector, run_lookup};
  return table;
}

}  // namespace bitgrain
