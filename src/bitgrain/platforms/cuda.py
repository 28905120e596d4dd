"""NVIDIA GPUs, through torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from bitgrain.platforms.base import OPERATOR, PlatformProbe, ProbeReport
from bitgrain.platforms.devices import Asking, Device, ask, profiles

OPERATORS = (
    "aten::_int_mm",
    "aten::_scaled_mm",
    "aten::_scaled_mm_v2",
    "aten::_grouped_mm",
    "aten::_scaled_grouped_mm",
    "aten::_scaled_grouped_mm_v2",
    "aten::_convert_weight_to_int4pack",
    "aten::_weight_int4pack_mm",
    "aten::_weight_int8pack_mm",
)
# Sources: PTX ISA 8.7, mma and tcgen05.mma: operand types by target; torch's native_functions.yaml for the operators.
GENERATIONS = profiles(
    {
        "sm90": "bf16 fp16 int8_dot fp8_dot",
        "sm70": "fp16",
        "sm75": "fp16 int8_dot",
        "sm80": "bf16 fp16 int8_dot",
        "sm86": "bf16 fp16 int8_dot",
        "sm87": "bf16 fp16 int8_dot",
        "sm89": "bf16 fp16 int8_dot fp8_dot",
        "sm100": "bf16 fp16 int8_dot fp8_dot scaled_dot",
        "sm103": "bf16 fp16 int8_dot fp8_dot scaled_dot",
        "sm110": "bf16 fp16 int8_dot fp8_dot scaled_dot",
        "sm120": "bf16 fp16 int8_dot fp8_dot scaled_dot",
        "sm121": "bf16 fp16 int8_dot fp8_dot scaled_dot",
    },
    OPERATORS,
)
# Code for these runs on no other generation, and code for their neighbours not on them (integrated devices).
_ALONE = {53, 62, 72, 87, 101}
_CODE = re.compile(r"(sm|compute)_(\d+)([af]?)")


def _features(number: int) -> frozenset[str]:
    """Features of a generation: its profile's, or those that its predecessors' guarantee.

    A generation runs what was compiled for older ones, except instructions of one architecture alone; scaled products are such.
    """
    name = f"sm{number}"
    if name in GENERATIONS:
        return GENERATIONS[name]
    older = [known for known in GENERATIONS if int(known[2:]) < number]
    if not older:
        return frozenset({name})
    nearest = max(older, key=lambda known: int(known[2:]))
    own = {nearest, *([] if int(nearest[2:]) // 10 == number // 10 else ["scaled_dot"])}
    return frozenset({name, *(f for f in GENERATIONS[nearest] if f not in own and not f.startswith(OPERATOR))})


def has_code(number: int, built_for: Sequence[str]) -> bool:
    """Whether code for any of torch's architectures ("sm_80", "compute_90") runs on generation `number` (90 for 9.0).

    Machine code runs on its own and later minors of its major; intermediate code on everything later; that of one
    architecture ("sm_90a") on that one; that of a family ("sm_100f") within the major.
    Source: CUDA C++ Programming Guide 12.9, sections on binary and PTX compatibility.
    """
    for text in built_for:
        found = _CODE.fullmatch(text)
        if found is None:
            return True  # a name that nothing here knows; torch says itself where it fails
        kind, code, suffix = found[1], int(found[2]), found[3]
        if code == number:
            return True
        if suffix == "a" or number < code:
            continue
        if kind == "compute" and not suffix:
            return True
        if number // 10 == code // 10 and not {number, code} & _ALONE:
            return True
    return not built_for


def _look(module: Any, index: int) -> Device | str:
    found = module.get_device_properties(index)
    number = 10 * found.major + found.minor
    built_for = module.get_arch_list()
    if not has_code(number, built_for):
        return f"{found.name} is of generation sm{number}, and this torch has code for {', '.join(built_for)} only"
    features = frozenset(f for f in _features(number) if not f.startswith(OPERATOR))
    return Device(found.name, f"sm{number}", features, found.multi_processor_count, found.total_memory)


_ASKING = Asking("cuda", "cuda", "torch.cuda", ("is_available", "device_count", "get_device_properties", "get_arch_list"), _look, "CUDA", OPERATORS)


def _probe() -> ProbeReport:
    import torch

    if getattr(torch.version, "hip", None):
        return ProbeReport("cuda", 'absent: torch is built for ROCm; its devices are those of platform "hip"')
    if not getattr(torch.version, "cuda", None):
        return ProbeReport("cuda", "absent: torch is built without CUDA")
    return ask(torch.cuda, _ASKING)


PLATFORM = PlatformProbe("cuda", "cuda", 30, _probe, GENERATIONS)
