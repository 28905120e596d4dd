"""Incoherence processing: weights quantized between two Hadamard transforms, as QuIP# and QTIP do.

    y = s_out * H_N (Q H_K^T (s_in * x)),   H_n = (B_m kron Sylvester) / sqrt(n), n = m 2^t
B_m is the producers' own table, m the first of SIZES that divides n with a power of two left, or 1.
Source: formats specification, sections 4.2 and 5.3; lib/utils/matmul_had.py of both producers.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from bitgrain.errors import ShapeMismatchError
from bitgrain.formats.hadamard_tables import ROWS
from bitgrain.weights import Hadamard

SIZES = tuple(sorted(ROWS, reverse=True))


def base_size(size: int) -> int | None:
    """m of a transform of `size` entries; None where there is no such transform."""
    powers = (m for m in (*SIZES, 1) if size > 0 and size % m == 0 and not (size // m) & (size // m - 1))
    return next(powers, None)


@lru_cache(maxsize=len(ROWS))
def base_matrix(m: int) -> Tensor:
    """float32 [m, m] of +-1."""
    digits = torch.tensor([int(digit, 16) for digit in ROWS[m]])
    bits = digits[:, None] >> torch.tensor([3, 2, 1, 0]) & 1
    return (2.0 * bits - 1.0).view(m, m)


def hadamard(size: int, transpose: bool = False) -> Hadamard:
    """The orthonormal map x H^T (x H with `transpose`) in blocks of `size` entries."""
    require_transform("transform", size)
    m = base_size(size)
    return Hadamard(size, base_matrix(m) if m is not None and m > 1 else None, size**-0.5, transpose)


def require_transform(where: str, *sizes: int) -> None:
    """Raise ShapeMismatchError where the producers have no transform of a size."""
    wrong = [size for size in sizes if base_size(size) is None]
    if wrong:
        raise ShapeMismatchError(
            where,
            f"a Hadamard transform of {' and '.join(map(str, wrong))} entries",
            f"a power of two, or one times {', '.join(map(str, reversed(SIZES)))}",
            "no such module can have been written: correct config.json, or fetch the right checkpoint",
        )
