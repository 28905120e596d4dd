"""Factors of stored Hadamard matrices: what a butterfly computes instead of a product with the whole matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.errors import BadValueError
from bitgrain.numerics.hadamard import hadamard_matrix

# Rows that are looked at together: bounds the working set for matrices of a gigabyte.
ROWS = 1024
# Sylvester factors that are compared as whole matrices.
LARGEST = 4096
_DAMAGED = "the file is damaged; fetch or write it again"


@dataclass(frozen=True, slots=True, eq=False)
class HadamardFactors:
    """H = diag(signs) (base kron S), S the Sylvester matrix of size n / m.

    Args:
        signs: float32 [n] of +-1, or None where all are +1.
        base:  float32 [m, m] of +-1, or None for m = 1.
    """

    signs: Tensor | None
    base: Tensor | None


def read_signs(name: str, stored: Tensor) -> Tensor:
    """int8 [n, n] of a stored matrix of +-1 in any element type.

    Raises:
        BadValueError: other entries.
    """
    signs = torch.empty(stored.shape, dtype=torch.int8)
    for start in range(0, stored.shape[0], ROWS):
        part = stored[start : start + ROWS]
        if not bool((part.abs() == 1).all()):
            raise BadValueError(name, "entries other than 1 and -1", "a Hadamard matrix, before its division by the root of its size", _DAMAGED)
        signs[start : start + ROWS] = part.to(torch.int8)
    return signs


def require_hadamard(name: str, matrix: Tensor, factors: HadamardFactors | None) -> None:
    """Raise BadValueError unless the rows are orthogonal; of a large matrix without factors each to the first ones.

    Args:
        matrix:  int8 [n, n] of +-1.
        factors: its own; they are orthogonal if the base is.
    """
    checked = matrix if factors is None else factors.base
    if checked is None:
        return
    first = checked[: ROWS // 4].float()
    for start in range(0, checked.shape[0], ROWS):
        product = first @ checked[start : start + ROWS].float().t()  # sums of at most 2^24 ones: exact
        if not start:
            product.diagonal()[:] -= checked.shape[0]
        if bool(product.any()):
            raise BadValueError(name, "rows that are not orthogonal", "a Hadamard matrix", _DAMAGED)


def factor_hadamard(matrix: Tensor) -> HadamardFactors | None:
    """The factors with the smallest base; None where the matrix has no factor that a butterfly computes.

    With p = n / m: base[a, b] = H[a p, b p], signs[a p + r] = H[a p + r, 0] H[a p, 0]; they are the factors if they give
    H again, because the first row and column of S are ones.

    Args:
        matrix: int8 [n, n] of +-1.
    """
    size = matrix.shape[0]
    power = min(size & -size, LARGEST)
    while power > 1:
        base = matrix[::power, ::power].contiguous()
        signs = matrix[:, 0] * matrix[::power, 0].repeat_interleave(power)
        sylvester = hadamard_matrix(power).to(torch.int8)
        blocks = matrix.view(size // power, power, size // power, power)
        if all(torch.equal(rows, signs[a * power : (a + 1) * power, None, None] * base[a][:, None] * sylvester[:, None]) for a, rows in enumerate(blocks)):
            if size == power:  # m = 1: the only entry of the base is a sign of every row
                signs = signs * base[0, 0]
            plain = bool((signs == 1).all())
            return HadamardFactors(None if plain else signs.float(), None if size == power else base.float())
        power //= 2
    return None
