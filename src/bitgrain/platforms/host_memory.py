"""Memory of the host: in large pages, and given back once it is free."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

LARGE_PAGE = 1 << 21


def large_pages(nbytes: int) -> Tensor:
    """uint8 [nbytes] of zeros in memory of its own, in large pages where the system has them; freed with the tensor and its views.

    Products read weights once per step, page by page.  The tensor begins where a large page does.
    """
    # the system aligns what it maps to small pages only: a large page more, of which nothing before the tensor is ever touched
    size = max(nbytes, 1) + LARGE_PAGE
    # Linux gives large pages to private memory; what mmap maps by itself is shared
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) if hasattr(mmap, "MAP_ANONYMOUS") else mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    first = -whole.data_ptr() % LARGE_PAGE
    return whole[first : first + nbytes]


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
