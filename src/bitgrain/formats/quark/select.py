"""From a layer's specifications and a module's headers to its scheme."""

from __future__ import annotations

from bitgrain.checkpoint.headers import FLOAT_CODES
from bitgrain.errors import ShapeMismatchError
from bitgrain.formats.base import ModuleView, Scheme
from bitgrain.formats.block_float import BlockFloatScheme
from bitgrain.formats.config_reader import ConfigReader
from bitgrain.formats.fp8.schemes import Float8Scheme
from bitgrain.formats.quark.activations import activation_of, is_unsigned
from bitgrain.formats.quark.inputs import SECOND_SCALE
from bitgrain.formats.quark.schemes.blocks import MX_BLOCK, FloatScaleScheme, UnbiasedBlockScheme
from bitgrain.formats.quark.schemes.integers import QuarkIntScheme
from bitgrain.formats.quark.schemes.packing import IntPacking
from bitgrain.formats.quark.specs import FLOAT8, INTEGERS, PACKED_FLOATS, UNSTORED, LayerSpec, Stages, TensorSpec
from bitgrain.formats.stored_scales import E8M0_CODES, cell_of
from bitgrain.weights import NO_ACTIVATION, ActivationSpec
from bitgrain.weights.block_float import ELEMENT_BITS

FLOAT8_CODES = {"fp8_e4m3": "F8_E4M3", "fp8_e5m2": "F8_E5M2"}
ROW_AXES, COLUMN_AXES = (0, -2), (1, -1)


def weight_kind(stages: Stages) -> str:
    """How a weight of these stages is stored: "int", "float8", "blocks", "two-level", "float scales", "mx"; "" if nobody knows.

    An integer weight that was an eight-bit float first is "int", too.
    """
    if any(stage.dynamic for stage in stages):
        return ""
    first = stages[0]
    if len(stages) == 2:
        return _two_stage_kind(first, stages[1])
    if first.scale_quant:
        return ""
    grouped = first.granularity == "group" and first.axis in COLUMN_AXES and first.group_size != 0
    if first.dtype in INTEGERS:
        return "int" if _int_fits(first) else ""
    if first.dtype in FLOAT8:
        if grouped and first.scale_type == "e8m0" and first.group_size > 0:
            return "blocks"
        return "float8" if grouped or _is_whole(first) or (first.granularity == "block" and first.block) else ""
    if first.dtype in PACKED_FLOATS and grouped and first.group_size > 0:
        return "blocks" if first.scale_type in ("e8m0", "e5m3") else "float scales"
    if first.dtype == "mx":
        return "mx" if first.element in PACKED_FLOATS and first.group_size == MX_BLOCK and first.axis in COLUMN_AXES else ""
    return ""


def _two_stage_kind(first: TensorSpec, second: TensorSpec) -> str:
    if second.scale_quant:
        grouped = first.granularity == "group" and first.axis in COLUMN_AXES and first.group_size > 0 and first.scale_type == "float"
        # amd-quark 0.13 wraps two-level fp8_e5m3 scales to eight bits, which loses them: there is nothing to read
        known = first.dtype in PACKED_FLOATS and second.dtype == "fp8_e4m3" and second.granularity == "tensor"
        return "two-level" if grouped and known else ""
    known = first.dtype in FLOAT8 and _is_whole(first) and second.dtype in INTEGERS and _int_fits(second)
    return "int" if known else ""


def _is_whole(spec: TensorSpec) -> bool:
    """One scale for the tensor, or one per row."""
    return spec.granularity == "tensor" or (spec.granularity == "channel" and spec.axis in ROW_AXES)


def _int_fits(spec: TensorSpec) -> bool:
    grouped = spec.granularity == "group" and spec.axis in COLUMN_AXES and spec.group_size != 0
    return (grouped or _is_whole(spec)) and spec.scale_type == "float"


def check_weight(reader: ConfigReader, key: str, stages: Stages) -> None:
    """Note a problem unless weight_kind knows how such a weight is stored."""
    stages = tuple(stage for stage in stages if not stage.is_plain)
    if not stages or weight_kind(stages):
        return
    shown = " then ".join(f"{s.describe()}{' of scales' if s.scale_quant else ''}{' dynamic' if s.dynamic else ''}" for s in stages)
    needed = (
        f"{', '.join(INTEGERS)} per_tensor, per_channel (ch_axis 0) or per_group (ch_axis -1); {', '.join(FLOAT8)} also per_block;"
        f" {', '.join(PACKED_FLOATS)} per_group, its scales perhaps quantized; an fp8 type and then an integer type; mx of {', '.join(PACKED_FLOATS)}"
    )
    unstored = stages[0].dtype in UNSTORED
    action = "its producer cannot store this type: fetch another checkpoint" if unstored else "correct the configuration; this pair of dtype and qscheme is not known"
    reader.problem(f"{key}.weight", shown, needed, action)


def scheme_of(module: ModuleView, spec: LayerSpec, reorder: bool, legacy: bool) -> Scheme:
    """The scheme of a quantized module.

    Args:
        spec:    passed check_weight and activations.check_input.
        reorder: four-bit codes are in even-odd order.
        legacy:  the writer is so old that scales per group may not be transposed.
    Raises:
        ShapeMismatchError: the layout cannot hold the module's sizes.
    """
    stages = tuple(stage for stage in spec.weight if not stage.is_plain)
    activation = activation_of(spec.inputs) or NO_ACTIVATION
    kind = weight_kind(stages)
    if kind == "int":
        return _int_scheme(module, stages, spec.inputs, activation, reorder, legacy)
    if kind == "float8":
        return _float8_scheme(module, stages[0], activation)
    if kind == "mx":
        return _unbiased_scheme(module, stages[0], activation)
    element = FLOAT8.get(stages[0].dtype) or PACKED_FLOATS[stages[0].dtype]
    shape, group = _float_shape(module, element), stages[0].group_size
    if kind == "float scales":
        return FloatScaleScheme(shape, activation, element, group)
    second = "weight_scale_2" if kind == "two-level" else ""
    scale_type = "e4m3" if second else stages[0].scale_type
    input_name = SECOND_SCALE if activation.second_scale == "static" else "input_scale"
    return BlockFloatScheme(shape, element, group, scale_type, activation, second_name=second, input_name=input_name)


def _sizes(module: ModuleView, local: str) -> tuple[int, int]:
    """(rows, columns) of a stored matrix; (0, 0) if it is absent or no matrix."""
    header = module.tensors.get(local)
    return (header.shape[0], header.shape[1]) if header is not None and len(header.shape) == 2 else (0, 0)


def _float_shape(module: ModuleView, element: str) -> tuple[int, int]:
    rows, width = _sizes(module, "weight")
    return module.shape or (rows, width * 8 // ELEMENT_BITS[element])


def _float8_scheme(module: ModuleView, spec: TensorSpec, activation: ActivationSpec) -> Scheme:
    shape = module.shape or _sizes(module, "weight")
    group = spec.group_size if spec.group_size > 0 else max(shape[1], 1)
    cell = cell_of(spec.granularity, shape, group, spec.block)
    codes = (*FLOAT_CODES, *E8M0_CODES) if spec.scale_type == "e8m0" else FLOAT_CODES
    return Float8Scheme(shape, activation, FLOAT8_CODES[spec.dtype], cell, scale_dtypes=codes)


def _unbiased_scheme(module: ModuleView, spec: TensorSpec, activation: ActivationSpec) -> Scheme:
    element, joint = PACKED_FLOATS[spec.element], "weight_scale" not in module.tensors
    rows, width = _sizes(module, "weight")
    block = MX_BLOCK * ELEMENT_BITS[element] // 8 + int(joint)
    shape = module.shape or (rows, width // block * MX_BLOCK)
    _need(module, shape[1] % MX_BLOCK == 0, shape, f"K % {MX_BLOCK} == 0")
    return UnbiasedBlockScheme(shape, activation, element, joint)


def _int_scheme(module: ModuleView, stages: Stages, inputs: Stages, activation: ActivationSpec, reorder: bool, legacy: bool) -> Scheme:
    spec = stages[-1]
    packing, grouped = IntPacking(spec.dtype, reorder), spec.granularity == "group"
    scale_name = "weight_scale_2" if len(stages) == 2 else "weight_scale"
    shape = module.shape or _int_shape(module, packing, grouped, scale_name)
    group = min(spec.group_size, shape[1]) if spec.group_size > 0 else shape[1]
    packed = shape[0] if grouped and spec.dtype != "int3" else shape[1]
    _need(module, packed % packing.multiple == 0, shape, f"packed rows of a multiple of {packing.multiple} {spec.dtype} codes")
    stored = module.tensors.get(scale_name)
    return QuarkIntScheme(
        shape,
        activation,
        packing,
        cell_of(spec.granularity, shape, max(group, 1)),
        spec.symmetric,
        spec.float_zero,
        stored.dtype if stored is not None and stored.dtype in FLOAT_CODES else "BF16",
        stages[0].granularity if len(stages) == 2 else "",
        grouped,
        legacy and grouped and _is_plain_scale(module, scale_name, shape, max(group, 1)),
        is_unsigned(inputs),
    )


def _int_shape(module: ModuleView, packing: IntPacking, grouped: bool, scale_name: str) -> tuple[int, int]:
    """(N, K) as far as the tensors tell it; a word's padding is known from the scales."""
    rows, width = _sizes(module, "weight")
    if not grouped or packing.dtype == "int3":
        return (rows, packing.codes_in(width))
    columns = packing.codes_in(width)
    scales = _sizes(module, scale_name)
    fits = [n for n in scales if packing.elements(n) == width]
    return (fits[-1] if fits else columns, rows)


def _is_plain_scale(module: ModuleView, scale_name: str, shape: tuple[int, int], group: int) -> bool:
    """Whether the stored scales are [N, G] and cannot be [G, N]."""
    n, groups = shape[0], -(-shape[1] // group)
    return _sizes(module, scale_name) == (n, groups) and n != groups


def _need(module: ModuleView, holds: bool, shape: tuple[int, int], needed: str) -> None:
    if not holds:
        found = f"N = {shape[0]}, K = {shape[1]}"
        raise ShapeMismatchError(module.full_name("weight"), found, needed, "correct the configuration, or fetch the right checkpoint")
