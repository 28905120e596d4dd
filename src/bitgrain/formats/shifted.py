"""Codes with an offset in the weights' own unit: W = code * scale + offset."""

from __future__ import annotations

import torch
from torch import Tensor


def without_zero_scales(codes: Tensor, scale: Tensor, offset: Tensor, centre: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points of W = (code - zero) * scale that equal (code - centre) * scale + offset.

    zero = centre - offset / scale.  A group whose values are all alike has the scale 0 and is its offset alone: its codes
    become `centre` and its scale the magnitude of the offset, so that nothing is divided by 0.

    Args:
        codes:  uint8 [N, K].
        scale:  float [N, G].
        offset: float32 [N, G].
        centre: the code at which W is the offset.
        size:   columns per group.
    Returns:
        codes, scale of the same dtype, zero float32 [N, G].
    """
    flat = scale == 0
    if bool(flat.any()):
        codes = codes.masked_fill(torch.repeat_interleave(flat, size, dim=1)[:, : codes.shape[1]], centre)
        scale = torch.where(flat, torch.where(offset == 0, 1.0, offset.abs()).to(scale.dtype), scale)
    return codes, scale.contiguous(), (centre - offset / scale.float()).contiguous()
