"""Checks of stored values: what no producer means is refused by name."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bitgrain.errors import BadValueError
from bitgrain.weights import ActivationSpec

_SUMMED = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_PIECE = 1 << 22  # values that are looked at together


def require_finite(name: str, values: Tensor) -> Tensor:
    """`values` itself.

    Raises:
        BadValueError: NaN or infinity, with their number.
    """
    # a sum is one pass without a copy; only a suspect result is looked at closely: finite values may have an infinite sum
    probed = values if values.dtype in _SUMMED else values.float()
    if not bool(torch.isfinite(probed.sum())):
        flat = probed.reshape(-1)
        bad = sum(int((~torch.isfinite(flat[start : start + _PIECE])).sum()) for start in range(0, flat.numel(), _PIECE))
        if bad:
            raise BadValueError(name, f"{bad} of {values.numel()} values are NaN or infinite", "finite values", "the file is damaged; fetch or write it again")
    return values


def require_scale(name: str, scale: Tensor, *, signed: bool = False, codes_are_zero: bool = False) -> Tensor:
    """`scale` itself, once it is finite and not entirely zero (and, unless `signed`, nowhere negative).

    Args:
        signed:         producers of this format write negative scales.
        codes_are_zero: the module's codes are all zero, so that zero scales lose nothing.
    Raises:
        BadValueError: what is wrong and where the first such value is.
    """
    require_finite(name, scale)
    values = scale.float()
    if not codes_are_zero and not bool((values != 0).any()):
        raise BadValueError(name, "every scale is zero", "a scale that is not zero", "the file is damaged; fetch or write it again")
    if not signed and bool((values < 0).any()):
        at = [int(i) for i in (values < 0).nonzero()[0]]
        raise BadValueError(name, f"{int((values < 0).sum())} negative scales, the first at {at}", "scales above zero", "the file is damaged; fetch or write it again")
    return scale


def static_value(name: str, tensor: Tensor) -> float:
    """The one number that a stored static scale or zero point holds."""
    return float(require_finite(name, tensor.reshape(-1)[:1].float())[0])


def fill_static(activation: ActivationSpec, scale: float, zero: int = 0) -> ActivationSpec:
    """A static specification with its stored values."""
    return replace(activation, scale=scale, zero=zero)
