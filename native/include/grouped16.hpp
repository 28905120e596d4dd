// The way into the bfloat16 kernels.  The including file defines panels_rows<Decoder, PANELS> before; Scope holds what a
// thread needs while it works.  Internal linkage.
#pragma once

namespace bitgrain {
namespace {

template <class Decoder>
inline void panels16(const Work& work, int64_t panel, int64_t panel_end, int64_t row, int64_t row_end) {
  if (panel_end - panel > 1) panels_rows<Decoder, 2>(work, panel, row, row_end - row);
  else panels_rows<Decoder, 1>(work, panel, row, row_end - row);
}

template <class Scope>
inline void grouped16_by_kind(const GroupedArgs& args, const Cut& cut, int64_t panel, int64_t panel_end, int64_t row, int64_t row_end) {
  const Work work = {args, cut, (args.units * UNIT + STEP - 1) / STEP * STEP, cut.weights, cut.totals};
  const Scope scope(args.rows);
  switch (args.code_kind) {
    case NIBBLE: return panels16<Nibble>(work, panel, panel_end, row, row_end);
    case BYTE: return panels16<Byte>(work, panel, panel_end, row, row_end);
    case E4M3: return panels16<Float4>(work, panel, panel_end, row, row_end);
    case E5M2: return panels16<Float5>(work, panel, panel_end, row, row_end);
    case TABLE4: return panels16<Table>(work, panel, panel_end, row, row_end);
    default: return panels16<DenseBf16>(work, panel, panel_end, row, row_end);
  }
}

}  // namespace
}  // namespace bitgrain
