"""Selection: the best kernel that is admitted, every reason kept, every wish honoured or refused."""

import json
from dataclasses import replace

import pytest
import torch

from bitgrain.errors import NoKernelError, RequestError
from bitgrain.kernels import registry, selftest
from bitgrain.kernels.base import ExpertsProblem, Fidelity, LinearProblem, Prepared, Refusal
from bitgrain.kernels.reference.experts import ReferenceExperts
from bitgrain.kernels.reference.linear import ReferenceLinear
from bitgrain.kernels.selection import Policy, refuse_linears, select, select_experts
from bitgrain.platforms.base import Platform
from bitgrain.weights import NO_ACTIVATION, WeightSpec

SPEC = WeightSpec("int_affine", "uint4", 4, "group", 32, zero="constant", scale_dtype="float16")
PROBLEM = LinearProblem(SPEC, NO_ACTIVATION, 64, 64, "float32")


class FakeKernel(ReferenceLinear):
    """The reference under another name, with chosen answers."""

    def __init__(self, name, rank, fidelity=Fidelity.EXACT, refuses="", wrong=0.0, crashes=False):
        self.name, self.rank, self._fidelity, self._refuses, self._wrong, self._crashes = name, rank, fidelity, refuses, wrong, crashes

    def fidelity(self, problem):
        return self._fidelity

    def refusal(self, problem):
        return Refusal(self._refuses) if self._refuses else None

    def apply(self, x, prepared: Prepared, bias):
        if self._crashes:
            raise RuntimeError("illegal step")
        return super().apply(x, prepared, bias) * (1 + self._wrong)


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    """Installs kernels for the platform "toy"; the floor stays."""
    monkeypatch.setenv("BITGRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(selftest, "_results", {})
    monkeypatch.setattr(selftest, "target", lambda key: Platform(key, "cpu", frozenset(), 1, 1 << 30))
    selftest._stored.cache_clear()

    def install(*found):
        entries = [("linear", "toy", k) for k in found] + [("linear", registry.ANY_PLATFORM, ReferenceLinear())]
        monkeypatch.setattr(registry, "kernel_entries", lambda: tuple(entries))

    yield install
    selftest._stored.cache_clear()


def reasons(selection):
    return {c.name: c.reason for c in selection.candidates}


def test_highest_rank_wins_and_every_other_candidate_has_a_reason(kernels):
    kernels(FakeKernel("toy.slow", 1), FakeKernel("toy.fast", 9), FakeKernel("toy.picky", 20, refuses="only on Sundays"))
    chosen = select(PROBLEM, "toy", Policy())
    assert chosen.kernel.name == "toy.fast"
    assert reasons(chosen) == {
        "toy.picky": "only on Sundays",
        "toy.fast": "",
        "toy.slow": "works, but toy.fast ranks higher",
        "reference.linear": "works, but toy.fast ranks higher",
    }


def test_floor_serves_platforms_without_kernels(kernels):
    kernels()
    assert select(PROBLEM, "elsewhere", Policy()).kernel.name == "reference.linear"


def test_forced_kernel_is_used_or_refused_never_replaced(kernels):
    kernels(FakeKernel("toy.fast", 9), FakeKernel("toy.picky", 20, refuses="only on Sundays"))
    assert select(PROBLEM, "toy", Policy(force={"linear": "reference.linear"})).kernel.name == "reference.linear"
    with pytest.raises(NoKernelError, match="only on Sundays"):
        select(PROBLEM, "toy", Policy(force={"linear": "toy.picky"}))


def test_forbidden_kernels_and_backends_are_not_used(kernels):
    kernels(FakeKernel("toy.fast", 9), FakeKernel("toy.slow", 1))
    assert select(PROBLEM, "toy", Policy(forbid=frozenset({"toy.fast"}))).kernel.name == "toy.slow"
    assert select(PROBLEM, "toy", Policy(forbid=frozenset({"toy"}))).kernel.name == "reference.linear"
    with pytest.raises(NoKernelError, match="forbidden"):
        select(PROBLEM, "toy", Policy(forbid=frozenset({"toy", "reference"})))


def test_require_native_refuses_the_floor_and_emulation(kernels):
    kernels(FakeKernel("toy.emulating", 9, Fidelity.EMULATED))
    with pytest.raises(NoKernelError, match=r"emulated(.|\n)*reference floor"):
        select(PROBLEM, "toy", Policy(require="native"))


def test_approximate_kernels_need_the_users_word(kernels):
    kernels(FakeKernel("toy.rough", 9, Fidelity.APPROXIMATE))
    exact = select(PROBLEM, "toy", Policy())
    assert exact.kernel.name == "reference.linear" and "--fidelity fast" in reasons(exact)["toy.rough"]
    assert select(PROBLEM, "toy", Policy(fidelity="fast")).kernel.name == "toy.rough"


@pytest.mark.parametrize(
    "policy",
    [Policy(fidelity="quick"), Policy(require="speed"), Policy(forbid=frozenset({"nothing.like_it"})), Policy(force={"linear": "x"}), Policy(force={"x": "reference.linear"})],
    ids=["fidelity", "require", "forbid", "kernel", "operation"],
)
def test_unknown_names_in_a_policy_are_refused_with_the_known_ones(policy):
    with pytest.raises(RequestError, match="one of"):
        policy.check("cpu")


def test_wrong_kernel_fails_its_self_test_and_is_passed_over(kernels):
    kernels(FakeKernel("toy.wrong", 9, wrong=0.01))
    chosen = select(PROBLEM, "toy", Policy())
    assert chosen.kernel.name == "reference.linear" and "self-test differs" in reasons(chosen)["toy.wrong"]
    assert select(PROBLEM, "toy", Policy(self_test=False)).kernel.name == "toy.wrong"


def test_crashing_kernel_fails_its_self_test(kernels):
    kernels(FakeKernel("toy.crash", 9, crashes=True))
    assert "RuntimeError: illegal step" in reasons(select(PROBLEM, "toy", Policy()))["toy.crash"]


def test_self_test_is_remembered_on_disk_and_can_be_switched_off(kernels, monkeypatch, tmp_path):
    broken = FakeKernel("toy.wrong", 9, wrong=0.01)
    kernels(broken)
    select(PROBLEM, "toy", Policy())
    stored = json.loads((tmp_path / "selftest.json").read_text())
    assert any("differs" in v for v in stored.values())
    monkeypatch.setattr(selftest, "_results", {})
    selftest._stored.cache_clear()
    broken._wrong = 0.0
    assert select(PROBLEM, "toy", Policy()).kernel.name == "reference.linear"
    monkeypatch.setenv("BITGRAIN_SELFTEST", "0")
    assert select(PROBLEM, "toy", Policy()).kernel.name == "toy.wrong"


class FakeExperts(ReferenceExperts):
    """The reference of experts under another name, with chosen answers."""

    def __init__(self, name, rank, refuses="", wrong=0.0):
        self.name, self.rank, self._refuses, self._wrong = name, rank, refuses, wrong

    def refusal(self, problem):
        return Refusal(self._refuses) if self._refuses else None

    def apply(self, x, weight, chosen, prepared):
        return super().apply(x, weight, chosen, prepared) * (1 + self._wrong)


EXPERTS = ExpertsProblem(SPEC, SPEC, NO_ACTIVATION, NO_ACTIVATION, 8, 64, 32, "silu", False, "float32")


@pytest.fixture
def both(kernels, monkeypatch):
    """Installs (linear kernels, kernels of experts) for "toy"; both floors stay."""

    def install(linears, experts):
        entries = [("linear", "toy", k) for k in linears] + [("experts", "toy", k) for k in experts]
        entries += [("linear", registry.ANY_PLATFORM, ReferenceLinear()), ("experts", registry.ANY_PLATFORM, ReferenceExperts())]
        monkeypatch.setattr(registry, "kernel_entries", lambda: tuple(entries))

    return install


def test_wrong_kernel_of_experts_fails_its_self_test(both):
    both([], [FakeExperts("toy.wrong", 9, wrong=0.01), FakeExperts("toy.right", 5)])
    chosen = select(EXPERTS, "toy", Policy())
    assert chosen.kernel.name == "toy.right" and "self-test differs" in reasons(chosen)["toy.wrong"]
    both([], [FakeExperts("toy.right", 5)])
    assert select(replace(EXPERTS, join="of another library"), "toy", Policy()).kernel.name == "toy.right"  # no self-test can be made


def test_experts_run_as_linear_modules_where_only_the_floor_takes_them_together(both):
    both([FakeKernel("toy.fast", 9)], [FakeExperts("toy.picky", 20, refuses="only on Sundays")])
    chosen, why = select_experts(EXPERTS, "toy", Policy())
    assert chosen is None and why == "only the floor takes the experts together (toy.picky: only on Sundays)"
    # a request is honoured or refused
    assert select_experts(EXPERTS, "toy", Policy(force={"experts": "reference.experts"}))[0].kernel.name == "reference.experts"
    with pytest.raises(NoKernelError, match="only on Sundays"):
        select_experts(EXPERTS, "toy", Policy(force={"experts": "toy.picky"}))
    with pytest.raises(NoKernelError, match="run as linear modules"):
        refuse_linears("layer.experts", why, Policy(force={"experts": "toy.picky"}))
    refuse_linears("layer.experts", why, Policy(force={"linear": "toy.fast"}))


def test_experts_run_together_wherever_linear_kernels_are_no_better(both):
    both([], [])
    assert select_experts(EXPERTS, "toy", Policy())[0].kernel.name == "reference.experts"
    both([FakeKernel("toy.fast", 9)], [FakeExperts("toy.experts", 5)])
    assert select_experts(EXPERTS, "toy", Policy())[0].kernel.name == "toy.experts"
    both([FakeKernel("toy.emulating", 9, Fidelity.EMULATED)], [])
    with pytest.raises(NoKernelError, match="reference floor"):
        select_experts(EXPERTS, "toy", Policy(require="native"))
    both([FakeKernel("toy.fast", 9)], [])
    assert select_experts(EXPERTS, "toy", Policy(require="native"))[0] is None


def test_native_kernels_pass_their_own_self_test():
    for entry_spec, act in ((SPEC, NO_ACTIVATION),):
        for kernel in registry.candidates("linear", "cpu"):
            problem = LinearProblem(entry_spec, act, 64, 64, "bfloat16")
            if kernel.refusal(problem) is None and kernel.rank:
                assert selftest._run(kernel, problem) == ""
    assert torch.get_num_threads() >= 1
