// Walsh-Hadamard transforms with NEON.
#include "neon_values.hpp"

#include "hadamard_run.hpp"

namespace bitgrain {

void neon_hadamard(const HadamardArgs& args) { run_hadamard(args); }

}  // namespace bitgrain
