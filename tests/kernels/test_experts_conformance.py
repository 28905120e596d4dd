"""Every registered kernel of experts over its declared domain against the definition in float64; rows by themselves; experts that nobody chose."""

from dataclasses import replace

import pytest
import torch

from bitgrain.conformance.grid import ACTIVATIONS, BLOCKED, DTYPES, WEIGHTS, float8, int_affine, steps_of
from bitgrain.conformance.tolerances import allowed_of_experts
from bitgrain.kernels.base import ExpertsProblem, Fidelity
from bitgrain.kernels.registry import kernel_entries
from bitgrain.kernels.samples import join_of, sample_expert, sample_experts, sample_routing
from bitgrain.weights import NO_ACTIVATION, ActivationSpec

EXPERTS = list(dict.fromkeys(kernel for operation, _, kernel in kernel_entries() if operation == "experts"))
JOINS = ["silu", "clamped(1.702, 7)", "gelu_new"]
# (M, per token, hidden, size): one token, few tokens with ragged sizes, many tokens
SHAPES = [(1, 2, 128, 64), (5, 3, 100, 36), (40, 2, 136, 72)]
COUNT = 5
FLOOR = next(kernel for kernel in EXPERTS if kernel.name == "reference.experts")


def problem_of(weight, activation, hidden, size, dtype="float32", join="silu", biased=False, down=None, down_activation=None):
    down_activation = activation if down_activation is None else down_activation
    return ExpertsProblem(weight, down or weight, activation.without_values(), down_activation.without_values(), COUNT, hidden, size, join, biased, dtype)


def sizes_of(weight, hidden, size):
    """(hidden, size) rounded up to what a weight comes in: each is N of one product and K of the other."""
    rows, columns = steps_of(weight)
    step = max(rows, columns)
    return -(-hidden // step) * step, -(-size // step) * step


def domain(kernel):
    """Problems of the grid that the kernel does not refuse, with their rows and experts per token."""
    for place, weight in enumerate([*WEIGHTS, *BLOCKED]):
        for turn, activation in enumerate(ACTIVATIONS):
            m, per_token, hidden, size = SHAPES[(place + turn) % len(SHAPES)]
            dtype, join = DTYPES[(place + turn) % len(DTYPES)], JOINS[turn % len(JOINS)]
            problem = problem_of(weight, activation, *sizes_of(weight, hidden, size), dtype, join, biased=place % 2 == 1)
            if kernel.refusal(problem) is None:
                yield problem, m, per_token


def definition(problem, x, weight, chosen):
    """float64 [M, hidden], and [M, hidden] of the magnitudes that were summed: expert by expert, rounded where modules round."""
    out, size = torch.zeros(*x.shape, dtype=torch.float64), torch.zeros(x.shape[0], 1, dtype=torch.float64)
    join = join_of(problem)
    for index in range(problem.count):
        rows, places = (chosen == index).nonzero(as_tuple=True)
        if len(rows) == 0:
            continue
        gate_up, down, first, second, bias, down_bias = sample_expert(problem, index)
        halves = (first.fake_quantize(x[rows]).double() @ gate_up.dequantize().double().T + (0 if bias is None else bias.double())).to(x.dtype)
        middle = join(*halves.chunk(2, -1))
        y = second.fake_quantize(middle).double() @ down.dequantize().double().T + (0 if down_bias is None else down_bias.double())
        part = y * weight[rows, places, None].double()
        out[rows] += part
        size[rows] = torch.maximum(size[rows], part.abs().amax(1, keepdim=True))
    return out, size


def check(kernel, problem, m, per_token):
    dtype = getattr(torch, problem.dtype)
    x = torch.randn(m, problem.hidden, generator=torch.Generator().manual_seed(m)).to(dtype)
    weight, chosen = sample_routing(m, problem.count, per_token)
    weight = weight.to(dtype)
    got = kernel.apply(x, weight, chosen, sample_experts(kernel, problem))
    assert got.dtype == dtype and got.shape == x.shape
    want, size = definition(problem, x, weight, chosen)
    worst = ((got.double() - want).abs() / size).amax(1)
    own, flipped = allowed_of_experts(problem, kernel.fidelity(problem).value)
    # a middle value between two codes may fall on the other side in few rows; each then differs by a part of a step
    strict = 1.0 if flipped == own else 0.0 if problem.dtype != "float32" else 0.75 if m > 1 else 0.0
    text = f"{problem.describe()}, M = {m}: {worst.max().item():.2g}"
    assert (worst <= flipped).all() and (worst <= own).double().mean() >= strict, text


@pytest.mark.parametrize("kernel", EXPERTS, ids=lambda k: k.name)
def test_kernel_agrees_with_the_definition_over_its_domain(kernel):
    cases = list(domain(kernel))
    # the floor runs linears by definition, which their own tests hold to it: every weight and every activation, not every pair;
    # kernels of devices that are not here take seconds for a case, and have tests of their own; native ones take every other pair
    step = len(ACTIVATIONS) + 1 if kernel is FLOOR else max(1, len(cases) // 3) if hasattr(kernel, "proof") else 2
    for case in cases[::step]:
        check(kernel, *case)
    if not cases:
        pytest.skip(f"{kernel.name} refuses everything here: {kernel.refusal(problem_of(WEIGHTS[0], NO_ACTIVATION, 64, 32)).reason}")


MIXED = [
    problem_of(int_affine(4, "group", 32), NO_ACTIVATION, 128, 64, "bfloat16", down=int_affine(8, "channel")),
    problem_of(float8("fp8_e4m3fn", "channel"), ActivationSpec("fp8_e4m3fn", "token"), 64, 96, "bfloat16", down_activation=NO_ACTIVATION),
    problem_of(int_affine(8, "channel"), ActivationSpec("int8", "token", top=127.0), 96, 40, "bfloat16", biased=True),
]


@pytest.mark.parametrize("problem", MIXED, ids=lambda p: p.describe().replace(" ", "-"))
@pytest.mark.parametrize("kernel", EXPERTS, ids=lambda k: k.name)
def test_gate_up_and_down_of_two_schemes_and_rows_by_themselves(kernel, problem):
    why = kernel.refusal(problem)
    if why is not None:
        pytest.skip(why.reason)
    check(kernel, problem, 7, 2)
    prepared = sample_experts(kernel, problem)
    x = torch.randn(9, problem.hidden, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight, chosen = sample_routing(9, COUNT, 2)
    whole = kernel.apply(x, weight.bfloat16(), chosen, prepared)
    assert torch.equal(kernel.apply(x, weight.bfloat16(), chosen, prepared), whole)
    for row in (0, 4, 8):
        one = slice(row, row + 1)
        assert torch.equal(kernel.apply(x[one], weight[one].bfloat16(), chosen[one], prepared), whole[one])


@pytest.mark.parametrize("kernel", EXPERTS, ids=lambda k: k.name)
def test_places_without_an_expert_add_nothing_and_no_rows_give_none(kernel):
    problem = next((p for p, _, _ in domain(kernel) if p.gate_up_activation.is_none), None)
    if problem is None:
        pytest.skip(f"{kernel.name} refuses everything here")
    dtype = getattr(torch, problem.dtype)
    prepared = sample_experts(kernel, problem)
    x = torch.randn(4, problem.hidden, generator=torch.Generator().manual_seed(2)).to(dtype)
    weight, chosen = sample_routing(4, COUNT, 2)
    chosen[1, 0], chosen[2] = -1, -1
    got = kernel.apply(x, weight.to(dtype), chosen, prepared)
    assert not got[2].any() and got[[0, 1, 3]].any(1).all()
    only = kernel.apply(x[1:2], weight[1:2, 1:].to(dtype), chosen[1:2, 1:], prepared)
    assert torch.allclose(got[1:2], only, rtol=0, atol=1e-6) if kernel is FLOOR else torch.equal(got[1:2], only)  # torch's sums depend on the number of rows
    assert kernel.apply(x[:0], weight[:0].to(dtype), chosen[:0], prepared).shape == (0, problem.hidden)
    wide = kernel.apply(x, weight, chosen, prepared)  # float32 weights of a 16-bit x
    assert wide.dtype == dtype and torch.allclose(wide, got, rtol=0.02, atol=0.02)


def test_floor_refuses_nothing_and_says_when_it_emulates():
    for weight in [*WEIGHTS, *BLOCKED]:
        for activation in ACTIVATIONS:
            problem = problem_of(weight, activation, 128, 64)
            assert FLOOR.refusal(problem) is None
            assert FLOOR.fidelity(problem) is (Fidelity.EXACT if activation.is_none else Fidelity.EMULATED)
    assert FLOOR.fidelity(replace(problem_of(WEIGHTS[0], NO_ACTIVATION, 128, 64), down_activation=ACTIVATIONS[1])) is Fidelity.EMULATED
