// Walsh-Hadamard transforms in plain C++.
#include "units_portable.hpp"

#include "hadamard_run.hpp"

namespace bitgrain {

void portable_hadamard(const HadamardArgs& args) { run_hadamard(args); }

}  // namespace bitgrain
