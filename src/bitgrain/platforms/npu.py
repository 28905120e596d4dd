"""Ascend NPUs, through torch_npu."""

from __future__ import annotations

from bitgrain.platforms.base import PlatformProbe, ProbeReport

GENERATIONS = {
    "910b": frozenset({"bf16", "fp16", "int8_dot", "910b"}),
    "910_93": frozenset({"bf16", "fp16", "int8_dot", "910_93"}),
    "910_95": frozenset({"bf16", "fp16", "int8_dot", "fp8_dot", "scaled_dot", "910_95"}),
}


def _probe() -> ProbeReport:
    return ProbeReport("npu", "absent")


PLATFORM = PlatformProbe("npu", "npu", 25, _probe, GENERATIONS)
