"""Names of types that torch_npu has beyond torch's."""

from __future__ import annotations

# torch_npu numbers its own types above torch's; only their identity matters to a caller
FLOAT4 = 296
MX_SCALE = 293
