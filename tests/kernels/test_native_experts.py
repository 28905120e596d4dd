"""The native kernel of experts: every kind of weight, join, number of tokens, instruction set and number of threads; what it refuses."""

import math
from dataclasses import replace

import pytest
import torch

from bitgrain.conformance.grid import float8, int_affine
from bitgrain.errors import LayoutError, RequestError
from bitgrain.kernels.base import ExpertsProblem, Fidelity
from bitgrain.kernels.cpu import library
from bitgrain.kernels.cpu.experts import NativeExperts
from bitgrain.kernels.samples import join_of, sample_expert, sample_experts, sample_routing
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, WeightSpec
from bitgrain.weights.block_float import block_float_spec
from bitgrain.weights.super_block import super_block_spec

SETS = library.available_sets()
pytestmark = pytest.mark.skipif(not SETS, reason=library.missing() or "no instruction set")

KERNEL = NativeExperts()
COUNT, HIDDEN, SIZE = 6, 160, 96
TOKEN = ActivationSpec("int8", "token", top=127.0)
STATIC = ActivationSpec("int8", "tensor", dynamic=False, scale=0.03)
KINDS = {
    "int4 g32": (int_affine(4, "group", 32), NO_ACTIVATION),
    "int4 g32 asym": (int_affine(4, "group", 32, "integer"), NO_ACTIVATION),
    "int4 g12 float zero": (int_affine(4, "group", 12, "float"), NO_ACTIVATION),
    "int4 act-order": (int_affine(4, "group", 32, "integer", index=True), NO_ACTIVATION),
    "int4 channel": (int_affine(4, "channel"), NO_ACTIVATION),
    "int3 g32": (int_affine(3, "group", 32), NO_ACTIVATION),
    "int8 g32": (int_affine(8, "group", 32), NO_ACTIVATION),
    "int4, int8 token": (int_affine(4, "group", 32), TOKEN),
    "fp8 tensor": (float8("fp8_e4m3fn", "tensor"), NO_ACTIVATION),
    "fp8 channel, fp8 token": (float8("fp8_e4m3fn", "channel"), ActivationSpec("fp8_e4m3fn", "token")),
    "fp8 block, fp8 g32": (float8("fp8_e4m3fn", "block", (32, 32)), ActivationSpec("fp8_e4m3fn", "group", group_size=32)),
    "fp8 e5m2": (float8("fp8_e5m2", "channel"), NO_ACTIVATION),
    "w8a8 token": (int_affine(8, "channel"), TOKEN),
    "w8a8 token asym": (int_affine(8, "channel"), ActivationSpec("int8", "token", symmetric=False)),
    "w8a8 static": (int_affine(8, "channel"), STATIC),
    "w8a8 reciprocal": (int_affine(8, "channel"), replace(TOKEN, reciprocal=True)),
    "w8a8 tensor": (int_affine(8, "channel"), ActivationSpec("int8", "tensor")),
    "mxfp4": (block_float_spec("fp4_e2m1", 32, "e8m0"), NO_ACTIVATION),
    "mxfp4, mxfp4": (block_float_spec("fp4_e2m1", 32, "e8m0"), ActivationSpec("fp4_e2m1", "group", 32, scale_type="e8m0", exponent_rule="floor")),
    "mxfp8": (block_float_spec("fp8_e4m3fn", 32, "e8m0"), NO_ACTIVATION),
    "mxfp6": (block_float_spec("fp6_e3m2", 32, "e8m0"), NO_ACTIVATION),
    "nvfp4": (block_float_spec("fp4_e2m1", 16, "e4m3", "tensor"), NO_ACTIVATION),
    "blocks with minima": (super_block_spec("Q4_1"), NO_ACTIVATION),
    "bfloat16": (WeightSpec("dense", "bfloat16", 16), NO_ACTIVATION),
    "float16": (WeightSpec("dense", "float16", 16), NO_ACTIVATION),
    "float32": (WeightSpec("dense", "float32", 32), NO_ACTIVATION),
}
JOINS = ["silu", "clamped(1.702, 7)", "gelu", "gelu_new", "relu"]
# of the largest term of a row: two products, a join, a sum; and a value between two codes that went the other way
ALLOWED = {"float32": 2e-4, "bfloat16": 0.025, "float16": 0.004}
COARSE = {"none": 0.0, "int8": 0.01, "fp8_e4m3fn": 0.04, "fp4_e2m1": 0.25}


@pytest.fixture(params=SETS)
def instruction_set(request):
    before = library.instruction_set()
    library.choose_instruction_set(request.param)
    yield request.param
    library.choose_instruction_set(before)


def problem_of(kind, dtype="bfloat16", join="silu", biased=False, count=COUNT):
    spec, activation = KINDS[kind]
    return ExpertsProblem(spec, spec, activation.without_values(), activation.without_values(), count, HIDDEN, SIZE, join, biased, dtype)


def inputs(problem, tokens, per_token=2):
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens)).to(getattr(torch, problem.dtype))
    weight, chosen = sample_routing(tokens, problem.count, per_token)
    return x, weight.to(x.dtype), chosen


def definition(problem, x, weight, chosen):
    """float64 [M, hidden] and the largest term of each row, [M, 1]; gate, up and h rounded to x's dtype."""
    out, largest, join = torch.zeros(x.shape, dtype=torch.float64), torch.zeros(len(x), 1, dtype=torch.float64), join_of(problem)
    for index in range(problem.count):
        rows, places = (chosen == index).nonzero(as_tuple=True)
        if len(rows) == 0:
            continue
        gate_up, down, first, second, bias, down_bias = sample_expert(problem, index)
        halves = first.fake_quantize(x[rows]).double() @ gate_up.dequantize().double().T + (0 if bias is None else bias.double())
        h = join(*halves.to(x.dtype).chunk(2, -1))
        y = second.fake_quantize(h).double() @ down.dequantize().double().T + (0 if down_bias is None else down_bias.double())
        part = y * weight[rows, places, None].double()
        out[rows] += part
        largest[rows] = torch.maximum(largest[rows], part.abs().amax(1, keepdim=True))
    return out, largest


def check(problem, x, weight, chosen, prepared):
    got = KERNEL.apply(x, weight, chosen, prepared)
    assert got.dtype == x.dtype and got.shape == x.shape
    want, largest = definition(problem, x, weight, chosen)
    worst = ((got.double() - want).abs() / largest).max().item() if len(x) else 0.0
    assert worst <= ALLOWED[problem.dtype] + COARSE[problem.down_activation.element], f"{problem.describe()}, M = {len(x)}: {worst:.2g}"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_weight_agrees_with_the_definition(kind, instruction_set):
    place = list(KINDS).index(kind)
    dtype, join = ["bfloat16", "float32", "float16"][place % 3], JOINS[place % len(JOINS)]
    problem = problem_of(kind, dtype, join, biased=place % 2 == 0)
    assert KERNEL.refusal(problem) is None
    prepared = sample_experts(KERNEL, problem)
    for tokens, per_token in ((0, 2), (1, 2), (3, 1), (17, 4), (130, 2)):
        if tokens < 100 or instruction_set != "portable":
            check(problem, *inputs(problem, tokens, per_token), prepared)


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_join_agrees_with_the_definition(join, dtype):
    problem = problem_of("int4 g32", dtype, join, biased=True)
    check(problem, *inputs(problem, 9, 3), sample_experts(KERNEL, problem))


@pytest.mark.parametrize("kind", ["int4 g32 asym", "int4 act-order", "w8a8 token", "fp8 block, fp8 g32", "nvfp4", "blocks with minima", "bfloat16", "w8a8 static"])
def test_results_depend_on_neither_threads_nor_other_rows(kind, instruction_set):
    problem = problem_of(kind, biased=True)
    x, weight, chosen = inputs(problem, 41)
    prepared = sample_experts(KERNEL, problem)
    whole = KERNEL.apply(x, weight, chosen, prepared)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(KERNEL.apply(x, weight, chosen, prepared), whole)
    finally:
        torch.set_num_threads(threads)
    for rows in (slice(0, 1), slice(40, 41), slice(3, 20)):
        assert torch.equal(KERNEL.apply(x[rows], weight[rows], chosen[rows], prepared), whole[rows])
    order = torch.randperm(41, generator=torch.Generator().manual_seed(1))
    assert torch.equal(KERNEL.apply(x[order], weight[order], chosen[order], prepared), whole[order])
    # experts add up in the order of their index, not of their place
    assert torch.equal(KERNEL.apply(x, weight.flip(1), chosen.flip(1), prepared), whole)


@pytest.mark.parametrize("kind", ["int4 g32", "w8a8 token", "fp8 channel, fp8 token"])
def test_a_nan_reaches_its_own_row_only(kind, instruction_set):
    problem = problem_of(kind)
    x, weight, chosen = inputs(problem, 12)
    prepared = sample_experts(KERNEL, problem)
    clean = KERNEL.apply(x, weight, chosen, prepared)
    x[5, 7] = math.nan
    y = KERNEL.apply(x, weight, chosen, prepared)
    others = torch.arange(12) != 5
    assert torch.equal(y[others], clean[others]) and y[5].isnan().all()


def test_stored_values_of_each_expert_are_its_own():
    spec = int_affine(8, "channel")
    problem = ExpertsProblem(spec, spec, STATIC.without_values(), STATIC.without_values(), 3, HIDDEN, SIZE, "silu", False, "float32")
    parts = [list(sample_expert(problem, index)) for index in range(3)]
    for index, part in enumerate(parts):
        part[2], part[3] = replace(STATIC, scale=0.02 * (index + 1)), replace(STATIC, scale=0.05 / (index + 1))
    prepared = KERNEL.assemble([KERNEL.prepare(*part) for part in parts], join_of(problem))
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(4))
    for index, (gate_up, down, first, second, _, _) in enumerate(parts):
        y = KERNEL.apply(x, torch.ones(5, 1), torch.full((5, 1), index), prepared)
        gate, up = (first.fake_quantize(x).double() @ gate_up.dequantize().double().T).float().chunk(2, -1)
        want = second.fake_quantize(torch.nn.functional.silu(gate) * up).double() @ down.dequantize().double().T
        assert torch.allclose(y.double(), want, rtol=0, atol=1e-4 * want.abs().max().item())


def test_reciprocals_of_scales_are_those_of_the_scheme():
    spec, x = int_affine(8, "channel"), torch.full((2, HIDDEN), 3.3)  # 5.5 scales of 0.6: divided and multiplied go to different codes
    results = []
    for reciprocal in (False, True):
        act = ActivationSpec("int8", "tensor", dynamic=False, scale=0.6, reciprocal=reciprocal)
        problem = ExpertsProblem(spec, spec, act.without_values(), NO_ACTIVATION, 1, HIDDEN, SIZE, "silu", False, "float32")
        gate_up, down, _, _, _, _ = sample_expert(problem, 0)
        prepared = KERNEL.assemble([KERNEL.prepare(gate_up, down, act, NO_ACTIVATION, None, None)], join_of(problem))
        results.append(KERNEL.apply(x, torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64), prepared))
        gate, up = (act.fake_quantize(x) @ gate_up.dequantize().T).chunk(2, -1)
        want = (torch.nn.functional.silu(gate) * up) @ down.dequantize().T
        assert torch.allclose(results[-1], want, rtol=0, atol=1e-4 * want.abs().max().item())
    assert not torch.allclose(results[0], results[1], rtol=0.01)


def test_places_without_expert_add_nothing_and_unknown_experts_are_refused():
    problem = problem_of("int4 g32", "float32")
    x, weight, chosen = inputs(problem, 4)
    prepared = sample_experts(KERNEL, problem)
    chosen[0, 1], chosen[2] = -1, -1
    y = KERNEL.apply(x, weight, chosen, prepared)
    assert not y[2].any()
    assert torch.equal(y[:1], KERNEL.apply(x[:1], weight[:1, :1], chosen[:1, :1], prepared))
    chosen[3, 0] = COUNT
    with pytest.raises(RequestError, match=f"expert {COUNT} was chosen"):
        KERNEL.apply(x, weight, chosen, prepared)


def test_weights_in_float32_are_taken_as_they_are():
    problem = problem_of("int4 g32")
    x, _, chosen = inputs(problem, 5)
    prepared = sample_experts(KERNEL, problem)
    weight = torch.full((5, 2), 1 / 3)
    want, largest = definition(problem, x, weight, chosen)
    assert ((KERNEL.apply(x, weight, chosen, prepared).double() - want).abs() <= 0.025 * largest).all()


def test_no_copy_of_the_weights_is_made():
    problem = problem_of("int4 g32")
    experts = [KERNEL.prepare(*sample_expert(problem, index)) for index in range(problem.count)]
    prepared = KERNEL.assemble(experts, join_of(problem))
    assert prepared.experts[2].gate_up is experts[2].gate_up
    weights = sum(w.nbytes for index in range(problem.count) for w in sample_expert(problem, index)[:2])
    assert prepared.nbytes <= 1.05 * weights
    assert all(table.numel() <= 16 * problem.count for table in prepared.meta.values() if isinstance(table, torch.Tensor))


def test_experts_of_two_layouts_are_no_problem_of_one_kernel():
    parts = [KERNEL.prepare(*sample_expert(problem_of(kind), 0)) for kind in ("int4 g32", "int8 g32")]
    with pytest.raises(LayoutError, match="2 layouts"):
        KERNEL.assemble(parts, join_of(problem_of("int4 g32")))


def test_fidelity_says_what_happens_to_activations():
    assert KERNEL.fidelity(problem_of("nvfp4")) is Fidelity.EXACT
    assert KERNEL.fidelity(problem_of("w8a8 static")) is Fidelity.NATIVE
    assert KERNEL.fidelity(problem_of("w8a8 tensor")) is Fidelity.EMULATED
    assert KERNEL.fidelity(problem_of("fp8 block, fp8 g32")) is Fidelity.EMULATED
    mixed = replace(problem_of("w8a8 token"), down=KINDS["int4 g32"][0], down_activation=NO_ACTIVATION)
    assert KERNEL.fidelity(mixed) is Fidelity.NATIVE


def test_refusals_name_the_part_and_its_weights():
    odd = replace(problem_of("int4 g32"), down=WeightSpec("trellis", "3inst", 2))
    assert "(down)" in KERNEL.refusal(odd).reason and "3inst" in KERNEL.refusal(odd).reason


def test_fake_tensors_carry_shapes_through_the_operators():
    from torch._subclasses.fake_tensor import FakeTensorMode

    from bitgrain.kernels.cpu.expert_operators import experts, experts_product

    tables = sample_experts(KERNEL, problem_of("int4 g32")).meta
    with FakeTensorMode() as mode:
        gate_up, down, sides = (mode.from_tensor(tables[name]) for name in ("gate_up", "down", "sides"))
        x, chosen = torch.empty(7, HIDDEN, dtype=torch.bfloat16), torch.zeros(7, 2, dtype=torch.int64)
        y = experts(x, torch.empty(7, 2), chosen, gate_up, down, sides, SIZE, 0, 0.0, 0.0)
        assert y.shape == (7, HIDDEN) and y.dtype == torch.bfloat16
        part = experts_product(x, torch.full((COUNT,), 7), gate_up, sides[0], None, 2 * SIZE, torch.float32)
    assert part.shape == (7, 2 * SIZE) and part.dtype == torch.float32
