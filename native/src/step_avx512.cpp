// See step.hpp: the same code, compiled for this instruction set.
#include "step.hpp"

namespace bitgrain {

const StepKernels& avx512_step_kernels() {
  static const StepKernels table = {norm_rows, rotate_rows, gate_range, attend_range, add_range};
  return table;
}

}  // namespace bitgrain
