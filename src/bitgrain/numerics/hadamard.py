"""Walsh-Hadamard transforms of sizes 2^t m, with the base matrix of size m that a producer uses.

    H_n = B_m kron S_(2^t), S the Sylvester matrix: S_1 = [1], S_2p = [[S_p, S_p], [S_p, -S_p]]
    x H_n^T over the last axis: viewed [m, 2^t], a butterfly over the last axis, then B over the first
Base matrices of one size differ between projects (equivalent is not equal, and several are not symmetric), so they are
arguments here and tables in formats/.  Source: formats specification, section 5.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.errors import LayoutError


def walsh_hadamard(x: Tensor) -> Tensor:
    """x S over the last axis, which is a power of two long; unnormalized, natural order, in x's dtype."""
    size = x.shape[-1]
    if size & (size - 1) or not size:
        raise LayoutError("walsh_hadamard", f"an axis of {size}", "a power of two", "give the base matrix of the remaining factor")
    y, width = x.reshape(x.numel() // size, size), 1
    while width < size:
        pairs = y.unflatten(1, (-1, 2, width))
        y = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2).flatten(1)
        width *= 2
    return y.view(x.shape)


def hadamard_transform(x: Tensor, base: Tensor | None = None, transpose: bool = False) -> Tensor:
    """x H^T (x H with `transpose`) over the last axis; unnormalized, in x's dtype.

    Args:
        base: [m, m] of +-1, or None for m = 1; m times a power of two is the axis' length.
    """
    if base is None:
        return walsh_hadamard(x)
    m = base.shape[0]
    if x.shape[-1] % m:
        raise LayoutError("hadamard_transform", f"an axis of {x.shape[-1]} and a base of {m}", "a multiple of the base", "choose the base of the size")
    y = walsh_hadamard(x.unflatten(-1, (m, -1)))
    matrix = base.to(y.device, y.dtype)
    return torch.matmul(matrix.t() if transpose else matrix, y).reshape(x.shape)


def hadamard_matrix(size: int, base: Tensor | None = None) -> Tensor:
    """float32 [size, size]: H itself, entries +-1."""
    return hadamard_transform(torch.eye(size), base).t().contiguous()
