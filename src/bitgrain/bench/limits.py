"""What the host does at best at this moment: bytes read and operations, per second."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch

READ_BYTES = 400_000_000  # far more than the caches hold
SIDE, SMALL_SIDE = 1024, 256  # of the squares whose product measures arithmetic; the caches hold them
SLOW = 5e-3  # seconds of the small product from which on the large one is left out
ARITHMETIC = ("float32", "bfloat16", "int8")


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Machine:
    """Rates of the host, with as many threads as torch uses."""

    def __init__(self) -> None:
        self._data = torch.ones(READ_BYTES // 4)

    def read(self) -> float:
        """Bytes per second of adding up an array larger than the caches, the best of three."""
        return READ_BYTES / min(seconds(self._data.sum) for _ in range(3))

    def peak(self, arithmetic: str) -> float:
        """Multiplications and additions per second of torch's own product of two squares, the best of five; 0 where it has none.

        Args:
            arithmetic: one of ARITHMETIC; "int8" adds up in int32, the others in float32.
        """
        try:
            small = seconds(_product(arithmetic, SMALL_SIDE))  # the first call is slower: it may compile
            small = min(small, *(seconds(_product(arithmetic, SMALL_SIDE)) for _ in range(3)))
            # where a product is not worth the name, a large one would take seconds
            side, best = (SIDE, min(seconds(_product(arithmetic, SIDE)) for _ in range(5))) if small < SLOW else (SMALL_SIDE, small)
        except RuntimeError:
            return 0.0
        return 2.0 * side**3 / best

    def peaks(self) -> dict[str, float]:
        """peak() of every arithmetic."""
        return {name: self.peak(name) for name in ARITHMETIC}


@cache
def _product(arithmetic: str, side: int) -> Callable[[], object]:
    if arithmetic == "int8":
        codes = torch.randint(-127, 128, (side, side), dtype=torch.int8)
        return lambda: torch._int_mm(codes, codes)
    square = torch.randn(side, side).to(getattr(torch, arithmetic))
    return lambda: square @ square
