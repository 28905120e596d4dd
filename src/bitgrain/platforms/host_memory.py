"""Memory that the process has freed and its allocator still holds."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache


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
