"""Activations quantized in Triton: one pass that gives codes and scales, equal to ActivationSpec.quantize to the bit.

Divisions round as IEEE says and products are rounded before they are added, so that codes do not depend on the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bitgrain.errors import LayoutError
from bitgrain.numerics.block_scales import LARGEST_EXPONENT, ROUND_BITS, largest_scale
from bitgrain.numerics.small_floats import SMALL_FLOATS
from bitgrain.weights import ActivationSpec

# Elements of a tile: what the registers of one program hold.
ROW_TILE, GROUP_TILE = 4096, 2048


@dataclass(frozen=True, slots=True)
class BlockCodes:
    """A quantized input as its bytes: what instructions that multiply scaled blocks read.

    Args:
        codes:  uint8 [M, ceil(K * bits / 8)]: one code per byte, or two of 4 bits, the even column in the low nibble.
        scale:  uint8 [M, ceil(K / group)], codes of the type of scales, the second one left out.
        second: float32 [1], or None for 1.
    """

    codes: Tensor
    scale: Tensor
    second: Tensor | None


def covered(activation: ActivationSpec) -> bool:
    """Whether the kernels compute it; the definition in torch does the rest."""
    if activation.is_none:
        return False
    if activation.granularity == "group":
        whole = activation.clipped and activation.second_scale == "dynamic"
        return activation.dynamic and activation.outlier_threshold is None and not whole
    return activation.second_scale != "group"


def quantize(activation: ActivationSpec, x: Tensor, dtype: torch.dtype | None = None, stored: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """ActivationSpec.quantize(x): (codes, scale, zero), x [M, K] being about (codes - zero) * scale, outlier columns apart.

    Args:
        dtype:  of the codes of floats, any that holds them exactly; None: float32.  Integers are int8.
        stored: float32 [M, 1] or [1, 1], used in place of the activation's own static scale.
    Returns:
        codes [M, K]; scale and zero float32, [1, 1], [M, 1] or [M, G].
    """
    if activation.is_integer or dtype is None:
        dtype = torch.int8 if activation.is_integer else torch.float32
    if not covered(activation):
        codes, scale, zero = activation.quantize(x)
        return codes.to(dtype), scale, zero
    x = x.contiguous()
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    if activation.granularity == "group":
        return _quantize_groups(activation, x, codes)
    return _quantize_rows(activation, x, codes, stored)


def fake_quantize(activation: ActivationSpec, x: Tensor) -> Tensor:
    """ActivationSpec.fake_quantize(x), float32 [M, K]."""
    if not covered(activation):
        return activation.fake_quantize(x)
    codes, scale, zero = quantize(activation, x)
    if activation.granularity == "group":
        scale, zero = (torch.repeat_interleave(part, activation.group_size, dim=1)[:, : x.shape[1]] for part in (scale, zero))
    result = (codes.float() - zero) * scale
    if activation.outlier_threshold is not None:
        result = torch.where(_outliers(activation, x), x.float(), result)
    return result


def block_codes(activation: ActivationSpec, x: Tensor) -> BlockCodes:
    """The same numbers as quantize() of groups with one-byte scales, as bytes.

    Raises:
        LayoutError: a specification whose codes or scales are not bytes.
    """
    kind = SMALL_FLOATS.get(activation.element)
    if not covered(activation) or kind is None or activation.scale_type not in ("e8m0", "e4m3") or activation.second_scale == "group" or activation.granularity != "group":
        raise LayoutError(f"activation {activation.describe()}", "no bytes of codes and scales", "groups of small floats with e8m0 or e4m3 scales", "quantize it to numbers")
    x = x.contiguous()
    rows, k = x.shape
    codes = torch.empty(rows, -(-k // 2) if kind.bits == 4 else k, dtype=torch.uint8, device=x.device)
    scale = torch.empty(rows, -(-k // activation.group_size), dtype=torch.uint8, device=x.device)
    second = _second(activation, x)
    _quantize_groups(activation, x, codes, "nibble" if kind.bits == 4 else "byte", scale, second)
    return BlockCodes(codes, scale, second)


def _quantize_rows(activation: ActivationSpec, x: Tensor, codes: Tensor, stored: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of a scale per row, per tensor or from the checkpoint."""
    import triton

    from bitgrain.kernels.triton.activation_quantization_kernel import quantize_rows

    rows, k = x.shape
    outliers = activation.outlier_threshold is not None
    kept = _outliers(activation, x).to(torch.uint8) if outliers else x
    scale, zero = _stored_parameters(activation, x, stored)
    fixed = scale is not None
    if scale is None or zero is None:
        scale, zero = (torch.empty(rows, 1, dtype=torch.float32, device=x.device) for _ in range(2))
    second = None if fixed or activation.scale_type == "float" else _second(activation, x)
    if rows:
        block = min(ROW_TILE, triton.next_power_of_2(k))
        quantize_rows[(rows,)](
            x, codes, scale, zero, kept, scale, zero, scale if second is None else second,
            k, 0 if scale.shape[0] == 1 else 1, 1.0 if activation.clip is None else activation.clip, activation.outlier_threshold or 0.0, **_numbers(activation),
            STORED=fixed, OUTLIERS=outliers, SECOND="none" if second is None else "whole", **_flags(activation), STORE="value", WIDE=_interpreted(), BLOCK=block,
            num_warps=8 if block > 2048 else 4, enable_fp_fusion=False,
        )  # fmt: skip
    return codes, scale, zero


def _quantize_groups(
    activation: ActivationSpec, x: Tensor, codes: Tensor, store: str = "value", scale_codes: Tensor | None = None, second: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of a scale per group of columns."""
    import triton

    from bitgrain.kernels.triton.activation_quantization_kernel import quantize_groups

    (rows, k), group = x.shape, activation.group_size
    groups = -(-k // group)
    size = triton.next_power_of_2(max(2, group))
    in_rows = activation.second_scale == "group"
    per = activation.second_group // group if in_rows else max(1, GROUP_TILE // size)
    per = min(per, triton.next_power_of_2(groups))
    if second is None and not in_rows:
        second = _second(activation, x)
    scale, zero = (torch.empty((rows, groups) if scale_codes is None else (0,), dtype=torch.float32, device=x.device) for _ in range(2))
    if rows:
        quantize_groups[(rows, triton.cdiv(groups, per))](
            x, codes, scale, zero, x if scale_codes is None else scale_codes, x if second is None else second,
            k, group, groups, 1.0 if activation.clip is None else activation.clip, **_numbers(activation),
            CLIPPED=activation.clipped, SECOND="group" if in_rows else ("none" if second is None else "whole"), **_flags(activation), STORE=store,
            WIDE=_interpreted(), SCALE_CODES=scale_codes is not None, PER=per, TILE=triton.next_power_of_2(per), SIZE=size, enable_fp_fusion=False,
        )  # fmt: skip
    return codes, scale, zero


def _stored_parameters(activation: ActivationSpec, x: Tensor, stored: Tensor | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """(scale, zero) where they do not come from single rows: of the checkpoint, or of the whole input's range."""
    if activation.dynamic and activation.granularity != "tensor":
        return None, None
    if not activation.dynamic:
        zero = torch.full((1, 1), float(activation.zero), dtype=torch.float32, device=x.device)
        if stored is not None:
            return stored.contiguous(), zero
        assert activation.scale is not None, "a static activation scale was not loaded"
        return torch.full((1, 1), activation.scale, dtype=torch.float32, device=x.device), zero
    # the range alone decides: that of its two ends is the same one
    low, high = torch.aminmax(_ranged(activation, x))
    ends = torch.stack((low, high)).float()[None]
    _, scale, zero = replace(activation, outlier_threshold=None).quantize(ends)
    return scale, zero


def _ranged(activation: ActivationSpec, x: Tensor) -> Tensor:
    """x without the values that do not count in its range."""
    return x if activation.outlier_threshold is None else x.masked_fill(x.float().abs() >= activation.outlier_threshold, 0.0)


def _outliers(activation: ActivationSpec, x: Tensor) -> Tensor:
    """bool [1, K]: columns that stay as they are."""
    assert activation.outlier_threshold is not None
    return (x.float().abs() >= activation.outlier_threshold).any(0, keepdim=True)


def _second(activation: ActivationSpec, x: Tensor) -> Tensor | None:
    """The second scale of the whole input, float32 [1]; None if there is none."""
    if activation.second_scale == "static":
        assert activation.second is not None, "a second activation scale was not loaded"
        return torch.full((1,), activation.second, dtype=torch.float32, device=x.device)
    if activation.second_scale != "dynamic" or activation.scale_type == "e8m0" or not x.numel():
        return None
    low, high = torch.aminmax(_ranged(activation, x))
    clip = 1.0 if activation.clip is None else activation.clip
    peak = torch.maximum(-(low.float().clamp(max=0.0) * clip), high.float().clamp(min=0.0) * clip)
    peak = peak.clamp(min=activation.lower_bound, max=activation.upper_bound) if (activation.lower_bound, activation.upper_bound) != (None, None) else peak
    # tensors on both sides: some devices divide by a number as they multiply with its reciprocal
    for divisor in (activation.top_code, largest_scale(activation.scale_type)):
        peak = peak / torch.full_like(peak, divisor)
    return peak.clamp(min=torch.finfo(torch.float32).tiny).reshape(1)


def _numbers(activation: ActivationSpec) -> dict[str, float]:
    """Arguments of both kernels."""
    upper, lower = activation.upper_bound, activation.lower_bound
    largest = 0.0 if activation.scale_type in ("float", "e8m0") else largest_scale(activation.scale_type)
    return {
        "top": activation.top_code, "upper": float("inf") if upper is None else upper, "lower": 0.0 if lower is None else lower,
        "lowest_scale": activation.lowest_scale, "largest_scale": largest,
    }  # fmt: skip


@lru_cache(maxsize=64)
def _flags(activation: ActivationSpec) -> dict[str, Any]:
    """What both kernels are compiled for."""
    kind = SMALL_FLOATS.get(activation.element)
    power = activation.scale_type == "e8m0"
    return {
        "SYMMETRIC": activation.symmetric, "SCALE_TYPE": activation.scale_type, "RULE": activation.exponent_rule, "DIVIDES": activation.second_divides,
        "LARGEST": LARGEST_EXPONENT[activation.element] if power else 0, "TOP": (kind.max if kind else 127 / 64) if power else 0.0,
        "ROUND_BITS": ROUND_BITS.get(activation.element, 1), "INTEGER": kind is None, "LOW": 0 if kind else -(1 << (activation.bits - 1)),
        "RECIPROCAL": activation.reciprocal, "BITS": activation.bits, "MANTISSA": kind.mantissa_bits if kind else 6, "LOWEST": 1 - kind.bias if kind else 0,
        "MAX": kind.max if kind else 0.0,
    }  # fmt: skip


def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
