"""A linear weight as the packed product reads it, and what stands in the way of that."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitgrain.errors import BadValueError
from bitgrain.kernels.base import Fidelity, LinearProblem, Prepared
from bitgrain.kernels.triton.units import UNITS, Slots, columns_of, deal, lay_out, pack_units, unit_for, unpack_units
from bitgrain.weights import ActivationSpec, BlockFloatWeight, FloatWeight, IntAffineWeight, Weight, WeightSpec

# as in packed_product, which cannot be imported before triton is
INTEGER, E4M3, E5M2, E2M1 = 0, 2, 3, 4
FLOATS, INT8, FP8 = 0, 1, 2
WHOLE, SEGMENT, COLUMN = 0, 1, 2
KINDS = {"fp8_e4m3fn": E4M3, "fp8_e4m3fnuz": E4M3, "fp8_e5m2": E5M2, "fp4_e2m1": E2M1}
# byte codes of NaN and infinities, sign left out: from this one on
FIRST_BAD = {"fp8_e4m3fn": 0x7F, "fp8_e5m2": 0x7C}
# The same byte as e4m3fnuz is half of what it is as e4m3fn.
HALVED = ("fp8_e4m3fnuz",)
# (element of both sides, feature) to triton's name of the type that multiplies them
NATIVE_FLOAT8 = {
    ("fp8_e4m3fn", "fp8_dot"): "float8e4nv",
    ("fp8_e5m2", "fp8_dot"): "float8e5",
    ("fp8_e4m3fnuz", "fp8_fnuz_dot"): "float8e4b8",
    ("fp8_e4m3fn", "fp8_fnuz_dot"): "float8e4b8",  # values halved on both sides: every one is in the other type
}
# 8-bit products take at least so many columns.
NATIVE_UNIT = 32
# sums of products of 8-bit integers stay below 2^31: 255 * 128 * K, with a zero point on both sides 255 * 255 * K
MAX_K, MAX_SHIFTED_K = 65_536, 32_768


@dataclass(frozen=True, slots=True)
class Layout:
    """How one packed weight is read; all but sizes are constants of the kernels, see kernels.triton.packed_product.

    Args:
        middle:   what is taken from integer codes.
        float8:   triton's name of the type of both sides, where they are multiplied as 8-bit floats.
        zero:     0 none, 1 integers, 2 floats.
        w_rows:   rows that share a scale; w_group: columns that do; w_groups: scales of a row.
        a_group:  columns of the input that share a scale of it; 0: whole rows do.
        row_index: the rows of scales are looked up.
        halved:   inputs are halved before they become that type, and their scales doubled.
    """

    slots: Slots
    bits: int
    kind: int
    middle: int
    dot: int
    float8: str
    zero: int
    scales: int
    powers: bool
    w_rows: int
    w_group: int
    w_groups: int
    a_group: int = 0
    row_index: bool = False
    halved: bool = False


def weight_problem(spec: WeightSpec) -> str:
    """Why a weight cannot be read; empty when it can."""
    if spec.kind == "int_affine":
        return ""
    if spec.kind == "float":
        return "" if spec.element in KINDS else f"does not decode {spec.element}"
    if spec.kind == "block_float":
        if spec.second_scale != "none" or spec.scale_dtype != "e8m0":
            return "takes blocks with one e8m0 scale"
        return "" if spec.element in KINDS else f"decodes fp4_e2m1, fp8_e4m3fn and fp8_e5m2, not {spec.element}"
    return f"takes integer, fp8 and MX weights, not {spec.kind} ones"


def input_problem(problem: LinearProblem, features: frozenset[str]) -> str:
    """Why an input cannot be quantized so; empty when it can."""
    act = problem.activation
    if act.is_none:
        return ""
    if act.outlier_threshold is not None:
        return "quantizes every column of activations: none of them stays as it is"
    if act.second_scale == "group":
        return "takes one scale per group of activations"
    if not act.dynamic and act.granularity != "tensor":
        return "takes one stored scale per module"
    if dot_of(problem.weight, act, problem.k, features) == INT8 and not _per_segment(problem):
        most = MAX_K if act.symmetric else MAX_SHIFTED_K
        if problem.k > most:
            return f"sums 8-bit products in 32 bits, enough for K up to {most}"
    return _groups_problem(problem)


def _groups_problem(problem: LinearProblem) -> str:
    act, spec = problem.activation, problem.weight
    if act.granularity != "group":
        return ""
    if spec.group_index:
        return "groups activations in the order of their columns, which act-order is not"
    group, own = weight_group(spec, problem.k), act.group_size
    if group < problem.k and not columnwise(spec, problem.k) and max(group, own) % min(group, own):
        return f"takes groups of activations and of weights that divide each other, not {own} and {group}"
    return ""


def _per_segment(problem: LinearProblem) -> bool:
    return weight_group(problem.weight, problem.k) < problem.k or problem.activation.granularity == "group"


def weight_group(spec: WeightSpec, k: int) -> int:
    """Columns that share a scale of the weight, K where all do."""
    return min(k, spec.group_size or (spec.block[1] if spec.granularity == "block" else k))


def columnwise(spec: WeightSpec, k: int) -> bool:
    """Whether groups are so small that each column looks its scale up, instead of filling units with zeros."""
    return weight_group(spec, k) < min(UNITS) and weight_group(spec, k) < k and not spec.group_index


def float8_of(spec: WeightSpec, activation: ActivationSpec, features: frozenset[str]) -> str:
    """Triton's name of the 8-bit float type in which both sides are multiplied as they are; empty if they are not."""
    if spec.kind != "float" or spec.element != activation.element:
        return ""
    return next((name for (element, feature), name in NATIVE_FLOAT8.items() if element == spec.element and feature in features), "")


def dot_of(spec: WeightSpec, activation: ActivationSpec, k: int, features: frozenset[str]) -> int:
    """Which arithmetic multiplies: FLOATS, INT8 or FP8."""
    if columnwise(spec, k):
        return FLOATS
    if spec.kind == "int_affine" and spec.zero != "float" and activation.is_integer and "int8_dot" in features:
        return INT8
    return FP8 if float8_of(spec, activation, features) else FLOATS


def fidelity_of(problem: LinearProblem, features: frozenset[str]) -> Fidelity:
    if problem.activation.is_none:
        return Fidelity.EXACT
    return Fidelity.EMULATED if dot_of(problem.weight, problem.activation, problem.k, features) == FLOATS else Fidelity.NATIVE


def pack(weight: Weight, activation: ActivationSpec, features: frozenset[str]) -> Prepared:
    """The weight's codes in units, its scales as they are stored, and what else its Layout asks for.

    Returns:
        tensors "codes" uint8 [N, slots * bits / 8], "scale" [S, G]; where there are any, "zero" (int16, int32 or float32) [S, G],
        "sums" int32 [N, segments], "gather" int32 [slots], "row_index" int32 [N].  meta["layout"]: a Layout.
    Raises:
        BadValueError: NaN codes.
    """
    n, k = weight.shape
    spec = weight.spec
    dot = dot_of(spec, activation, k, features)
    group, scales = weight_group(spec, k), SEGMENT
    if columnwise(spec, k):
        group, scales = k, COLUMN
    a_group = activation.group_size if activation.granularity == "group" and activation.group_size < k else 0
    segment = min(group, a_group or group)
    index = weight.group_index if isinstance(weight, IntAffineWeight) else None
    scale = weight.data_tensors()["scale"]
    slots, gather = lay_out(k, segment, min(UNITS) if dot == FLOATS else NATIVE_UNIT, index, scale.shape[1])
    if group >= k and index is None and scales == SEGMENT:
        scales = WHOLE
    columns = columns_of(slots, k, gather, scale.device)
    if isinstance(weight, IntAffineWeight):
        tensors, middle = _integers(weight, columns, slots, dot, scales)
        if dot == INT8 and not activation.symmetric:
            tensors["sums"] = _sums(weight, columns, slots, middle, tensors.get("zero"))
        bits, kind, w_rows = weight.bits, INTEGER, (n if scale.shape[0] == 1 else 1)
    else:
        assert isinstance(weight, FloatWeight | BlockFloatWeight)  # weight_problem() asked for the kind
        tensors = _floats(weight, columns, slots, float8_of(spec, activation, features))
        bits, kind, middle = spec.bits, KINDS[spec.element], 0
        w_rows = min(weight.block[0], n) if isinstance(weight, FloatWeight) else 1
    if gather is not None:
        tensors["gather"] = gather
    if isinstance(weight, IntAffineWeight) and weight.row_index is not None:
        tensors["row_index"], w_rows = weight.row_index.to(torch.int32), 1
    zero = tensors.get("zero")
    layout = Layout(
        slots, bits, kind, middle, dot, float8_of(spec, activation, features) if dot == FP8 else "", 0 if zero is None else (2 if zero.is_floating_point() else 1), scales,
        tensors["scale"].dtype == torch.uint8, w_rows, weight_group(spec, k), scale.shape[1], a_group, spec.row_index, dot == FP8 and _halves(spec.element, features),
    )  # fmt: skip
    return Prepared((n, k), {name: tensor.contiguous() for name, tensor in tensors.items()}, activation, {"layout": layout})


def _halves(element: str, features: frozenset[str]) -> bool:
    return element not in HALVED and "fp8_dot" not in features


def _integers(weight: IntAffineWeight, columns: Tensor, slots: Slots, dot: int, scales: int) -> tuple[dict[str, Tensor], int]:
    """(tensors, middle).  A code less its middle fits 8 bits for INT8; a code less its zero point is exact in 16 bits."""
    top, middle = (1 << weight.bits) - 1, 1 << (weight.bits - 1)
    tensors = {"codes": pack_units(deal(weight.codes(), columns), weight.bits, slots.unit), "scale": weight.scale}
    zero: Tensor | int = weight.zero
    if isinstance(zero, int):
        if (dot == INT8 and -128 <= -zero <= top - zero <= 127) or (dot == FLOATS and max(zero, top - zero) <= 256):
            middle = zero
        else:
            zero = torch.full_like(weight.scale, zero, dtype=torch.float32 if dot == FLOATS else torch.int32)
    if isinstance(zero, Tensor):
        if dot == INT8:
            tensors["zero"] = zero.to(torch.int32) - middle
        elif not zero.is_floating_point() and bool((zero >= top - 256).all()) and bool((zero <= 256).all()):
            tensors["zero"], middle = zero, 0
            if scales == COLUMN:
                tensors["zero"] = zero.float()
        else:
            tensors["zero"] = zero.float() - middle
    return tensors, middle


def _sums(weight: IntAffineWeight, columns: Tensor, slots: Slots, middle: int, zero: Tensor | None) -> Tensor:
    """int32 [N, segments]: over the columns of a segment, code - middle - zero."""
    n = weight.shape[0]
    here = (columns >= 0).view(slots.count, slots.width)
    dealt = deal(weight.codes(), columns).view(n, slots.count, slots.width).to(torch.int32)
    sums = dealt.sum(2, dtype=torch.int64) - middle * here.sum(1)
    if zero is not None:
        group = torch.arange(slots.count, device=dealt.device)
        if slots.regular:
            group = group * slots.segment // weight_group(weight.spec, weight.in_features)
        rows = zero if weight.row_index is None else zero[weight.row_index.long()]
        sums = sums - rows[:, group].long() * here.sum(1)
    return sums.to(torch.int32)


def _floats(weight: FloatWeight | BlockFloatWeight, columns: Tensor, slots: Slots, float8: str) -> dict[str, Tensor]:
    element, scale = weight.spec.element, weight.scale
    if isinstance(weight, BlockFloatWeight):
        raw = weight.codes() if weight.spec.bits < 8 else weight.packed
    else:
        raw = weight.codes.view(torch.uint8)
    _refuse_nan(raw, element)
    if float8 == "float8e4b8" and element not in HALVED:
        raw = raw.masked_fill(raw == 0x80, 0)  # there is no negative zero there: the byte is a NaN
        scale = scale * 2
    elif element in HALVED and float8 != "float8e4b8":
        scale = scale * 0.5
    return {"codes": pack_units(deal(raw, columns), weight.spec.bits, slots.unit), "scale": scale}


def with_zeros(prepared: Prepared) -> Prepared:
    """The same integers with the middle of their range and a zero point per scale: a layout that does not depend on values."""
    layout: Layout = prepared.meta["layout"]
    middle, tensors = 1 << (layout.bits - 1), prepared.tensors
    kind = torch.int32 if layout.dot == INT8 else torch.float32
    zero = tensors["zero"].to(kind) if "zero" in tensors else torch.zeros_like(tensors["scale"], dtype=kind)
    changed = replace(layout, middle=middle, zero=1 if layout.dot == INT8 else 2)
    return replace(prepared, tensors={**tensors, "zero": zero + (layout.middle - middle)}, meta={**prepared.meta, "layout": changed})


def with_segments(prepared: Prepared, segment: int) -> Prepared:
    """The same columns in segments that hold so many, where columns are gathered; else as it is."""
    layout: Layout = prepared.meta["layout"]
    slots, tensors = layout.slots, prepared.tensors
    if slots.regular or slots.segment == segment:
        return prepared
    unit = unit_for(segment, min(UNITS) if layout.dot == FLOATS else NATIVE_UNIT)
    wider = Slots(segment, slots.count, -(-segment // unit) * unit, unit, regular=False)
    codes = unpack_units(tensors["codes"], layout.bits, slots.unit).view(-1, slots.count, slots.width)
    # where the old segments were longer than any group needs, what is cut off is empty
    keep, more = min(slots.width, wider.width), max(0, wider.width - slots.width)
    codes = torch.nn.functional.pad(codes[:, :, :keep], (0, more)).reshape(len(codes), -1)
    gather = torch.nn.functional.pad(tensors["gather"].view(slots.count, -1)[:, :keep], (0, more), value=-1).reshape(-1)
    changed = {**tensors, "codes": pack_units(codes, layout.bits, unit), "gather": gather}
    return replace(prepared, tensors=changed, meta={**prepared.meta, "layout": replace(layout, slots=wider)})


def _refuse_nan(raw: Tensor, element: str) -> None:
    if element in HALVED:
        bad = int((raw == 0x80).sum())
    else:
        bad = int(((raw & 0x7F) >= FIRST_BAD[element]).sum()) if element in FIRST_BAD else 0
    if bad:
        raise BadValueError("weight", f"{bad} NaN or infinite codes", "finite values", "the file is damaged; fetch or write it again")


def quantized(layout: Layout, activation: ActivationSpec, x: Tensor, stored: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(values, scale, zero): x is about (values - zero) * scale; scale and zero float32 [M or 1, groups] or None.

    Values are x itself where it is not quantized, int8 for INT8, bytes for FP8, else whole differences code - zero of x's dtype.

    Args:
        stored: float32 [M or 1, 1], in place of the activation's own stored scale.
    """
    from bitgrain.kernels.triton.activation_quantization import quantize

    if activation.is_none:
        return x.contiguous(), None, None
    codes, scale, zero = quantize(activation, x, x.dtype if not activation.is_integer and layout.dot == FLOATS else None, stored)
    if layout.dot == INT8:
        return codes, scale.contiguous(), None if activation.symmetric else zero.expand_as(scale).contiguous()
    if layout.dot == FP8:
        storage = {"float8e4nv": torch.float8_e4m3fn, "float8e5": torch.float8_e5m2, "float8e4b8": torch.float8_e4m3fnuz}[layout.float8]
        halved = layout.halved
        return (codes * 0.5 if halved else codes).to(storage).view(torch.uint8), (scale * 2 if halved else scale).contiguous(), None
    values = codes.to(x.dtype)
    if not activation.symmetric:
        if activation.granularity == "group":
            zero = torch.repeat_interleave(zero, activation.group_size, dim=1)[:, : x.shape[1]]
        values = values - zero.to(x.dtype)
    return values, scale.contiguous(), None
