"""Apple GPUs, through torch.backends.mps."""

from __future__ import annotations

from bitgrain.platforms.base import PlatformProbe, ProbeReport

GENERATIONS = {
    "m1": frozenset({"fp16", "m1"}),
    "m3": frozenset({"bf16", "fp16", "m3"}),
}


def _probe() -> ProbeReport:
    return ProbeReport("mps", "absent")


PLATFORM = PlatformProbe("mps", "mps", 10, _probe, GENERATIONS)
