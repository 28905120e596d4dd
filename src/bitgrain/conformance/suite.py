"""All kernels of a platform over their declared domains."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bitgrain.conformance.cases import OPERATIONS, Depth, cases, thinned
from bitgrain.conformance.checks import check
from bitgrain.errors import RequestError
from bitgrain.kernels.base import Kernel
from bitgrain.kernels.registry import candidates, operations
from bitgrain.platforms.base import Platform

# Said of kernels that run on the host's tensors and do not say themselves how.
SIMULATED = "simulated on the host, not run on hardware"
# Failures that a result tells in full.
FAILURES_TOLD = 20


@dataclass(frozen=True, slots=True)
class Result:
    """One kernel over its part of the grid.

    Args:
        proof:    how it ran, where that was not on the device itself: "interpreter only, not run on hardware"; else "".
        cases:    how many ran.
        refused:  how many of the grid it refused; `reasons` says how often and why.
        error:    the worst distance from the definition, over the allowed one.
        failed:   how many cases failed; `failures` tells the first of them, with their seeds.
        note:     why nothing ran; else "".
    """

    operation: str
    kernel: str
    proof: str
    cases: int
    refused: int
    reasons: dict[str, int]
    error: float
    failed: int
    failures: tuple[str, ...]
    seconds: float
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def proof_of(kernel: Kernel, platform: Platform) -> str:
    """How a result of the kernel came about, where that was not on the device itself; else ""."""
    return str(getattr(kernel, "proof", SIMULATED)) if platform.state == "simulated" else ""


def chosen_kernels(platform: Platform, operation: str | None = None, kernel: str | None = None) -> list[tuple[str, Kernel]]:
    """(operation, kernel) of all that are registered for the platform or for any, by operation and rank.

    Raises:
        RequestError: a name that none of them has.
    """
    every = [(o, k) for o in operations() for k in candidates(o, platform.key)]
    for option, asked, known in (("operation", operation, {o for o, _ in every}), ("kernel", kernel, {k.name for _, k in every})):
        if asked is not None and asked not in known:
            raise RequestError(f"{option} {asked!r}", f"not on {platform.key}", f"one of {', '.join(sorted(known))}", "correct the name")
    found = [(o, k) for o, k in every if operation in (None, o) and kernel in (None, k.name)]
    if not found:
        raise RequestError(f"kernel {kernel!r}", f"does not run {operation}", "an operation that it runs", "leave one of the two out")
    return found


def run_kernel(operation: str, kernel: Kernel, platform: Platform, depth: Depth, tick: Callable[[int, int], None] | None = None, most: int = 0) -> Result:
    """One kernel over its part of the grid.

    Args:
        most: no more cases than so many, evenly spread; 0: all.
        tick: called with (cases done, cases).
    """
    proof, started = proof_of(kernel, platform), time.perf_counter()
    if operation not in OPERATIONS:
        return Result(operation, kernel.name, proof, 0, 0, {}, 0.0, 0, (), 0.0, "the operation has no definition here")
    accepted, reasons = [], Counter[str]()
    worst, failures = 0.0, []
    for case in cases(operation, platform.key):
        try:
            refusal = kernel.refusal(case.problem)
        except Exception as error:  # asking must never raise: selection asks every kernel
            worst = math.inf
            failures.append(f"{case.describe()}: refusal() raised {type(error).__name__}: {error}")
            continue
        if refusal is None:
            accepted.append(case)
        elif not case.spare:
            reasons[refusal.reason] += 1
    chosen = thinned(accepted, depth, most)
    for place, case in enumerate(chosen):
        outcome = check(kernel, case, platform.device_type)
        worst = max(worst, outcome.error)
        if outcome.problem:
            failures.append(f"{case.describe()}, seed {case.seed}: {outcome.problem}")
        if tick is not None:
            tick(place + 1, len(chosen))
    note = "" if chosen else f"refuses everything: {next(iter(reasons), 'the grid has no case')}"
    told = tuple(failures[:FAILURES_TOLD])
    return Result(operation, kernel.name, proof, len(chosen), reasons.total(), dict(reasons), worst, len(failures), told, time.perf_counter() - started, note)
