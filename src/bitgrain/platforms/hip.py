"""AMD GPUs, through a torch that is built for ROCm; tensors live on torch's "cuda" type there, and so do the operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bitgrain.platforms.base import PlatformProbe, ProbeReport
from bitgrain.platforms.devices import Asking, Device, ask, profiles

OPERATORS = (
    "aten::_int_mm",
    "aten::_scaled_mm",
    "aten::_scaled_mm_v2",
    "aten::_grouped_mm",
    "aten::_scaled_grouped_mm",
    "aten::_convert_weight_to_int4pack",
    "aten::_weight_int4pack_mm",
)
# Sources: the ISA guides of CDNA 1 to 4 (MFMA operand types; fp8 is fnuz in the third, OCP in the fourth) and of RDNA 3 and 4 (WMMA).
_FEATURES = {
    "gfx942": "bf16 fp16 int8_dot fp8_fnuz_dot",
    "gfx906": "fp16",
    "gfx908": "bf16 fp16 int8_dot",
    "gfx90a": "bf16 fp16 int8_dot",
    "gfx950": "bf16 fp16 int8_dot fp8_dot scaled_dot",
    "gfx1030": "fp16",
    "gfx1100": "bf16 fp16 int8_dot",
    "gfx1101": "bf16 fp16 int8_dot",
    "gfx1102": "bf16 fp16 int8_dot",
    "gfx1151": "bf16 fp16 int8_dot",
    "gfx1200": "bf16 fp16 int8_dot fp8_dot",
    "gfx1201": "bf16 fp16 int8_dot fp8_dot",
}
GENERATIONS = profiles(_FEATURES, OPERATORS)


def has_code(generation: str, built_for: Sequence[str]) -> bool:
    """Whether torch holds code for a generation: code runs on its own, that of a generic target ("gfx11-generic") on all of the target's."""
    names = [text.partition(":")[0] for text in built_for]
    generic = [name.removesuffix("-generic").replace("-", "") for name in names if name.endswith("-generic")]
    return not names or generation in names or any(generation.startswith(start) for start in generic)


def _look(module: Any, index: int) -> Device | str:
    found = module.get_device_properties(index)
    generation = found.gcnArchName.partition(":")[0]  # "gfx942:sramecc+:xnack-"
    built_for = module.get_arch_list()
    if not has_code(generation, built_for):
        return f"{found.name} is of generation {generation}, and this torch has code for {', '.join(built_for)} only"
    # of a generation that nobody described here nothing is promised; its kernels say what they miss
    features = frozenset({generation, *_FEATURES.get(generation, "").split()})
    return Device(found.name, generation, features, found.multi_processor_count, found.total_memory)


_ASKING = Asking("hip", "cuda", "torch.cuda", ("is_available", "device_count", "get_device_properties", "get_arch_list"), _look, "CUDA", OPERATORS)


def _probe() -> ProbeReport:
    import torch

    if not getattr(torch.version, "hip", None):
        return ProbeReport("hip", "absent: torch is built without ROCm")
    return ask(torch.cuda, _ASKING)


PLATFORM = PlatformProbe("hip", "cuda", 31, _probe, GENERATIONS)
