// The C interface of the block kernels, and their threads.
#include <cstring>
#include <memory>
#include <new>
#include <string_view>

#include "block_layout.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* bg_instruction_set();

namespace bitgrain {

int64_t block_input_bytes(int64_t rows, int64_t k) { return rows * (k / BLOCK_UNIT) * int64_t(sizeof(UnitInput)) + 64; }

int64_t block_panel_bytes(const BlockFormat& format, int64_t k) {
  const int64_t units = k / BLOCK_UNIT, whole = units / RECORD_UNITS;
  const int64_t tail = units % RECORD_UNITS ? RecordLayout(format, units % RECORD_UNITS).end : 0;
  return whole * RecordLayout(format, RECORD_UNITS).end + tail;
}

const BlockKernels& block_kernels() {
  const std::string_view name = bg_instruction_set();
  if (name == "portable") return portable_blocks();
#ifdef BITGRAIN_NEON
  return name == "neon" ? neon_blocks() : neondot_blocks();
#endif
#ifdef BITGRAIN_VNNI
  if (name == "avxvnni") return avxvnni_blocks();
#endif
#ifdef BITGRAIN_X86
  return name == "avx2" ? avx2_blocks() : avx512_blocks();
#endif
  return portable_blocks();
}

namespace {

enum BlockStatus : int32_t { BLOCK_OK = 0, BLOCK_OUT_OF_MEMORY = 3 };

// Activations, in elements, below which a pass over them costs less than waking the other threads.
constexpr int64_t PREPARED_ALONE = 1 << 14;

// One row streams through the weight: long ways for the memory's prefetchers, still some for a thread that is late.
constexpr int64_t SHARES = 8;

int64_t panels_of_task(int64_t panels, int64_t rows, int64_t threads) {
  const int64_t share = panels / (threads * SHARES);
  return rows == 1 && share > PANELS_TOGETHER ? share : PANELS_TOGETHER;
}

// As much of the prepared rows as stays in a share of the last cache while all panels pass over it.
constexpr int64_t CACHED_INPUT_BYTES = 3 << 20;

int64_t rows_of_task(int64_t units) {
  const int64_t blocks = CACHED_INPUT_BYTES / ((units > 0 ? units : 1) * int64_t(sizeof(UnitInput)) * ROWS_TOGETHER);
  return ROWS_TOGETHER * (blocks > 1 ? blocks : 1);
}

}  // namespace
}  // namespace bitgrain

using namespace bitgrain;

// Bytes of one panel of a weight with k in features; `format` holds the seven numbers of BlockFormat.
EXPORT int64_t bg_block_panel_bytes(const int32_t* format, int64_t k) {
  BlockFormat given;
  std::memcpy(&given, format, sizeof given);
  return block_panel_bytes(given, k);
}

// y [rows, n] of x's dtype = x [rows, k] times the weight, as BlockWeight says; bias [n] of x's dtype or null.
EXPORT int32_t bg_block_linear(const void* x, int32_t dtype, int64_t rows, int64_t k, const int32_t* format, const void* data, const float* factor, int64_t n,
                               const void* bias, void* y, int32_t precision, int32_t threads) {
  BlockWeight weight = {{}, static_cast<const uint8_t*>(data), factor, n, k};
  std::memcpy(&weight.format, format, sizeof weight.format);
  const std::unique_ptr<uint8_t[]> input(new (std::nothrow) uint8_t[size_t(block_input_bytes(rows, k))]);
  if (!input) return BLOCK_OUT_OF_MEMORY;
  const BlockKernels& kernels = block_kernels();
  const int64_t panels = (n + PANEL - 1) / PANEL, together = panels_of_task(panels, rows, threads), of_panels = (panels + together - 1) / together;
  const int64_t units = k / BLOCK_UNIT, step = rows_of_task(units), tasks = (rows + step - 1) / step * of_panels, row_bytes = n * (dtype == F32 ? 4 : 2);
  const bool shared = rows * k > PREPARED_ALONE;
  if (!shared) kernels.prepare(weight.format, x, dtype, k, k, rows, 0, rows, precision, input.get());
#pragma omp parallel num_threads(threads) if (tasks > 1 || shared)
  {
    if (shared) {
#pragma omp for schedule(dynamic)
      for (int64_t row = 0; row < rows; ++row) kernels.prepare(weight.format, x, dtype, k, k, rows, row, row + 1, precision, input.get());
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t first = task % of_panels * together, last = first + together < panels ? first + together : panels, row = task / of_panels * step;
      kernels.panels(weight, aligned_input(input.get()) + row * units, rows - row < step ? rows - row : step, first, last, bias,
                     static_cast<uint8_t*>(y) + row * row_bytes, dtype, n);
    }
  }
  return BLOCK_OK;
}
