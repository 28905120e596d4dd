"""Memory of the host: in large pages, and given back once it is free."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from functools import lru_cache
from math import prod
from threading import Lock
from weakref import ref

import torch
from torch import Tensor

LARGE_PAGE = 1 << 21
WORTH_MAPPING = 2 * LARGE_PAGE  # smaller tensors: each would be a mapping, and there may be thousands
WORTH_SHARING = 1 << 16  # still smaller ones fill few pages of any size
ARENA, LINE = 16 * LARGE_PAGE, 64


def large_pages(nbytes: int) -> Tensor:
    """uint8 [nbytes] of zeros in memory of its own, in large pages where the system has them; freed with the tensor and its views.

    Products read weights once per step, page by page.  The tensor begins where a large page does; its end, less than a large page,
    is in small ones, so that nothing is held beyond it.

    Raises:
        OSError: the system maps no more memory.
    """
    return _aligned(_mapped(nbytes))[:nbytes]


def _mapped(nbytes: int) -> mmap.mmap:
    """Memory for so many bytes behind the first boundary of a large page in it; whole large pages of them are asked for."""
    # the system aligns what it maps to small pages only: a large page more, of which nothing before the boundary is ever touched
    size = max(nbytes, 1) + LARGE_PAGE
    # Linux gives large pages to private memory; what mmap maps by itself is shared
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) if hasattr(mmap, "MAP_ANONYMOUS") else mmap.mmap(-1, size)
    if nbytes >= LARGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE, _boundary(torch.frombuffer(memory, dtype=torch.uint8)), nbytes // LARGE_PAGE * LARGE_PAGE)
    return memory


def _boundary(whole: Tensor) -> int:
    return -whole.data_ptr() % LARGE_PAGE


def _aligned(memory: mmap.mmap) -> Tensor:
    """The mapped bytes from the first boundary of a large page on."""
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[_boundary(whole) :]


def empty_weight(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """[shape] for a weight that is read once per step: in large pages if it fills some, from torch's allocator otherwise."""
    nbytes = prod(shape) * dtype.itemsize
    if nbytes < WORTH_MAPPING:
        return torch.empty(shape, dtype=dtype)
    try:
        return large_pages(nbytes).view(dtype).view(shape)
    except OSError:  # a process may map so many pieces only, of any size
        return torch.empty(shape, dtype=dtype)


class _Arena:
    """Large pages that tensors too small for pages of their own share.  Memory is freed once all tensors of a piece are gone, so what
    is kept briefly does not belong here."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._piece: Callable[[], mmap.mmap | None] = lambda: None
        self._used = 0

    def take(self, nbytes: int) -> Tensor:
        """uint8 [nbytes], at the beginning of a cache line.

        Raises:
            OSError: the system maps no more memory.
        """
        with self._lock:
            memory = self._piece()
            if memory is None or self._used + nbytes > ARENA:
                memory = _mapped(ARENA)
                self._piece, self._used = ref(memory), 0
            start = self._used
            self._used += -(-nbytes // LINE) * LINE
            return _aligned(memory)[start : start + nbytes]


_arena = _Arena()


def kept_weight(*shape: int) -> Tensor:
    """uint8 [shape] for a prepared weight, which lives as long as its model: in large pages, shared with others where it is small."""
    nbytes = prod(shape)
    if not WORTH_SHARING <= nbytes < WORTH_MAPPING:
        return empty_weight(*shape)
    try:
        return _arena.take(nbytes).view(shape)
    except OSError:  # as above
        return torch.empty(shape, dtype=torch.uint8)


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
