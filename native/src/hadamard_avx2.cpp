// Walsh-Hadamard transforms with AVX2, FMA and F16C.
#include "units_avx2.hpp"

#include "hadamard_run.hpp"

namespace bitgrain {

void avx2_hadamard(const HadamardArgs& args) { run_hadamard(args); }

}  // namespace bitgrain
