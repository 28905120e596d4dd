"""The acceptance test finds what is wrong with a kernel, says where, and covers what it says it covers."""

import math
from dataclasses import replace

import pytest
import torch

from bitgrain.conformance import suite
from bitgrain.conformance.cases import MANY_ROWS, NO_ROWS, OPERATIONS, Depth, cases, thinned
from bitgrain.conformance.checks import check
from bitgrain.conformance.grid import ACTIVATIONS, BLOCKED, DTYPES, LARGE, WEIGHTS
from bitgrain.conformance.suite import chosen_kernels, proof_of, run_kernel
from bitgrain.errors import RequestError
from bitgrain.kernels.base import Refusal
from bitgrain.kernels.reference import KERNELS
from bitgrain.kernels.reference.linear import ReferenceLinear
from bitgrain.platforms.base import Platform
from bitgrain.platforms.probe import default_platform

FLOOR = {operation: kernel for operation, _, kernel in KERNELS}
HERE = default_platform()


class Fake(ReferenceLinear):
    """The floor for one weight, and what goes wrong."""

    name = "fake.linear"
    rank = 10

    def __init__(self, wrong=lambda y, x: y, takes=lambda problem: True):
        self.wrong, self.takes = wrong, takes

    def refusal(self, problem):
        simple = problem.weight == WEIGHTS[0] and problem.activation.is_none and self.takes(problem)
        return None if simple else Refusal("takes one kind of weight")

    def apply(self, x, prepared, bias):
        return self.wrong(super().apply(x, prepared, bias), x)


def run(kernel, operation="linear", depth=Depth.FULL):
    return run_kernel(operation, kernel, HERE, depth)


def test_a_right_kernel_passes_and_what_it_refuses_is_counted():
    result = run(Fake())
    assert (result.cases, result.failed, result.failures) == (11, 0, ()) and 0 < result.error <= 1
    assert result.refused == sum(not c.spare for c in cases("linear", HERE.key)) - 11 and result.reasons == {"takes one kind of weight": result.refused}
    assert result.proof == "" and result.note == ""


def noisy(y, x):
    return y + torch.rand(()).item() * 1e-4  # far below what is allowed, far above a bit


def of_one_row_more(y, x):
    return y if len(x) else y.new_zeros(1, y.shape[1])


@pytest.mark.parametrize("wrong, words", [
    (lambda y, x: y * 1.001, "times what is allowed"),
    (lambda y, x: y.double(), "gave float64"),
    (lambda y, x: y.T.contiguous().T[:, :-1], "not float32 [1, 64]"),
    (lambda y, x: y / 0, "differs"),
    (lambda y, x: y.masked_fill(y == y.max() if y.numel() else y != y, math.nan), "differs"),
    (lambda y, x: 1 // 0, "raised ZeroDivisionError"),
    (noisy, "other bits when it ran the same again"),
    (of_one_row_more, "M = 0"),
], ids=["scaled", "dtype", "shape", "infinite", "nan", "raises", "noisy", "no rows"])  # fmt: skip
def test_a_wrong_kernel_fails_with_the_problem_and_the_seed(wrong, words):
    result = run(Fake(wrong))
    assert result.failed and any(words in text for text in result.failures), result.failures
    assert all("linear [" in text and "M = " in text and ", seed " in text for text in result.failures)


@pytest.mark.parametrize("operation", [o for o in OPERATIONS if o not in ("linear", "experts")])
def test_a_wrong_result_of_every_other_operation_fails(operation):
    class Wrong(type(FLOOR[operation])):
        def apply(self, *args):
            y = super().apply(*args)
            return y + (1 if y.dtype == torch.int8 else 0.1) * y.abs().max() if y.numel() else y

    assert not run(FLOOR[operation], operation, Depth.SLICE).failed
    assert run(Wrong(), operation, Depth.SLICE).failed


@pytest.mark.parametrize("change", [lambda y, chosen: y * 1.1, lambda y, chosen: y + (chosen < 0).any() * 0.1, lambda y, chosen: y + (len(y) == 1) * 1e-7], ids=["all", "without", "alone"])
def test_wrong_experts_fail(change):
    class Wrong(type(FLOOR["experts"])):
        rank = 10

        def apply(self, x, weight, chosen, prepared):
            # sums of one row at a time do not depend on the others
            rows = [super(Wrong, self).apply(x[i : i + 1], weight[i : i + 1], chosen[i : i + 1], prepared) for i in range(len(x))]
            return change(torch.cat(rows) if rows else x.clone(), chosen).to(x.dtype)

    mixed = next(c for c in cases("experts", HERE.key) if c.options.get("alone") and not c.problem.biased)
    right = type("Right", (Wrong,), {"apply": lambda self, *a: torch.cat([FLOOR["experts"].apply(*(t[i : i + 1] for t in a[:3]), a[3]) for i in range(len(a[0]))])})
    assert check(right(), mixed, "cpu").problem == ""
    float32 = replace(mixed, problem=replace(mixed.problem, dtype="float32"))
    assert check(Wrong(), float32, "cpu").problem


def test_a_refusal_that_raises_is_a_failure():
    kernel = Fake(takes=lambda problem: 1 // (problem.k - 100))
    result = run(kernel)
    assert result.failed and "refusal() raised ZeroDivisionError" in result.failures[0] and result.error == math.inf


def test_a_kernel_of_large_sizes_only_is_asked_at_one():
    result = run(Fake(takes=lambda problem: problem.k % 512 == 0))
    assert result.cases == len(DTYPES) and not result.failed
    found = [c for c in cases("linear", HERE.key) if c.problem.k % 512 == 0 and c.problem.weight == WEIGHTS[0] and c.problem.activation.is_none]
    assert {(c.rows, c.problem.n, c.problem.k) for c in found} == {LARGE}


def test_a_kernel_that_refuses_everything_says_why():
    result = run(Fake(takes=lambda problem: False))
    assert result.cases == 0 and not result.failed and result.note == "refuses everything: takes one kind of weight"


def test_an_operation_without_a_definition_is_said_to_be_untested():
    assert "no definition" in run(Fake(), "something else").note


def test_depths_cover_every_weight_activation_and_dtype():
    every = list(cases("linear", HERE.key))
    full, quick, part = (thinned(every, depth) for depth in (Depth.FULL, Depth.QUICK, Depth.SLICE))
    assert len(full) > len(quick) > len(part) and not any(c.spare for c in full)
    weights, activations = {*WEIGHTS, *BLOCKED}, {a.without_values() for a in ACTIVATIONS}
    for found in (full, quick, part):
        assert {c.problem.weight for c in found} == weights and {c.problem.activation for c in found} == activations
        assert {c.problem.dtype for c in found} == set(DTYPES) and {NO_ROWS, 1, 3, 17, MANY_ROWS} <= {c.rows for c in found}
    assert {(c.problem.weight, c.problem.dtype) for c in quick} == {(w, d) for w in weights for d in DTYPES}
    assert len(thinned(every, Depth.QUICK, most=10)) == 10 and thinned(every, Depth.SLICE) == part


def test_names_that_nothing_has_are_refused_with_those_that_exist():
    with pytest.raises(RequestError, match="reference.linear"):
        chosen_kernels(HERE, kernel="reference.liner")
    with pytest.raises(RequestError, match="hadamard"):
        chosen_kernels(HERE, operation="lineer")
    with pytest.raises(RequestError, match="does not run gate"):
        chosen_kernels(HERE, operation="gate", kernel="reference.linear")


def test_what_ran_on_the_host_never_counts_as_the_device():
    simulated = Platform("chip", "cpu", frozenset(), 1, 1, "simulated")
    assert "not run on hardware" in proof_of(FLOOR["linear"], simulated) and proof_of(FLOOR["linear"], HERE) == ""
    kernel = Fake()
    kernel.proof = "contract-tested; not run on hardware"
    assert proof_of(kernel, simulated) == kernel.proof and proof_of(kernel, HERE) == ""


def test_many_failures_are_counted_and_the_first_are_told(monkeypatch):
    monkeypatch.setattr(suite, "FAILURES_TOLD", 2)
    result = run(Fake(lambda y, x: y + 1))
    assert result.failed > 2 and len(result.failures) == 2
