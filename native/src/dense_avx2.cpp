// See dense_run.hpp: the same code, compiled for this instruction set.
#include "dense_run.hpp"

namespace bitgrain {

void avx2_dense(const DenseArgs& args, int64_t first, int64_t last) { run_dense(args, first, last); }

}  // namespace bitgrain
