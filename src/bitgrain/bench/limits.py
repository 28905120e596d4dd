"""What the host does at best at this moment: bytes read and operations, per second."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cache, partial

import torch

from bitgrain.kernels import peaks as host
from bitgrain.kernels.base import Fidelity
from bitgrain.platforms.host_memory import large_pages
from bitgrain.weights import ActivationSpec, WeightSpec

READ_BYTES = 400_000_000  # far more than the caches hold
SIDE, SMALL_SIDE = 1024, 256  # of the squares whose product measures arithmetic; the caches hold them
SLOW = 5e-3  # seconds of the small product from which on the large one is left out
THREE_DIGITS = "int4 in three digits"
DIGITS = 3  # signed bytes that hold an activation of an exact product of whole numbers


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Machine:
    """Rates of the host, with as many threads as torch uses."""

    def __init__(self) -> None:
        self._data = large_pages(READ_BYTES // 8 * 8).fill_(0)

    def read(self) -> float:
        """Bytes per second of reading memory in large pages, more of it than the caches hold; the best of six.

        Torch's sum and, where the library is here, the native loop take turns: which is faster depends on the machine.
        """
        ways: list[Callable[[], object]] = [self._data.view(torch.float32).sum, *([partial(host.read_all, self._data)] if host.can_measure() else [])]
        return self._data.nbytes / min(seconds(once) for _ in range(3) for once in ways)

    def peaks(self) -> dict[str, float]:
        """Multiplications and additions per second of every arithmetic, registers alone; 0 where the host has none.

        The third of "int4" is the limit of exact products of four-bit codes whose activations are three bytes each.  Where the native
        library is missing, torch's own products are what the host does.
        """
        if not host.can_measure():
            return {name: _torch_peak(name) for name in ("float32", "bfloat16", "int8")}
        found = {name: host.peak(name) for name in host.KINDS}
        return {**found, THREE_DIGITS: found["int4"] / DIGITS}


def limit_of(fidelity: Fidelity, weight: WeightSpec, activation: ActivationSpec, peaks: Mapping[str, float]) -> tuple[str, float]:
    """(name, operations per second) of the fastest arithmetic that a product may use.

    Whole numbers where activations have eight bits, by the scheme or because the kernel rounds them.  Else the two floats; or whole
    numbers in three digits for codes of four bits, which are as exact.

    Args:
        peaks: of Machine.peaks().
    """
    rounded = fidelity is Fidelity.APPROXIMATE or (activation.is_integer and weight.kind == "int_affine")
    whole = ["int8", *(["int4"] if weight.bits <= 4 else [])] if rounded else [THREE_DIGITS] if weight.bits <= 4 else []
    names = [name for name in ("float32", *whole, *([] if rounded else ["bfloat16"])) if peaks.get(name)]
    name = max(names, key=lambda name: peaks[name], default="float32")
    return name, peaks.get(name, 0.0)


def _torch_peak(arithmetic: str) -> float:
    """Of the product of two squares, the best of five; 0 where torch has none.

    Args:
        arithmetic: "int8" adds up in int32, floating-point types in float32.
    """
    try:
        small = seconds(_product(arithmetic, SMALL_SIDE))  # the first call is slower: it may compile
        small = min(small, *(seconds(_product(arithmetic, SMALL_SIDE)) for _ in range(3)))
        # where a product is not worth the name, a large one would take seconds
        side, best = (SIDE, min(seconds(_product(arithmetic, SIDE)) for _ in range(5))) if small < SLOW else (SMALL_SIDE, small)
    except RuntimeError:
        return 0.0
    return 2.0 * side**3 / best


@cache
def _product(arithmetic: str, side: int) -> Callable[[], object]:
    if arithmetic == "int8":
        codes = torch.randint(-127, 128, (side, side), dtype=torch.int8)
        return lambda: torch._int_mm(codes, codes)
    square = torch.randn(side, side).to(getattr(torch, arithmetic))
    return lambda: square @ square
