// The C interface of codebook products and Hadamard transforms: the structures of codebook.hpp, scratch filled in here.
#include <cstring>
#include <new>
#include <vector>

#include "codebook.hpp"
#include "hadamard.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* bg_instruction_set();

namespace bitgrain {
namespace {

enum Status : int32_t { OK = 0, OUT_OF_MEMORY = 3 };

bool portable() { return std::strcmp(bg_instruction_set(), "portable") == 0; }

HadamardKernel hadamard() {
#ifdef BITGRAIN_X86
  if (!portable()) return avx2_hadamard;
#endif
#ifdef BITGRAIN_NEON
  if (!portable()) return neon_hadamard;
#endif
  return portable_hadamard;
}

const CodebookKernels& kernels() {
#ifdef BITGRAIN_X86
  if (!portable()) return avx2_codebooks();
#endif
#ifdef BITGRAIN_NEON
  if (!portable()) return neon_codebooks();
#endif
  return portable_codebooks();
}

// Scratch that a thread keeps between calls while it is small: fresh pages cost more than a product with one row.
constexpr size_t KEPT_FLOATS = size_t(4) << 20;

class Scratch {
 public:
  explicit Scratch(int64_t floats) : own(size_t(floats) > KEPT_FLOATS ? size_t(floats) : 0), data(own.data()) {
    if (!own.empty()) return;
    thread_local std::vector<float> kept;
    if (kept.size() < size_t(floats)) kept.resize(size_t(floats));
    data = kept.data();
  }

 private:
  std::vector<float> own;

 public:
  float* data;
};

template <class Call>
int32_t with_scratch(const CodeProduct* given, Call call) {
  try {
    CodeProduct product = *given;
    Scratch scratch(codebook_scratch_floats(product.rows, product.units, product.threads));
    product.scratch = scratch.data;
    call(product);
  } catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
  }
  return OK;
}

}  // namespace
}  // namespace bitgrain

using namespace bitgrain;

EXPORT int32_t bg_additive(const CodeProduct* product, const AdditiveCodes* codes) {
  return with_scratch(product, [&](const CodeProduct& p) { kernels().additive(p, *codes); });
}

EXPORT int32_t bg_lattice(const CodeProduct* product, const LatticeCodes* codes) {
  return with_scratch(product, [&](const CodeProduct& p) { kernels().lattice(p, *codes); });
}

EXPORT int32_t bg_trellis(const CodeProduct* product, const TrellisCodes* codes) {
  return with_scratch(product, [&](const CodeProduct& p) { kernels().trellis(p, *codes); });
}

// One or two sections, side by side in x'.
EXPORT int32_t bg_vector(const CodeProduct* product, const VectorCodes* sections, int32_t count) {
  return with_scratch(product, [&](const CodeProduct& p) { kernels().vector(p, sections, count); });
}

EXPORT int32_t bg_lookup(const CodeProduct* product, const LookupCodes* codes) {
  return with_scratch(product, [&](const CodeProduct& p) { kernels().lookup(p, *codes); });
}

EXPORT int32_t bg_hadamard(const HadamardArgs* given) {
  try {
    HadamardArgs args = *given;
    Scratch scratch(args.size * args.threads);
    args.scratch = scratch.data;
    hadamard()(args);
  } catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
  }
  return OK;
}
