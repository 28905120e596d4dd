"""Memory of the host: in large pages, and given back once it is free."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

LARGE_PAGE = 1 << 21
WORTH_MAPPING = 2 * LARGE_PAGE  # smaller tensors: each would be a mapping, and there may be thousands


def large_pages(nbytes: int) -> Tensor:
    """uint8 [nbytes] of zeros in memory of its own, in large pages where the system has them; freed with the tensor and its views.

    Products read weights once per step, page by page.  The tensor begins where a large page does; its end, less than a large page,
    is in small ones, so that nothing is held beyond it.

    Raises:
        OSError: the system maps no more memory.
    """
    # the system aligns what it maps to small pages only: a large page more, of which nothing before the tensor is ever touched
    size = max(nbytes, 1) + LARGE_PAGE
    # Linux gives large pages to private memory; what mmap maps by itself is shared
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) if hasattr(mmap, "MAP_ANONYMOUS") else mmap.mmap(-1, size)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    first = -whole.data_ptr() % LARGE_PAGE
    if nbytes >= LARGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE, first, nbytes // LARGE_PAGE * LARGE_PAGE)
    return whole[first : first + nbytes]


def empty_weight(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """[shape] for a weight that is read once per step: in large pages if it fills some, from torch's allocator otherwise."""
    nbytes = prod(shape) * dtype.itemsize
    if nbytes < WORTH_MAPPING:
        return torch.empty(shape, dtype=dtype)
    try:
        return large_pages(nbytes).view(dtype).view(shape)
    except OSError:  # a process may map so many pieces only, of any size
        return torch.empty(shape, dtype=dtype)


def copied_weight(weight: Tensor) -> Tensor:
    """A contiguous copy, in memory as empty_weight() gives it."""
    return empty_weight(*weight.shape, dtype=weight.dtype).copy_(weight)


@lru_cache(maxsize=1)
def _trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim; None where the C library has none."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None


def return_free_memory() -> None:
    """Give freed memory back to the system, where the C library keeps it between allocations that live on.

    While a model is loaded, short-lived decodings and long-lived prepared weights take turns; without this the gaps
    between them stay resident, half as much again as the model.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
