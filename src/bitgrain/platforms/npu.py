"""Ascend NPUs, through torch_npu."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

from bitgrain.platforms.base import OPERATOR, PlatformProbe, ProbeReport
from bitgrain.platforms.devices import Asking, Device, ask, importable, profiles, told

PACKAGE = "torch_npu"
OPERATORS = (
    "npu::npu_quant_matmul",
    "npu::npu_weight_quant_batchmatmul",
    "npu::npu_grouped_matmul",
    "npu::npu_quantize",
    "npu::npu_dynamic_quant",
    "npu::npu_convert_weight_to_int4pack",
    "npu::npu_format_cast",
    "npu::npu_trans_quant_param",
)
# Of microscaled products; registered by packages for the newest generation.
MICROSCALING = ("npu::npu_dynamic_mx_quant", "npu::npu_dynamic_block_quant", "npu::npu_dtype_cast")
# Without any of these none of the quantized products could run.
PRODUCTS = OPERATORS[:3]
# Source: operator pages of torch_npu 7.3 (Ascend/op-plugin): operand types by product series.
GENERATIONS = profiles(
    {
        "910b": "bf16 fp16 int8_dot int4_dot",
        "910_93": "bf16 fp16 int8_dot int4_dot",
        "910_95": "bf16 fp16 int8_dot fp8_dot scaled_dot",
        "310p": "fp16 int8_dot",
    },
    {"910b": OPERATORS, "910_93": OPERATORS, "910_95": OPERATORS + MICROSCALING, "310p": OPERATORS},
)
# Device name to generation; "Ascend910B" without a digit is of the first one, which has none here.
_NAMES = ((re.compile(r"Ascend910B\d"), "910b"), (re.compile(r"Ascend910_93"), "910_93"), (re.compile(r"Ascend(910_95|950)"), "910_95"), (re.compile(r"Ascend310P"), "310p"))


def generation_of(name: str) -> str:
    """The generation of a device by its name; "" for one that is not listed."""
    return next((generation for pattern, generation in _NAMES if pattern.match(name)), "")


def _look(module: Any, index: int) -> Device | str:
    name = module.get_device_name(index)
    generation = generation_of(name)
    if not generation:
        return f"{name} is of none of the generations {', '.join(GENERATIONS)}"
    found = module.get_device_properties(index)
    features = frozenset(f for f in GENERATIONS[generation] if not f.startswith(OPERATOR))
    cores = getattr(found, "cube_core_num", 0) or getattr(found, "multi_processor_count", 0) or 1
    return Device(name, generation, features, cores, found.total_memory)


_FUNCTIONS = ("is_available", "device_count", "get_device_name", "get_device_properties")
# out-of-tree devices share one dispatch key; a process has one of them
_ASKING = Asking("npu", "npu", f"torch.npu of {PACKAGE}", _FUNCTIONS, _look, "PrivateUse1", OPERATORS + MICROSCALING)


def _probe() -> ProbeReport:
    import torch

    if not importable(PACKAGE):
        return ProbeReport("npu", f"absent: {PACKAGE} is not installed")
    try:
        import_module(PACKAGE)
    except Exception as error:  # whatever a broken package raises
        return ProbeReport("npu", f"broken: importing {PACKAGE} failed: {told(error)}")
    module = getattr(torch, "npu", None)
    if module is None:
        return ProbeReport("npu", f"incompatible: {PACKAGE} brings no torch.npu")
    report = ask(module, _ASKING)
    if report.platform is not None and not any(OPERATOR + name in report.platform.features for name in PRODUCTS):
        return ProbeReport("npu", f"incompatible: this {PACKAGE} registers none of {', '.join(PRODUCTS)}")
    return report


PLATFORM = PlatformProbe("npu", "npu", 25, _probe, GENERATIONS)
