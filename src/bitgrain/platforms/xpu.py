"""Intel GPUs, through torch.xpu."""

from __future__ import annotations

from typing import Any

from bitgrain.platforms.base import PlatformProbe, ProbeReport
from bitgrain.platforms.devices import Asking, Device, ask, profiles

OPERATORS = (
    "aten::_int_mm",
    "aten::_scaled_mm",
    "aten::_scaled_mm_v2",
    "aten::_grouped_mm",
    "aten::_weight_int4pack_mm_with_scales_and_zeros",
)
GENERATIONS = profiles(
    {
        "xe2": "bf16 fp16 int8_dot",
        "xe_lpg": "bf16 fp16",
        "xe_hpg": "bf16 fp16 int8_dot",
        "xe_hpc": "bf16 fp16 int8_dot",
        "xe3": "bf16 fp16 int8_dot",
    },
    OPERATORS,
)
# (architecture, first and last release) of the graphics IP to a generation
_IP = {
    (12, 55, 59): "xe_hpg",
    (12, 60, 61): "xe_hpc",
    (12, 70, 74): "xe_lpg",
    (20, 0, 255): "xe2",
    (30, 0, 255): "xe3",
}


def generation_of(architecture: int) -> str:
    """The generation of a device by torch's number for its architecture; "" for one that is not listed.

    The number is the graphics IP's version, architecture << 22 | release << 14 | revision, times 256.
    Source: DPC++ device_architecture.def; 13136561920 is the Data Center GPU Max, 12.60.7.
    """
    major, release = architecture >> 30, architecture >> 22 & 0xFF
    return next((name for (ip, first, last), name in _IP.items() if ip == major and first <= release <= last), "")


def _look(module: Any, index: int) -> Device | str:
    found = module.get_device_properties(index)
    generation = generation_of(getattr(found, "architecture", 0))
    # torch's kernels are compiled for a device that they were not built for when they first run: none is left out
    families = {
        "fp16": getattr(found, "has_fp16", False),
        "bf16": getattr(found, "has_bfloat16_conversions", False),
        "int8_dot": getattr(found, "has_subgroup_matrix_multiply_accumulate", False),
    }
    if not (families["fp16"] or families["bf16"]):
        return f"{found.name} computes in neither float16 nor bfloat16"
    features = frozenset({name for name, there in families.items() if there} | ({generation} if generation else set()))
    cores = getattr(found, "gpu_subslice_count", 0) or found.max_compute_units
    return Device(found.name, generation, features, cores, found.total_memory)


_ASKING = Asking("xpu", "xpu", "torch.xpu", ("is_available", "device_count", "get_device_properties"), _look, "XPU", OPERATORS)


def _probe() -> ProbeReport:
    import torch

    module = getattr(torch, "xpu", None)
    if module is None or not getattr(module, "_is_compiled", lambda: True)():
        return ProbeReport("xpu", "absent: torch is built without XPU")
    return ask(module, _ASKING)


PLATFORM = PlatformProbe("xpu", "xpu", 20, _probe, GENERATIONS)
