"""Integer activations: what the products with integers on both sides take, and how x is quantized for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitgrain.errors import BadValueError
from bitgrain.kernels.base import LinearProblem
from bitgrain.kernels.npu.operators import OLD, features
from bitgrain.weights import ActivationSpec, IntAffineWeight

# what npu_dynamic_quant computes
DYNAMIC = ActivationSpec("int8", "token", top=127.0)
DYNAMIC_INT4 = ActivationSpec("int4", "token", top=7.0)
HALF = (torch.float16, torch.bfloat16)
LARGEST_SIDE = 65535


def integer_problem(platform: str, problem: LinearProblem) -> str:
    """Why both sides cannot be multiplied as integers; empty when they can."""
    spec, act, found = problem.weight, problem.activation, features(platform)
    if spec.kind != "int_affine" or spec.granularity not in ("tensor", "channel") or spec.zero != "constant" or spec.group_index or spec.row_index:
        return "takes integer weights with one zero point and a scale per row or for all, not " + spec.describe()
    if not act.is_integer:
        return f"multiplies integer activations, and the scheme has {act.describe()} ones"
    if act.granularity not in ("token", "tensor") or act.outlier_threshold is not None:
        return f"takes activations with a scale per token or for all, without outliers, not {act.describe()}"
    if OLD in found:
        return "products on the device take no scale per token, and cut float32 scales to 19 bits"
    if "int8_dot" not in found:
        return "the device does not multiply int8"
    if problem.dtype == "bfloat16" and "bf16" not in found:
        return "the device has no bfloat16"
    return f"takes K up to {LARGEST_SIDE}" if problem.k > LARGEST_SIDE else ""


def signed_codes(weight: IntAffineWeight, low: int = -128, high: int = 127) -> Tensor:
    """int8 [K, N], contiguous: codes less the zero point.

    Raises:
        BadValueError: values that do not fit.
    """
    assert isinstance(weight.zero, int)
    bottom, top = -weight.zero, (1 << weight.bits) - 1 - weight.zero
    if bottom < low or top > high:
        raise BadValueError("weight", f"codes less the zero point from {bottom} to {top}", f"values from {low} to {high}", "run it with another kernel")
    return weight.codes().to(torch.int16).sub_(weight.zero).to(torch.int8).t().contiguous()


def row_scales(weight: IntAffineWeight) -> Tensor:
    """float32 [N]."""
    return weight.scale.float().reshape(-1).expand(weight.shape[0]).contiguous()


@dataclass(slots=True)
class Quantized:
    """x is about (codes - zero) * scale.

    Args:
        codes: int8 [M, K].
        scale: float32 [M], or [1] for all.
        zero:  int32 [M, 1] or [1, 1]; None: 0.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


def stored_values(activation: ActivationSpec, device: torch.device) -> dict[str, Tensor]:
    """input_scale float32 [1] and input_zero int32 [1] of a static specification; else nothing."""
    if activation.dynamic:
        return {}
    assert activation.scale is not None, "a static activation scale was not loaded"
    return {
        "input_scale": torch.tensor([activation.scale], dtype=torch.float32, device=device),
        "input_zero": torch.tensor([activation.zero], dtype=torch.int32, device=device),
    }


def quantize(operators: Any, activation: ActivationSpec, x: Tensor, stored: dict[str, Tensor]) -> Quantized:
    """x [M, K] quantized as the scheme says: by an operator where one computes just that, else in torch's operations.

    Args:
        stored: stored_values(), of a static specification.
    """
    if activation == DYNAMIC and x.dtype in HALF:
        codes, scale = operators.npu_dynamic_quant(x)
        return Quantized(codes, scale, None)
    if not activation.dynamic and activation.element == "int8" and not activation.reciprocal:
        zero = stored["input_zero"] if activation.zero else None
        codes = operators.npu_quantize(x, stored["input_scale"], zero, torch.qint8, 1, True)
        return Quantized(codes, stored["input_scale"], None if zero is None else zero[:, None])
    codes, wide, zeros = activation.quantize(x)
    return Quantized(codes, wide.reshape(-1), None if activation.symmetric else zeros.to(torch.int32))
