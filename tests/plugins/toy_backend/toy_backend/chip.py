"""Stands for what a vendor brings: a driver that lists chips, and operators.  A backend calls it and does not write it."""

from torch import Tensor

CHIPS = ("Toychip T2",)


def scaled_product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """float32 [M, N] of float32 [M, K], int8 [N, K] and float32 [N]."""
    return x @ codes.float().T * scale


def integer_product(x: Tensor, codes: Tensor) -> Tensor:
    """int32 [M, N] of int8 [M, K] and int8 [N, K]."""
    return x.int() @ codes.int().T
