"""A linear weight as the grouped product reads it, and what stands in the way of that."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bitgrain.errors import BadValueError
from bitgrain.kernels.base import Fidelity, LinearProblem, Prepared
from bitgrain.numerics.bitpack import pack_dense
from bitgrain.weights import ActivationSpec, BlockFloatWeight, FloatWeight, IntAffineWeight, Weight, WeightSpec

# as in grouped_gemm, which cannot be imported before triton is
NIBBLE, BYTE, E4M3, E5M2, E2M1 = 0, 1, 2, 3, 4
FLOATS = {"fp8_e4m3fn": E4M3, "fp8_e5m2": E5M2}


def weight_problem(spec: WeightSpec) -> str:
    """Why a weight cannot be read; empty when it can."""
    if spec.kind == "int_affine":
        if spec.group_index:
            return "takes columns in order, not act-order"
        return "takes groups along K, not along N" if spec.row_index else ""
    if spec.kind == "float":
        return "" if spec.element in FLOATS else f"decodes fp8_e4m3fn and fp8_e5m2, not {spec.element}"
    if spec.kind == "block_float":
        if spec.second_scale != "none" or spec.scale_dtype != "e8m0":
            return "takes blocks with one e8m0 scale"
        return "" if spec.element in ("fp4_e2m1", *FLOATS) else f"decodes fp4_e2m1, fp8_e4m3fn and fp8_e5m2, not {spec.element}"
    return f"takes integer, fp8 and MX weights, not {spec.kind} ones"


def input_problem(problem: LinearProblem) -> str:
    """Why an input cannot be quantized so; empty when it can."""
    act = problem.activation
    if act.is_none:
        return ""
    if not act.symmetric or act.outlier_threshold is not None or act.clipped:
        return "quantizes activations symmetrically, without clipping or outliers"
    if act.second_scale != "none":
        return "takes one scale per group of activations"
    if act.dynamic and act.granularity == "tensor":
        return "quantizes activations per token, group or with a stored scale: a range of the whole input is one of the rows of each expert"
    if not act.dynamic and act.granularity != "tensor":
        return "takes one stored scale per module"
    group, own = weight_group(problem), act.group_size
    if act.granularity == "group" and group % own and own % group and group < problem.k:
        return f"takes groups of activations and of weights that divide each other, not {own} and {group}"
    return ""


def weight_group(problem: LinearProblem) -> int:
    """Columns that share a scale of the weight."""
    spec = problem.weight
    return spec.group_size or (spec.block[1] if spec.granularity == "block" else problem.k)


def multiplies_integers(spec: WeightSpec, activation: ActivationSpec) -> bool:
    """Whether both sides are integers that an 8-bit product takes."""
    return spec.kind == "int_affine" and spec.zero == "constant" and activation.is_integer


def fidelity_of(problem: LinearProblem) -> Fidelity:
    if problem.activation.is_none:
        return Fidelity.EXACT
    return Fidelity.NATIVE if multiplies_integers(problem.weight, problem.activation) else Fidelity.EMULATED


def pack(weight: Weight, activation: ActivationSpec) -> Prepared:
    """Codes [N, ceil(K / 2)] or [N, K] uint8, scales as they are stored, zero points if there are any.

    Raises:
        BadValueError: NaN codes, or integers that an 8-bit product cannot take.
    """
    n, k = weight.shape
    if isinstance(weight, IntAffineWeight):
        tensors, meta = _integers(weight, multiplies_integers(weight.spec, activation))
        rows, group = (1 if weight.scale.shape[0] == n else n), min(weight.group_size, k)
    elif isinstance(weight, FloatWeight):
        _refuse_nan(weight.codes.view(torch.uint8), weight.spec.element)
        tensors, meta = {"codes": weight.codes.view(torch.uint8), "scale": weight.scale}, {"kind": FLOATS[weight.spec.element], "middle": 0}
        rows, group = min(weight.block[0], n), min(weight.block[1], k)
    else:
        assert isinstance(weight, BlockFloatWeight)  # weight_problem() asked for the kind
        tensors, meta = {"codes": weight.packed, "scale": weight.scale}, {"kind": FLOATS.get(weight.element, E2M1), "middle": 0}
        if weight.element in FLOATS:
            _refuse_nan(weight.packed, weight.element)
        rows, group = 1, weight.block
    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return Prepared((n, k), held, activation, {**meta, "rows": rows, "group": group, "integer": multiplies_integers(weight.spec, activation)})


def _integers(weight: IntAffineWeight, integer: bool) -> tuple[dict[str, Tensor], dict[str, int]]:
    small = weight.bits <= 4
    middle = weight.zero if isinstance(weight.zero, int) else 0
    top = (1 << weight.bits) - 1
    if integer and not -128 <= -middle <= top - middle <= 127:
        raise BadValueError("weight", f"codes 0 to {top} less {middle}", "values from -128 to 127", "run the experts with another kernel")
    codes = weight.packed if weight.bits in (4, 8) else weight.codes()
    tensors = {"codes": pack_dense(codes, 4) if small and weight.bits != 4 else codes, "scale": weight.scale}
    if isinstance(weight.zero, Tensor):
        # a code less an integer zero point is exact in 16 bits up to 256; a fractional one joins after the product
        whole = not weight.zero.is_floating_point() and bool((weight.zero.abs() <= 256 - top).all() | (weight.zero >= 0).all() & (weight.zero <= top).all())
        tensors["zero"] = weight.zero if whole else weight.zero.float()
    return tensors, {"kind": NIBBLE if small else BYTE, "middle": middle}


def _refuse_nan(raw: Tensor, element: str) -> None:
    bad = int(((raw & 0x7F) >= (0x7F if element == "fp8_e4m3fn" else 0x7C)).sum())
    if bad:
        raise BadValueError("weight", f"{bad} NaN or infinite codes", "finite values", "the file is damaged; fetch or write it again")


def quantized(activation: ActivationSpec, x: Tensor, stored: Tensor | None, integer: bool) -> tuple[Tensor, Tensor | None]:
    """(values, scale float32 [M, groups]) with x about values * scale; (x, None) where it is not quantized.

    Args:
        stored:  float32 [M, 1], the scale of each row, of a specification with one.
        integer: values are int8; else floats of x's dtype, which hold every value of the types that activations have.
    """
    if activation.is_none:
        return x, None
    if stored is not None:
        unit = replace(activation, scale=1.0, zero=0)
        codes, scale = unit.quantize(x.float() / stored)[0], stored
    else:
        codes, scale, _ = activation.quantize(x)
    return codes if integer else codes.to(x.dtype), scale.contiguous()
