"""Intel GPUs, through torch.xpu."""

from __future__ import annotations

from bitgrain.platforms.base import PlatformProbe, ProbeReport

GENERATIONS = {
    "xe2": frozenset({"bf16", "fp16", "int8_dot", "xe2"}),
    "xe_hpc": frozenset({"bf16", "fp16", "int8_dot", "xe_hpc"}),
}


def _probe() -> ProbeReport:
    return ProbeReport("xpu", "absent")


PLATFORM = PlatformProbe("xpu", "xpu", 20, _probe, GENERATIONS)
