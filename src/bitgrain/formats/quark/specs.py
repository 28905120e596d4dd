"""What one tensor specification of the configuration says, and what a layer's specifications say together.

    {"dtype": "int4", "qscheme": "per_group", "group_size": 32, "ch_axis": -1, "symmetric": true, "is_dynamic": false, ...}
A list of two is one tensor in two stages: the second quantizes the first one's scales (`is_scale_quant`), or its codes.
Older writers call `is_dynamic` dynamic and `ch_axis` axis.
Source: formats specification, part 2, section 3.1; amd-quark 0.13 quantization/config/config.py for keys and defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitgrain.formats.config_reader import ConfigReader

INTEGERS = {"int2": 2, "uint2": 2, "int3": 3, "int4": 4, "uint4": 4, "int8": 8, "uint8": 8}
FLOAT8 = {"fp8_e4m3": "fp8_e4m3fn", "fp8_e5m2": "fp8_e5m2"}
PACKED_FLOATS = {"fp4": "fp4_e2m1", "fp6_e2m3": "fp6_e2m3", "fp6_e3m2": "fp6_e3m2"}
PLAIN = ("bfloat16", "float16")
# Block formats that the producer computes with and never stores.
UNSTORED = ("mx6", "mx9", "bfp16")
DTYPES = (*INTEGERS, *FLOAT8, *PACKED_FLOATS, *PLAIN, *UNSTORED, "mx", "fp8_e5m3", "int16", "uint16", "int32", "uint32")
QSCHEMES = {"per_tensor": "tensor", "per_channel": "channel", "per_group": "group", "per_block": "block", "": ""}
SCALE_FORMATS = {name: name for name in ("e8m0", "e5m3", "e4m3", "float32", "")}
# What a scale_type says that no scale_format repeats: the one-byte types.
SCALE_TYPES = {
    "float8_e8m0fnu": "e8m0", "float8_e5m3": "e5m3",
    "float": "", "float32": "", "float16": "", "bfloat16": "", "pof2": "", "": "",
}  # fmt: skip
MODES = {"even": "even", "floor": "floor", "ceil": "top", "": "even"}
# How the numbers were found, and how the producer's own code runs them.
METADATA = ("round_method", "observer_cls", "enable_buffer_reuse", "max_input_numel", "qat_spec")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One quantization of one tensor.

    Args:
        dtype:       one of DTYPES.
        granularity: "tensor", "channel", "group", "block", or "" where the type needs none.
        axis:        the dimension that channels or groups lie along; None if not given.
        group_size:  columns per group, -1 for a whole row, 0 if not given.
        block:       (rows, columns) of a two-dimensional block.
        symmetric:   no zero points; the stored ones are zero.
        dynamic:     computed from each input.
        scale_type:  "float", or the one-byte type of stored scales: "e8m0", "e5m3"; "e4m3": float scales on that grid.
        rule:        how a power of two is chosen (numerics.block_scales.EXPONENT_RULES).
        scale_quant: the specification quantizes the scales of the one before it.
        element:     dtype of the elements where `dtype` is "mx".
        float_zero:  zero points are numbers of their own, never packed.
    """

    dtype: str
    granularity: str = ""
    axis: int | None = None
    group_size: int = 0
    block: tuple[int, int] | None = None
    symmetric: bool = True
    dynamic: bool = False
    scale_type: str = "float"
    rule: str = "even"
    scale_quant: bool = False
    element: str = ""
    float_zero: bool = False

    @property
    def is_plain(self) -> bool:
        """A conversion to a 16-bit float: no quantization."""
        return self.dtype in PLAIN

    def describe(self) -> str:
        """Short text such as "int4 per_group 32"."""
        size = f" {self.group_size}" if self.granularity == "group" else ""
        return f"{self.dtype} per_{self.granularity}{size}" if self.granularity else self.dtype


Stages = tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """The specifications of one layer: no stage means not quantized.

    Args:
        weight, inputs, outputs: one stage, or two.
    """

    weight: Stages = ()
    inputs: Stages = ()
    outputs: Stages = ()

    @property
    def quantizes_weight(self) -> bool:
        return any(not stage.is_plain for stage in self.weight)


def read_layer(reader: ConfigReader, key: str, value: object) -> LayerSpec:
    """The layer specification under a key; problems go to `reader`, and an empty one is returned in their place."""
    if not isinstance(value, Mapping):
        if value is not None:
            reader.problem(key, f"a {type(value).__name__}", "an object with weight, input_tensors, output_tensors and bias")
        return LayerSpec()
    section = ConfigReader(value, reader.place(key))
    weight = read_stages(section, "weight")
    inputs = read_stages(section, "input_tensors")
    outputs = read_stages(section, "output_tensors")
    if any(not stage.is_plain for stage in read_stages(section, "bias")):
        section.problem("bias", "a quantized bias", "null: bias stays a plain float", "quantize the model without it")
    section.skip(("target_device",))
    reader.collect(section.finish)
    return LayerSpec(weight, inputs, outputs)


def read_stages(reader: ConfigReader, key: str) -> Stages:
    """The specification under a key, as a tuple of its stages; problems go to `reader`."""
    _, value = reader.read(key)
    if value is None:
        return ()
    listed = value if isinstance(value, list) else [value]
    if not all(isinstance(stage, Mapping) for stage in listed) or not 1 <= len(listed) <= 2:
        reader.problem(key, repr(value)[:200], "a specification, or a list of two")
        return ()
    places = [f"{key}[{i}]" for i in range(len(listed))] if len(listed) > 1 else [key]
    return tuple(_read_stage(reader, place, stage) for place, stage in zip(places, listed, strict=True))


def _read_stage(parent: ConfigReader, place: str, values: Mapping[str, Any]) -> TensorSpec:
    reader = ConfigReader(values, parent.place(place))
    reader.skip((*METADATA, "group_size"))
    dtype = reader.text("dtype", default="")
    if dtype not in DTYPES:
        reader.problem("dtype", repr(values.get("dtype")), f"one of {', '.join(DTYPES)}")
        dtype = "bfloat16"
    scale_format = reader.choice("scale_format", SCALE_FORMATS, "")
    scale_type = reader.choice("scale_type", SCALE_TYPES, "")
    element = reader.text("mx_element_dtype", default="")
    _, axis = reader.read("ch_axis", "axis")
    if axis is not None and (not isinstance(axis, int) or isinstance(axis, bool)):
        reader.problem("ch_axis", repr(axis), "an integer")
        axis = None
    spec = TensorSpec(
        dtype=dtype,
        granularity=reader.choice("qscheme", QSCHEMES, ""),
        axis=axis,
        group_size=reader.group_size("group_size", default=0) if values.get("group_size") is not None else 0,
        block=reader.block("block_size"),
        symmetric=reader.flag("symmetric") is not False,
        dynamic=bool(reader.flag("is_dynamic") or reader.flag("dynamic")),
        scale_type=scale_format.replace("float32", "") or scale_type or "float",
        rule=reader.choice("scale_calculation_mode", MODES, ""),
        scale_quant=bool(reader.flag("is_scale_quant")),
        element=element,
        float_zero=reader.choice("zero_point_type", {"int32": False, "float32": True, "": False}, ""),
    )
    parent.collect(reader.finish)
    return spec
