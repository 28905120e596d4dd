"""The input quantization that a layer's specifications mean.

    per_tensor            static (stored) or dynamic, one scale for the whole input
    per_channel dynamic   one scale per token: the axis counts [batch, token, feature]
    per_group dynamic     groups of columns; float, E8M0, E4M3 or E5M3 scales
    two stages            groups whose scales are eight-bit floats below one second scale, stored or dynamic
Integer codes are round(x * (1 / s)), which shows where amax falls half way between two codes: with dynamic scales.
Source: formats specification, part 2, sections 3.1 and 3.3; amd-quark 0.13 quantization/observer/observer.py.
"""

from __future__ import annotations

from dataclasses import replace

from bitgrain.formats.config_reader import ConfigReader
from bitgrain.formats.quark.specs import FLOAT8, INTEGERS, PACKED_FLOATS, Stages, TensorSpec
from bitgrain.weights import NO_ACTIVATION, ActivationSpec

ELEMENTS = {**FLOAT8, **PACKED_FLOATS, "int8": "int8", "uint8": "int8", "int4": "int4", "uint4": "int4"}
# Axis of tokens in [batch, token, feature].
TOKEN_AXES = (1, -2)
LAST_AXES = (-1, 1, 2)
SCALE_ELEMENTS = {"fp8_e4m3": "e4m3", "fp8_e5m3": "e5m3"}


def is_unsigned(stages: Stages) -> bool:
    """The input's codes are unsigned, so that a stored zero point is too."""
    return bool(stages) and stages[0].dtype.startswith("uint")


def check_input(reader: ConfigReader, key: str, stages: Stages) -> None:
    """Note a problem unless activation_of knows what the stages mean."""
    if activation_of(stages) is None:
        shown = " then ".join(f"{stage.describe()} {'dynamic' if stage.dynamic else 'static'}" for stage in stages)
        reader.problem(
            f"{key}.input_tensors", shown,
            "per_tensor, dynamic per_channel of tokens, dynamic per_group of columns, or groups whose scales are quantized per tensor",
            "this input quantization is not supported by this version",
        )  # fmt: skip


def activation_of(stages: Stages) -> ActivationSpec | None:
    """The activation specification without its static values; None if the stages mean nothing that is known."""
    stages = tuple(stage for stage in stages if not stage.is_plain)
    if not stages:
        return NO_ACTIVATION
    first = stages[0]
    element = ELEMENTS.get(first.dtype)
    if element is None or first.scale_quant:
        return None
    if is_unsigned(stages) and first.symmetric:
        # codes from 0 up cannot hold values below zero without a zero point
        return None
    if len(stages) == 2:
        return _two_stages(element, first, stages[1])
    if first.dtype in PACKED_FLOATS and first.granularity != "group":
        return None
    integer = first.dtype in INTEGERS
    plain = ActivationSpec(element, "tensor", symmetric=first.symmetric or not integer, dynamic=first.dynamic, reciprocal=integer and first.dynamic)
    if first.granularity == "tensor" and first.scale_type == "float":
        return plain
    if not first.dynamic:
        return None
    if first.granularity == "channel" and first.axis in TOKEN_AXES and first.scale_type == "float":
        return replace(plain, granularity="token")
    if not _is_group(first):
        return None
    second = "dynamic" if first.scale_type == "e4m3" else "none"
    return replace(plain, granularity="group", group_size=first.group_size, scale_type=first.scale_type, exponent_rule=first.rule, second_scale=second)


def _two_stages(element: str, first: TensorSpec, second: TensorSpec) -> ActivationSpec | None:
    known = second.scale_quant and second.dtype in SCALE_ELEMENTS and second.granularity == "tensor"
    if not known or not _is_group(first) or first.scale_type != "float" or not first.dynamic or first.dtype in INTEGERS:
        return None
    source = "dynamic" if second.dynamic else "static"
    return ActivationSpec(element, "group", first.group_size, scale_type=SCALE_ELEMENTS[second.dtype], second_scale=source)


def _is_group(spec: TensorSpec) -> bool:
    return spec.granularity == "group" and spec.axis in LAST_AXES and spec.group_size > 0
