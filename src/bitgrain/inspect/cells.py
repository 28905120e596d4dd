"""Every cell of the support matrix of one platform, run: an example of the scheme on the kernel that the default policy chooses."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from bitgrain.conformance.cases import Case
from bitgrain.conformance.checks import check
from bitgrain.inspect.matrix import choices, schemes
from bitgrain.inspect.run_records import place_of, record_key, record_of
from bitgrain.kernels.base import EmbeddingProblem, ExpertsProblem, Kernel, LinearProblem, Problem
from bitgrain.platforms.base import Platform
from bitgrain.weights.synthetic import sample_activation

ROWS = 5
# Sizes of examples where kernels run on the host's tensors: multiples of every usual group and block.
SMALL = (48, 256)


@dataclass(frozen=True, slots=True)
class CellRuns:
    """What came of it.

    Args:
        records:  of what agreed with the definition, by record_key.
        failures: what did not, one line each.
    """

    records: dict[str, dict[str, Any]]
    failures: tuple[str, ...]


def run_cells(platform: Platform, dtype: str = "bfloat16", kernels: Collection[str] | None = None, tick: Callable[[int, int], None] | None = None) -> CellRuns:
    """Run each cell whose kernel is among `kernels` (None: all), each combination of kernel and scheme once.

    Args:
        tick: called with (cells done, cells).
    """
    cells = dict(_cells(platform, dtype, kernels))
    records, failures = {}, []
    for place, (key, (problem, kernel)) in enumerate(cells.items()):
        case = _case(problem, kernel, platform)
        outcome = check(kernel, case, platform.device_type)
        if outcome.problem:
            failures.append(f"{kernel.name}: {case.describe()}, seed {case.seed}: {outcome.problem}")
        else:
            records[key] = record_of(platform, kernel)
        if tick is not None:
            tick(place + 1, len(cells))
    return CellRuns(records, tuple(failures))


def _cells(platform: Platform, dtype: str, kernels: Collection[str] | None) -> Iterator[tuple[str, tuple[Problem, Kernel]]]:
    for _, _, embeddings, _, weight, activation in schemes():
        for problem, selection in choices(weight, activation, dtype, embeddings, platform.key).values():
            if selection is not None and (kernels is None or selection.kernel.name in kernels):
                yield record_key(problem, place_of(platform), selection.kernel.name), (problem, selection.kernel)


def _case(problem: Problem, kernel: Kernel, platform: Platform) -> Case:
    """The problem with an input; smaller where a simulation would take long and the kernel takes it."""
    if platform.state == "simulated":
        small = _small(problem)
        problem = small if kernel.refusal(small) is None else problem
    if isinstance(problem, ExpertsProblem):
        return Case(problem, ROWS, options={"per token": 2}, seed=1)
    return Case(problem, ROWS, sample_activation(problem.activation), seed=1)


def _small(problem: Problem) -> Problem:
    n, k = SMALL
    if isinstance(problem, (LinearProblem, EmbeddingProblem)):
        return replace(problem, n=n, k=k)
    return replace(problem, hidden=k, size=k) if isinstance(problem, ExpertsProblem) else problem
