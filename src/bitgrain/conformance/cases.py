"""The grid of each operation as cases, and how many of them are run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import product
from typing import Any

from bitgrain.conformance.grid import (
    ACTIVATIONS,
    ATTENTIONS,
    BLOCKED,
    DTYPES,
    EXPERT_COUNT,
    EXPERT_SHAPES,
    GATE_SHAPES,
    GATES,
    HADAMARD_ROWS,
    HADAMARDS,
    JOINS,
    LARGE,
    LARGE_EXPERTS,
    NORMS,
    ROTARIES,
    WEIGHTS,
    float8,
    int_affine,
    shapes_of,
    steps_of,
)
from bitgrain.kernels.base import EmbeddingProblem, ExpertsProblem, HadamardProblem, LinearProblem, Problem, StepProblem
from bitgrain.kernels.registry import candidates
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, WeightSpec

# Rows of a case beyond a grid's own: none, and more than one tile of most kernels.
NO_ROWS, MANY_ROWS = 0, 70


class Depth(str, Enum):
    """How much of the grid is run.

    FULL:  all of it.
    QUICK: one case for each weight and dtype, and one for each activation and dtype; shapes take turns.
    SLICE: one case for each weight, and one for each activation; dtypes and shapes take turns.
    """

    FULL = "full"
    QUICK = "quick"
    SLICE = "slice"


@dataclass(frozen=True)
class Case:
    """One problem of the grid, and what its input is like.

    Args:
        rows:       M.
        activation: of a linear problem, with the values that a checkpoint stores.
        options:    what else varies, by name; see the check of the operation.
        seed:       of weights and inputs.
        spare:      only for kernels that take no smaller case of the same weight and activation.
    """

    problem: Problem
    rows: int
    activation: ActivationSpec = NO_ACTIVATION
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    spare: bool = False

    def describe(self) -> str:
        options = "".join(f", {name} {value}" for name, value in self.options.items() if value not in (None, False))
        return f"{self.problem.describe()}, M = {self.rows}{options}"


def cases(operation: str, platform: str) -> Iterator[Case]:
    """Every case of one operation, before a kernel refuses any; none for an operation that has no definition here.

    Args:
        platform: dispatch key, whose kernels a problem may name.
    """
    makers = {
        "linear": _linears, "embedding": lambda: _embeddings(platform), "experts": _experts, "hadamard": _hadamards,
        "norm": _norms, "rotary": _rotaries, "gate": _gates, "attention": _attentions,
    }  # fmt: skip
    return makers[operation]() if operation in makers else iter(())


OPERATIONS = ("linear", "embedding", "experts", "hadamard", "norm", "rotary", "gate", "attention")


def thinned(found: Iterable[Case], depth: Depth, most: int = 0) -> list[Case]:
    """As many of a kernel's cases as a depth asks for; which ones is the same every time.

    Args:
        most: no more than so many, evenly spread; 0: all.
    """
    found = list(found)
    taken = {(case.problem.weight, case.problem.activation) for case in found if not case.spare}
    found = [case for case in found if not case.spare or (case.problem.weight, case.problem.activation) not in taken]
    chosen = found if depth is Depth.FULL else _one_of_each(found, depth)
    return chosen if not most or len(chosen) <= most else [chosen[i * len(chosen) // most] for i in range(most)]


def _one_of_each(found: list[Case], depth: Depth) -> list[Case]:
    """One case for each weight and one for each activation; QUICK: for each dtype, and for no rows, some and many."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for place, case in enumerate(found):
        problem = case.problem
        finer: tuple[object, ...] = (_what(problem),)
        if isinstance(problem, StepProblem):
            finer += (problem.dtype, *(value for value in case.options.values() if value is None or isinstance(value, bool)))
        if depth is Depth.QUICK:
            finer += (problem.dtype, case.rows if case.rows in (NO_ROWS, MANY_ROWS) else -1)
        for key in ((problem.weight, *finer), (problem.activation, *finer)):
            groups.setdefault(key, []).append(place)
    # another place in each group, so that everything that varies within groups is met
    places = [group[(turn * 7 + turn // 5) % len(group)] for turn, group in enumerate(groups.values())]
    return [found[place] for place in sorted(set(places))]


def _what(problem: Problem) -> object:
    """What the problem computes besides its weight."""
    if isinstance(problem, StepProblem):
        return problem.operation, problem.detail
    return (problem.size, problem.order) if isinstance(problem, HadamardProblem) else problem.operation


def _linears() -> Iterator[Case]:
    turn = 0
    for weight in [*WEIGHTS, *BLOCKED]:
        shapes = shapes_of(weight)
        for activation in ACTIVATIONS:
            for dtype in DTYPES:
                for m, n, k in shapes:
                    yield Case(LinearProblem(weight, activation.without_values(), n, k, dtype), m, activation, {"bias": m != 3}, m)
            for m in (NO_ROWS, MANY_ROWS):
                turn += 1
                _, n, k = shapes[turn % 3]
                yield Case(LinearProblem(weight, activation.without_values(), n, k, DTYPES[turn % 3]), m, activation, {"bias": turn % 2 == 0}, m)
            m, n, k = LARGE
            for dtype in DTYPES:
                yield Case(LinearProblem(weight, activation.without_values(), n, k, dtype), m, activation, {"bias": True}, m, spare=True)


def _embeddings(platform: str) -> Iterator[Case]:
    linears = candidates("linear", platform)
    for weight in [*WEIGHTS, *BLOCKED]:
        _, n, k = shapes_of(weight)[1]
        for dtype in DTYPES:
            heads = [kernel.name for kernel in linears if kernel.refusal(LinearProblem(weight, NO_ACTIVATION, n, k, dtype)) is None]
            for head in ("", *heads):
                yield from (Case(EmbeddingProblem(weight, n, k, dtype, head), m) for m in (4, NO_ROWS))


def experts_problem(
    weight: WeightSpec, activation: ActivationSpec, sizes: tuple[int, int], dtype: str = "float32", join: str = "silu", biased: bool = False,
    down: WeightSpec | None = None, down_activation: ActivationSpec | None = None,
) -> ExpertsProblem:  # fmt: skip
    """EXPERT_COUNT experts of one scheme, or of two.

    Args:
        sizes: (hidden, size), rounded up to what the weight comes in: each is N of one product and K of the other.
    """
    step = max(steps_of(weight))
    hidden, size = (-(-value // step) * step for value in sizes)
    second = activation if down_activation is None else down_activation
    return ExpertsProblem(weight, down or weight, activation.without_values(), second.without_values(), EXPERT_COUNT, hidden, size, join, biased, dtype)


def mixed_experts() -> list[ExpertsProblem]:
    """Gate and up of one scheme, down of another."""
    return [
        experts_problem(int_affine(4, "group", 32), NO_ACTIVATION, (128, 64), "bfloat16", down=int_affine(8, "channel")),
        experts_problem(float8("fp8_e4m3fn", "channel"), ActivationSpec("fp8_e4m3fn", "token"), (64, 96), "bfloat16", down_activation=NO_ACTIVATION),
        experts_problem(int_affine(8, "channel"), ActivationSpec("int8", "token", top=127.0), (96, 40), "bfloat16", biased=True),
    ]


def _experts() -> Iterator[Case]:
    for problem in mixed_experts():
        yield Case(problem, 9, options={"per token": 2, "alone": True, "places without an expert": True}, seed=7)
    for place, weight in enumerate([*WEIGHTS, *BLOCKED]):
        for turn, activation in enumerate(ACTIVATIONS):
            m, per_token, hidden, size = EXPERT_SHAPES[(place + turn) % len(EXPERT_SHAPES)]
            dtype, join = DTYPES[(place + turn) % len(DTYPES)], JOINS[turn % len(JOINS)]
            problem = experts_problem(weight, activation, (hidden, size), dtype, join, biased=place % 2 == 1)
            yield Case(problem, m, options={"per token": per_token}, seed=m)
            m, per_token, hidden, size = LARGE_EXPERTS
            for dtype in DTYPES:
                large = experts_problem(weight, activation, (hidden, size), dtype, join)
                yield Case(large, m, options={"per token": per_token}, seed=m, spare=True)
        yield Case(problem, NO_ROWS, options={"per token": 2})


def _hadamards() -> Iterator[Case]:
    for (size, order), dtype in product(HADAMARDS, DTYPES):
        for (rows, blocks), transpose in product(HADAMARD_ROWS, (False, True)):
            yield Case(HadamardProblem(size, order, dtype), rows, options={"blocks": blocks, "transpose": transpose}, seed=rows)


def _norms() -> Iterator[Case]:
    for (rows, size), dtype in product(NORMS, DTYPES):
        for wide, float_weight, bias in ((False, False, False), (False, False, True), (True, False, False), (True, True, True)):
            options = {"wide": wide, "float32 weight": float_weight, "bias": bias}
            yield Case(StepProblem("norm", size, dtype), rows, options=options)


def _rotaries() -> Iterator[Case]:
    for (rows, heads, size, turned), dtype, interleaved in product(ROTARIES, DTYPES, (False, True)):
        yield Case(StepProblem("rotary", size, dtype), rows, options={"heads": heads, "turned": turned, "interleaved": interleaved})


def _gates() -> Iterator[Case]:
    for name, (rows, size), dtype in product(GATES, GATE_SHAPES, DTYPES):
        yield Case(StepProblem("gate", 0, dtype, name), rows, options={"columns": size})


def _attentions() -> Iterator[Case]:
    for shape, dtype, window, (sinks, cap) in product(ATTENTIONS, DTYPES, (None, 5), ((False, None), (True, None), (False, 3.0))):
        names = ("tokens", "heads", "groups", "head", "value")
        options = {**dict(zip(names, shape[1:], strict=True)), "window": window, "sinks": sinks, "cap": cap}
        yield Case(StepProblem("attention", shape[4], dtype), shape[0], options=options)
