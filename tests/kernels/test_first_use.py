"""The first use of a kernel of any operation tests it, on its device; what it raises or computes wrongly is a refusal."""

import json

import pytest
import torch

from bitgrain.kernels import registry, selftest
from bitgrain.kernels.base import EmbeddingProblem, ExpertsProblem, HadamardProblem, LinearProblem, StepProblem
from bitgrain.kernels.reference import KERNELS
from bitgrain.kernels.selection import Policy, select
from bitgrain.platforms.base import Platform
from bitgrain.weights import NO_ACTIVATION, WeightSpec

INT4 = WeightSpec("int_affine", "uint4", 4, "group", 32, zero="constant", scale_dtype="float16")
FLOORS = {operation: type(kernel) for operation, _, kernel in KERNELS}
PROBLEMS = [
    LinearProblem(INT4, NO_ACTIVATION, 64, 64, "float32"),
    EmbeddingProblem(INT4, 500, 64, "bfloat16"),
    ExpertsProblem(INT4, INT4, NO_ACTIVATION, NO_ACTIVATION, 4, 64, 64, "silu", True, "float32"),
    HadamardProblem(64, 1, "float32"),
    HadamardProblem(96, 12, "float16"),
    StepProblem("norm", 72, "bfloat16"),
    StepProblem("rotary", 64, "float32"),
    StepProblem("gate", 0, "float16", "silu"),
    StepProblem("attention", 32, "float32"),
]


def tried(operation, change):
    """A kernel of the operation above the floor, whose results go through `change`."""

    class Tried:
        name, rank, platform = f"toy.{operation}", 90, "toy"

        def __init__(self):
            self.floor = FLOORS[operation]()

        def __getattr__(self, name):
            return getattr(self.floor, name)

        def apply(self, *arguments):
            return change(self.floor.apply(*arguments))

    return Tried()


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Sets what the platform "toy" is; nothing is remembered yet."""
    monkeypatch.setenv("BITGRAIN_CACHE", str(tmp_path))
    monkeypatch.delenv("BITGRAIN_SELFTEST", raising=False)
    monkeypatch.setattr(selftest, "_results", {})
    selftest._stored.cache_clear()

    def become(state="present", device_type="cpu", devices=("Toy 1",)):
        found = Platform("toy", device_type, frozenset(), 1, 1 << 30, state, "gen1", devices)
        monkeypatch.setattr(selftest, "target", lambda key: found)

    become()
    yield become
    selftest._stored.cache_clear()


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.describe())
def test_right_kernel_passes_and_a_wrong_one_is_refused(problem, here):
    assert selftest.self_test(tried(problem.operation, lambda y: y), problem, "toy") is None
    selftest._results.clear()
    assert selftest._run(tried(problem.operation, lambda y: y), problem) == ""
    for change in (lambda y: y * 1.05, lambda y: y.masked_fill(torch.ones_like(y, dtype=torch.bool), torch.nan)):
        assert "differs from the reference" in selftest._run(tried(problem.operation, change), problem)


@pytest.mark.parametrize("error", [RuntimeError("illegal step"), OSError("no library"), KeyError("lost"), NotImplementedError()], ids=repr)
def test_whatever_a_kernel_raises_is_a_refusal_that_is_not_kept(error, here, tmp_path):
    def change(y):
        raise error

    refusal = selftest.self_test(tried("norm", change), PROBLEMS[5], "toy")
    assert refusal.reason.startswith(f"its self-test raised {type(error).__name__}: ")
    assert not (tmp_path / "selftest.json").exists()


def test_kernel_runs_on_the_targets_device(here):
    here(device_type="meta")
    seen = []
    selftest.self_test(tried("rotary", lambda y: seen.append(y.device.type) or y), PROBLEMS[6], "toy")
    assert seen and set(seen) == {"meta"}


def test_planned_platform_runs_nothing(here):
    here(state="planned")
    assert selftest.self_test(tried("norm", lambda y: 1 / 0), PROBLEMS[5], "toy") is None


def test_result_is_remembered_for_the_device_and_for_how_it_ran(here, tmp_path):
    here()
    selftest.self_test(tried("norm", lambda y: y * 2), PROBLEMS[5], "toy")
    right = tried("norm", lambda y: y)
    assert "differs" in selftest.self_test(right, PROBLEMS[5], "toy").reason
    for change in ({"devices": ("Toy 2",)}, {"state": "simulated"}):
        here(**change)
        assert selftest.self_test(right, PROBLEMS[5], "toy") is None
    assert sorted(map(bool, json.loads((tmp_path / "selftest.json").read_text()).values())) == [False, False, True]


def test_kernel_whose_refusal_raises_is_passed_over(here, monkeypatch):
    class Broken(FLOORS["linear"]):
        name, rank = "toy.broken", 90

        def refusal(self, problem):
            raise OSError("vendor library is broken")

    monkeypatch.setattr(registry, "kernel_entries", lambda: (("linear", "toy", Broken()), ("linear", registry.ANY_PLATFORM, FLOORS["linear"]())))
    chosen = select(PROBLEMS[0], "toy", Policy())
    assert chosen.kernel.name == "reference.linear"
    assert chosen.candidates[0].reason == "asking it raised OSError: vendor library is broken"


def test_every_kernel_of_the_host_passes(here):
    here()
    for problem in PROBLEMS:
        for kernel in registry.candidates(problem.operation, "cpu"):
            if kernel.rank and kernel.refusal(problem) is None:
                assert selftest._run(kernel, problem) == "", kernel.name
