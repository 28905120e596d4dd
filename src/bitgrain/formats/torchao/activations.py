"""Input quantization as torchao's metadata describes it.

    QuantizeTensorToInt8Kwargs    int8 per token or tensor, multiplied by 1 / scale; "reduced range" is half of it, 7 bits
    QuantizeTensorToFloat8Kwargs  float8 per token, tensor or 128 columns, the amax held inside two bounds
    QuantizeTensorToMXKwargs      blocks of a token with E8M0 scales
    QuantizeTensorToNVFP4Kwargs   blocks of 16 with E4M3 scales, perhaps below a scale of the tensor
Source: torchao 0.18, quantization/quantize_/workflows and prototype/mx_formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bitgrain.formats.config_reader import ConfigReader
from bitgrain.weights import NO_ACTIVATION, ActivationSpec

FLOAT8_ELEMENTS = {"float8_e4m3fn": "fp8_e4m3fn", "float8_e4m3fnuz": "fp8_e4m3fnuz", "float8_e5m2": "fp8_e5m2"}
MX_ELEMENTS = {
    "float8_e4m3fn": "fp8_e4m3fn",
    "float8_e5m2": "fp8_e5m2",
    "fp6_e2m3": "fp6_e2m3",
    "fp6_e3m2": "fp6_e3m2",
    "float4_e2m1fn_x2": "fp4_e2m1",
}
# torchao's words for how a block's power of two is chosen, in those of numerics.block_scales.
EXPONENT_RULES = {"FLOOR": "floor", "RCEIL": "ceil", "CEIL": "top", "EVEN": "even"}
NVFP4_BLOCK = 16
# torchao raises smaller E4M3 block scales to the smallest normal number of the type.
LOWEST_NVFP4_SCALE = 2.0**-6
SUPPORTED = "this kind of input quantization is not supported by this version"


def plain(value: Any) -> Any:
    """What torchao wraps as {"_type": ..., "_data": ...}: the data; any other value itself."""
    return value["_data"] if isinstance(value, Mapping) and "_data" in value else value


def type_of(value: Any) -> str:
    """The class name of a wrapped value; "" for any other."""
    return str(value.get("_type", "")) if isinstance(value, Mapping) else ""


def word(reader: ConfigReader, key: str, meanings: Mapping[str, str], default: str | None = None) -> str:
    """What the wrapped word under `key` means; a problem, and any meaning, if it is absent without default or not known."""
    _, value = reader.read(key)
    found = default if value is None else plain(value)
    if not isinstance(found, str) or found not in meanings:
        reader.problem(key, repr(value)[:200], f"one of {', '.join(meanings)}", SUPPORTED)
        return next(iter(meanings.values()))
    return meanings[found]


def read_activation(reader: ConfigReader, static: bool) -> ActivationSpec:
    """The input quantization under `act_quant_kwargs`; NO_ACTIVATION if there is none.

    Args:
        static: the scale (for NVFP4 the second scale) is stored beside the weight.
    """
    _, value = reader.read("act_quant_kwargs")
    if value is None:
        return NO_ACTIVATION
    kind, data = type_of(value), plain(value)
    make = _KINDS.get(kind)
    if make is None or not isinstance(data, Mapping):
        reader.problem("act_quant_kwargs", repr(value)[:200], f"one of {', '.join(_KINDS)}", SUPPORTED)
        return NO_ACTIVATION
    inner = ConfigReader(data, reader.place("act_quant_kwargs"))
    spec = make(inner, static)
    reader.collect(inner.finish)
    return spec


def _int8(reader: ConfigReader, static: bool) -> ActivationSpec:
    bits = 7 if reader.flag("reduce_range") else 8
    symmetric = word(reader, "mapping_type", {"SYMMETRIC": "yes", "ASYMMETRIC": "no"}, "SYMMETRIC") == "yes"
    granularity, _ = _granularity(reader, ("PerRow", "PerToken", "PerTensor"))
    return ActivationSpec(f"int{bits}", "tensor" if static else granularity, symmetric=symmetric, dynamic=not static, reciprocal=True)


def _float8(reader: ConfigReader, static: bool) -> ActivationSpec:
    reader.skip(("mm_config", "kernel_preference"))
    granularity, size = _granularity(reader, ("PerRow", "PerToken", "PerTensor", "PerGroup", "PerBlock"))
    element = word(reader, "float8_dtype", FLOAT8_ELEMENTS, "float8_e4m3fn")
    lower, upper = (reader.number(key) if reader.values.get(key) is not None else None for key in ("hp_value_lb", "hp_value_ub"))
    reader.skip(("hp_value_lb", "hp_value_ub"))
    return ActivationSpec(element, granularity, size, upper_bound=upper, lower_bound=lower)


def _mx(reader: ConfigReader, static: bool) -> ActivationSpec:
    reader.skip(("kernel_preference", "is_swizzled_scales"))
    rule = word(reader, "scaling_mode", EXPONENT_RULES, "FLOOR")
    element = word(reader, "elem_dtype", MX_ELEMENTS, "float8_e4m3fn")
    size = reader.integer("block_size", minimum=1, default=32)
    return ActivationSpec(element, "group", size, scale_type="e8m0", exponent_rule=rule)


def _nvfp4(reader: ConfigReader, static: bool) -> ActivationSpec:
    reader.skip(("is_swizzled_scales", "use_triton_kernel"))
    size = reader.integer("block_size", allowed=(NVFP4_BLOCK,), default=NVFP4_BLOCK)
    spec = ActivationSpec("fp4_e2m1", "group", size, scale_type="e4m3", lowest_scale=LOWEST_NVFP4_SCALE)
    if reader.flag("use_dynamic_per_tensor_scale"):
        return replace(spec, second_scale="dynamic")
    return replace(spec, second_scale="static") if static else spec


def _granularity(reader: ConfigReader, allowed: tuple[str, ...]) -> tuple[str, int]:
    """(granularity, group size) of a wrapped Granularity; without one it is per token."""
    _, value = reader.read("granularity")
    kind, data = type_of(value) or "PerRow", plain(value)
    data = data if isinstance(data, Mapping) else {}
    # only the last dimension is a token's
    along_last = kind != "PerRow" or data.get("dim", -1) in (-1, None)
    if kind in allowed and along_last:
        if kind == "PerTensor":
            return "tensor", 0
        if kind in ("PerRow", "PerToken"):
            return "token", 0
        size = data.get("group_size") if kind == "PerGroup" else _block_columns(data.get("block_size"))
        if isinstance(size, int) and size > 0:
            return "group", size
    reader.problem("granularity", repr(value)[:200], f"{', '.join(allowed)} along the columns of a token", SUPPORTED)
    return "token", 0


def _block_columns(block: Any) -> int:
    """Columns of a block [1, columns]; 0 for blocks of several tokens."""
    if not isinstance(block, list) or any(isinstance(n, bool) or not isinstance(n, int) for n in block) or not block:
        return 0
    return int(block[-1]) if all(n == 1 for n in block[:-1]) else 0


_KINDS = {
    "QuantizeTensorToInt8Kwargs": _int8,
    "QuantizeTensorToFloat8Kwargs": _float8,
    "QuantizeTensorToMXKwargs": _mx,
    "QuantizeTensorToNVFP4Kwargs": _nvfp4,
}
