"""Experts of the NPU through the model of its grouped product: against the definition, and what they refuse.  Not run on hardware."""

from dataclasses import replace

import pytest
import torch

from bitgrain.conformance.grid import float8, int_affine
from bitgrain.conformance.tolerances import allowed
from bitgrain.kernels.base import ExpertsProblem, Fidelity
from bitgrain.kernels.npu import contract_grouped, grouped_products
from bitgrain.kernels.npu.experts import NpuExperts, sum_by_expert
from bitgrain.kernels.reference.experts import ReferenceExperts
from bitgrain.kernels.samples import join_of, sample_expert, sample_experts, sample_routing
from bitgrain.kernels.selection import Policy, select, select_experts
from bitgrain.weights import NO_ACTIVATION, ActivationSpec

KERNEL, FLOOR, COUNT = NpuExperts("npu"), ReferenceExperts(), 5
TOKEN, TOKEN_TOP = ActivationSpec("int8", "token"), ActivationSpec("int8", "token", top=127.0)
STATIC = ActivationSpec("int8", "tensor", dynamic=False)


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch):
    monkeypatch.setenv("BITGRAIN_PLATFORM", "npu@host")


def problem_of(weight, activation, hidden, size, dtype="float16", join="silu", biased=False, down=None, down_activation=None):
    second = activation if down_activation is None else down_activation
    return ExpertsProblem(weight, down or weight, activation.without_values(), second.without_values(), COUNT, hidden, size, join, biased, dtype)


CASES = {
    # W4A16: per group and per row, with and without zero points, sizes that fill no word and no group
    "int4-g32": problem_of(int_affine(4, "group", 32), NO_ACTIVATION, 96, 64),
    "int4-g32-asym-bias": problem_of(int_affine(4, "group", 32, "integer", scale="bfloat16"), NO_ACTIVATION, 72, 40, "bfloat16", biased=True),
    "int4-g64-short-last": problem_of(int_affine(4, "group", 64, "integer"), NO_ACTIVATION, 100, 35, biased=True),
    "int2-g32-float-zero": problem_of(int_affine(2, "group", 32, "float", scale="float32"), NO_ACTIVATION, 64, 96, "bfloat16"),
    "int4-channel-odd": problem_of(int_affine(4, "channel", scale="float32"), NO_ACTIVATION, 33, 19, biased=True, join="gelu_new"),
    # W8A16, and two widths
    "int8-channel": problem_of(int_affine(8, "channel"), NO_ACTIVATION, 40, 24),
    "int8-tensor-bias": problem_of(int_affine(8, "tensor", scale="bfloat16"), NO_ACTIVATION, 40, 24, "bfloat16", biased=True),
    "int3-down-int8": problem_of(int_affine(3, "group", 32), NO_ACTIVATION, 64, 33, down=int_affine(8, "channel")),
    # W8A8 and W4A8
    "int8-token": problem_of(int_affine(8, "channel"), TOKEN_TOP, 70, 35, "bfloat16"),
    "int8-token-float32": problem_of(int_affine(8, "channel"), TOKEN, 33, 33, "float32", "gelu_new", biased=True),
    "int8-token-asym": problem_of(int_affine(8, "channel"), replace(TOKEN, symmetric=False), 40, 24, "float32"),
    "int4-int8": problem_of(int_affine(4, "channel"), TOKEN_TOP, 64, 40, "float16", "clamped(1.702, 7)", biased=True),
    "int8-down-16-bit": problem_of(int_affine(8, "channel"), TOKEN_TOP, 64, 32, "bfloat16", down=int_affine(4, "group", 32), down_activation=NO_ACTIVATION),
}


def check(problem, prepared, floor, rows, per_token=2):
    """Against the floor, whose values between the products are rounded where the kernel's are."""
    dtype = getattr(torch, problem.dtype)
    x = torch.randn(rows, problem.hidden, generator=torch.Generator().manual_seed(rows)).to(dtype)
    weight, chosen = sample_routing(rows, problem.count, per_token)
    got, want = (kernel.apply(x, weight.to(dtype), chosen, own) for kernel, own in ((KERNEL, prepared), (FLOOR, floor)))
    assert got.dtype == dtype and got.shape == x.shape
    worst = ((got.double() - want.double()).abs().amax(1) / want.double().abs().amax(1)).max().item()
    # two products and a sum; where a value between them is quantized, one that falls on the other side of a half counts
    room = 6 * allowed(problem.dtype, "exact") + (0 if problem.down_activation.is_none else 1 / 127)
    assert worst <= room, f"{problem.describe()}, M = {rows}: {worst:.2g}"


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_definition(case):
    problem = CASES[case]
    assert KERNEL.refusal(problem) is None
    prepared, floor = sample_experts(KERNEL, problem), sample_experts(FLOOR, problem)
    for rows in (1, 4, 37):
        check(problem, prepared, floor, rows)


@pytest.mark.parametrize("case", ["int4-g32-asym-bias", "int8-token-float32"])
def test_lists_longer_than_one_call_takes_are_split(monkeypatch, case):
    for module in (grouped_products, contract_grouped):
        monkeypatch.setattr(module, "LONGEST_LIST", 2)
    problem = CASES[case]
    prepared, floor = sample_experts(KERNEL, problem), sample_experts(FLOOR, problem)
    for rows in (1, 9):
        check(problem, prepared, floor, rows)


@pytest.mark.parametrize("activation", [STATIC, replace(STATIC, symmetric=False)], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_expert_quantizes_its_input_with_its_own_stored_values(activation, dtype):
    problem = replace(problem_of(int_affine(8, "channel"), activation, 40, 24, dtype), count=3)
    experts = []
    for index in range(3):
        gate_up, down, _, _, bias, down_bias = sample_expert(problem, index)
        zero = 0 if activation.symmetric else 5 - 4 * index
        first, second = (replace(activation, scale=scale, zero=zero) for scale in (0.02 * 4**index, 0.003 * 2**index))
        experts.append((gate_up, down, first, second, bias, down_bias))
    check(problem, *(k.assemble([k.prepare(*e) for e in experts], join_of(problem)) for k in (KERNEL, FLOOR)), 6)


@pytest.mark.parametrize("case", ["int4-g32", "int8-token", "int8-down-16-bit"])
def test_rows_do_not_depend_on_each_other_and_nobody_adds_nothing(case):
    problem = CASES[case]
    dtype, prepared = getattr(torch, problem.dtype), sample_experts(KERNEL, problem)
    x = torch.randn(6, problem.hidden, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight, chosen = sample_routing(6, COUNT, 3)
    weight = weight.to(dtype)
    chosen[1, 0], chosen[2] = -1, -1
    whole = KERNEL.apply(x, weight, chosen, prepared)
    assert not whole[2].any() and whole[[0, 1, 3]].any(1).all()
    for row in range(6):
        one = slice(row, row + 1)
        assert torch.equal(KERNEL.apply(x[one], weight[one], chosen[one], prepared), whole[one])
    assert torch.equal(KERNEL.apply(x[1:2], weight[1:2, 1:], chosen[1:2, 1:], prepared), whole[1:2])
    assert KERNEL.apply(x[:0], weight[:0], chosen[:0], prepared).shape == (0, problem.hidden)


def test_one_expert_alone():
    problem = replace(CASES["int8-channel"], count=1)
    check(problem, sample_experts(KERNEL, problem), sample_experts(FLOOR, problem), 3, per_token=1)


def test_terms_add_up_in_the_order_of_experts():
    parts = torch.tensor([[[1.0], [256.0], [-256.0]]], dtype=torch.bfloat16)
    ones = torch.ones(1, 3)
    assert sum_by_expert(parts, ones, torch.tensor([[2, 0, 1]])).item() == 1  # (256 - 256) + 1
    assert sum_by_expert(parts, ones, torch.tensor([[0, 1, 2]])).item() == 0  # 257 is rounded to 256
    assert sum_by_expert(parts, ones, torch.tensor([[0, 1, -1]])).item() == 256


def test_fidelity_says_what_the_products_do():
    assert KERNEL.fidelity(CASES["int8-token"]) is Fidelity.NATIVE
    assert KERNEL.fidelity(CASES["int4-g32"]) is Fidelity.APPROXIMATE
    assert KERNEL.fidelity(CASES["int8-down-16-bit"]) is Fidelity.APPROXIMATE


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (problem_of(int_affine(4, "group", 32, index=True), NO_ACTIVATION, 64, 32), "act-order"),
        (problem_of(int_affine(8, "group", 32), NO_ACTIVATION, 64, 64), "groups of columns for weights of up to 4 bits"),
        (problem_of(int_affine(4, "group", 24), NO_ACTIVATION, 96, 48), "multiples of 32 columns"),
        (problem_of(int_affine(4, "group", 32), NO_ACTIVATION, 64, 32, "float32"), "float16 and bfloat16"),
        (problem_of(int_affine(8, "channel"), ActivationSpec("int8", "tensor"), 64, 32), "a range of the whole input"),
        (problem_of(int_affine(8, "channel"), ActivationSpec("int8", "group", group_size=32), 64, 32), "per token or for all"),
        (problem_of(int_affine(8, "group", 32), TOKEN, 64, 64), "a scale per row or for all"),
        (problem_of(float8("fp8_e4m3fn", "channel"), NO_ACTIVATION, 64, 32), "not float ones"),
        (problem_of(int_affine(4, "group", 32), NO_ACTIVATION, 64, 64, down=float8("fp8_e4m3fn", "channel")), "down: "),
    ],
    ids=lambda v: v.describe().replace(" ", "-") if hasattr(v, "describe") else "",
)
def test_what_it_cannot_do_is_refused_with_the_reason(problem, reason):
    assert reason in KERNEL.refusal(problem).reason


def test_selection_takes_it_and_says_how_it_was_tested():
    found, _ = select_experts(CASES["int8-token"], "npu", Policy())
    assert found.kernel.name == "npu.experts" and found.as_dict()["proof"] == "contract-tested; not run on hardware"
    assert select(CASES["int4-g32"], "npu", Policy("fast")).kernel.name == "npu.experts"
    assert select(CASES["int4-g32"], "npu", Policy()).kernel.name == "reference.experts"
