// The loop over panels and rows that the bfloat16 kernels share.  The including file defines WIDE, Work and
// panels_rows<Decoder, PANELS> before; Scope holds what a thread needs while it works.  Internal linkage.
#pragma once

namespace bitgrain {
namespace {

template <class Decoder, class Scope>
inline void grouped16_tasks(const GroupedArgs& args) {
  const std::vector<Block> blocks = cut_blocks(args);
  const int64_t panels = (args.n + PANEL - 1) / PANEL, wide = (panels + WIDE - 1) / WIDE;
  const int64_t row_blocks = (args.rows + ROW_BLOCK - 1) / ROW_BLOCK, kept = std::min(args.rows, ROW_BLOCK);
#pragma omp parallel num_threads(args.threads) if (wide > 1)
  {
    std::vector<uint8_t> weights(WIDE * (BLOCK / STEP) * 1024 + 64);
    std::vector<float> totals(size_t(kept) * WIDE * PANEL);
    uint8_t* aligned = weights.data() + (64 - reinterpret_cast<uintptr_t>(weights.data()) % 64) % 64;
    const Work work = {args, blocks, (args.units * UNIT + STEP - 1) / STEP * STEP, aligned, totals.data()};
    const Scope scope(args.rows);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < row_blocks * wide; ++task) {
      const int64_t panel = task % wide * WIDE, base = task / wide * ROW_BLOCK, rows = std::min(ROW_BLOCK, args.rows - base);
      if (panel + 1 < panels) panels_rows<Decoder, 2>(work, panel, base, rows);
      else panels_rows<Decoder, 1>(work, panel, base, rows);
    }
  }
}

template <class Scope>
inline void grouped16_by_kind(const GroupedArgs& args) {
  switch (args.code_kind) {
    case NIBBLE: return grouped16_tasks<Nibble, Scope>(args);
    case BYTE: return grouped16_tasks<Byte, Scope>(args);
    case E4M3: return grouped16_tasks<Float4, Scope>(args);
    default: return grouped16_tasks<Float5, Scope>(args);
  }
}

}  // namespace
}  // namespace bitgrain
