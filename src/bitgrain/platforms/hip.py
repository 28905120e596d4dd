"""AMD GPUs, through a torch that is built for ROCm; tensors live on torch's "cuda" type there."""

from __future__ import annotations

from bitgrain.platforms.base import PlatformProbe, ProbeReport

GENERATIONS = {
    "gfx942": frozenset({"bf16", "fp16", "int8_dot", "fp8_fnuz_dot", "gfx942"}),
    "gfx90a": frozenset({"bf16", "fp16", "int8_dot", "gfx90a"}),
    "gfx950": frozenset({"bf16", "fp16", "int8_dot", "fp8_dot", "scaled_dot", "gfx950"}),
}


def _probe() -> ProbeReport:
    return ProbeReport("hip", "absent")


PLATFORM = PlatformProbe("hip", "cuda", 31, _probe, GENERATIONS)
