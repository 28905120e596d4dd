"""What the models of the operators check with: a call outside a contract is an error, as it is on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.errors import LayoutError

# of K and N in a matrix product
LARGEST_SIDE = 65535
INT4_PER_WORD = 8


def need(holds: bool, operator: str, found: str, needed: str) -> None:
    """Raise LayoutError unless a clause of an operator's contract holds."""
    if not holds:
        raise LayoutError(f"torch_npu.{operator}", found, needed, "correct the kernel that calls it")


def need_dtype(tensor: Tensor, dtypes: tuple[torch.dtype, ...], operator: str, name: str) -> None:
    need(tensor.dtype in dtypes, operator, f"{name} of {tensor.dtype}", f"one of {', '.join(str(d) for d in dtypes)}")


def need_shape(tensor: Tensor, shapes: tuple[tuple[int, ...], ...], operator: str, name: str) -> None:
    need(tuple(tensor.shape) in shapes, operator, f"{name} {list(tensor.shape)}", f"one of {', '.join(str(list(s)) for s in shapes)}")


def need_absent(operator: str, **values: object) -> None:
    """None of the named arguments is given."""
    given = [name for name, value in values.items() if value is not None]
    need(not given, operator, f"{', '.join(given)} given", "a call without them")


def need_filled(operator: str, **tensors: Tensor) -> None:
    """No tensor is empty."""
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    need(not empty, operator, f"empty {', '.join(empty)}", "at least one row and one column")


def is_transposed(matrix: Tensor) -> bool:
    """Whether a two-dimensional view is the transpose of a contiguous matrix (and not contiguous itself)."""
    return not matrix.is_contiguous() and matrix.t().is_contiguous()


def pack_words(values: Tensor) -> Tensor:
    """int32 [..., n / 8] of values -8 to 7 [..., n]: two's-complement nibbles, the first element lowest."""
    nibbles = (values.to(torch.int64) & 15).view(*values.shape[:-1], -1, INT4_PER_WORD)
    words = (nibbles << (4 * torch.arange(INT4_PER_WORD, device=values.device))).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_words(words: Tensor) -> Tensor:
    """int8 [..., n] of pack_words()."""
    shifts = 4 * torch.arange(INT4_PER_WORD, device=words.device)
    nibbles = (words.to(torch.int64)[..., None] >> shifts) & 15
    return torch.where(nibbles > 7, nibbles - 16, nibbles).to(torch.int8).flatten(-2)


def unpacked_matrix(weight: Tensor, operator: str) -> Tensor:
    """int8 [K, N] of int32 words: [K, N / 8] contiguous, or [K / 8, N], the transpose of contiguous [N, K / 8]."""
    need(weight.is_contiguous() or is_transposed(weight), operator, "packed words with gaps", "a contiguous matrix, or the transpose of one")
    return unpack_words(weight.t()).t() if is_transposed(weight) else unpack_words(weight)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """float64 x weight: no rounding, so that the order of summation does not show."""
    return x.double() @ weight.double()
