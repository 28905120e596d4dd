"""NVIDIA GPUs, through torch."""

from __future__ import annotations

from bitgrain.platforms.base import PlatformProbe, ProbeReport

GENERATIONS = {
    "sm90": frozenset({"bf16", "fp16", "int8_dot", "fp8_dot", "sm90"}),
    "sm80": frozenset({"bf16", "fp16", "int8_dot", "sm80"}),
    "sm89": frozenset({"bf16", "fp16", "int8_dot", "fp8_dot", "sm89"}),
    "sm100": frozenset({"bf16", "fp16", "int8_dot", "fp8_dot", "scaled_dot", "sm100"}),
    "sm75": frozenset({"fp16", "int8_dot", "sm75"}),
}


def _probe() -> ProbeReport:
    return ProbeReport("cuda", "absent")


PLATFORM = PlatformProbe("cuda", "cuda", 30, _probe, GENERATIONS)
