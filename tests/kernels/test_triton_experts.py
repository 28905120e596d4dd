"""Experts in Triton, on host tensors in its interpreter: interpreter only, not run on hardware."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from bitgrain.conformance.cases import Case, experts_problem
from bitgrain.conformance.checks import check
from bitgrain.conformance.grid import float8, int_affine
from bitgrain.errors import BadValueError
from bitgrain.kernels.base import Fidelity
from bitgrain.kernels.reference.experts import ReferenceExperts
from bitgrain.kernels.registry import candidates, kernel_entries
from bitgrain.kernels.samples import join_of, sample_expert, sample_experts, sample_routing
from bitgrain.kernels.selection import Policy, select
from bitgrain.kernels.triton import availability
from bitgrain.kernels.triton.experts import TritonExperts, add_up, sort_rows
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, FloatWeight
from bitgrain.weights.block_float import block_float_spec

KERNEL, FLOOR = TritonExperts("cuda"), ReferenceExperts()
INT8, INT8_TOP = ActivationSpec("int8", "token"), ActivationSpec("int8", "token", top=127.0)
FP8 = ActivationSpec("fp8_e4m3fn", "token")


def problem_of(weight, activation, hidden, size, *rest, **more):
    return experts_problem(weight, activation, (hidden, size), *rest, **more)


def interpreter() -> str:
    """Why these tests cannot run; empty when they can."""
    if availability.missing():
        return availability.missing()
    return "" if availability.interpreted() else "triton compiles for a device here: TRITON_INTERPRET is not 1"


needs_triton = pytest.mark.skipif(bool(interpreter()), reason=interpreter() or "present")

CASES = {
    # W4A16
    "int4-g32": problem_of(int_affine(4, "group", 32), NO_ACTIVATION, 72, 40),
    "int4-g12-asym-bias": problem_of(int_affine(4, "group", 12, "integer"), NO_ACTIVATION, 40, 29, "bfloat16", biased=True),
    "int4-g128-float-zero": problem_of(int_affine(4, "group", 128, "float"), NO_ACTIVATION, 130, 17, "float16"),
    "int4-tensor-odd": problem_of(int_affine(4, "tensor", scale="bfloat16"), NO_ACTIVATION, 33, 19, "bfloat16"),
    "int4-act-order": problem_of(int_affine(4, "group", 32, "integer", index=True), NO_ACTIVATION, 64, 40, "bfloat16", down=int_affine(5, "group", 1, "float")),
    "int3-down-int8": problem_of(int_affine(3, "group", 32), NO_ACTIVATION, 40, 33, down=int_affine(8, "channel")),
    "int8-asym": problem_of(int_affine(8, "group", 32, "integer"), NO_ACTIVATION, 40, 24, "bfloat16"),
    # W8A8
    "int8-token": problem_of(int_affine(8, "channel"), INT8, 70, 35, "bfloat16"),
    "int8-token-gelu": problem_of(int_affine(8, "channel"), INT8_TOP, 33, 33, "float32", "gelu_new", biased=True),
    "int4-int8-groups": problem_of(int_affine(4, "group", 32), INT8, 64, 40, "float16"),
    "int8-asym-weight-and-input": problem_of(int_affine(8, "channel", zero="integer"), ActivationSpec("int8", "token", symmetric=False), 40, 24),
    "int8-asym-token": problem_of(int_affine(8, "channel", zero="integer"), INT8, 40, 24, "bfloat16"),
    # FP8
    "fp8-tensor": problem_of(float8("fp8_e4m3fn", "tensor"), FP8, 40, 24, "bfloat16"),
    "fp8-channel-down-16-bit": problem_of(float8("fp8_e4m3fn", "channel"), FP8, 40, 24, "float16", down_activation=NO_ACTIVATION),
    "fp8-block": problem_of(float8("fp8_e4m3fn", "block", (16, 24)), NO_ACTIVATION, 50, 40),
    "fp8-block-groups": problem_of(float8("fp8_e4m3fn", "block", (128, 32)), ActivationSpec("fp8_e4m3fn", "group", group_size=32), 70, 40, "bfloat16"),
    "fp8-fnuz": problem_of(float8("fp8_e4m3fnuz", "channel"), NO_ACTIVATION, 40, 24, "float16"),
    "fp8-e5m2": problem_of(float8("fp8_e5m2", "channel"), NO_ACTIVATION, 40, 24, "float16"),
    # MX
    "mxfp4-clamped": problem_of(block_float_spec("fp4_e2m1", 32, "e8m0"), NO_ACTIVATION, 70, 41, "bfloat16", "clamped(1.702, 7)", biased=True),
    "mxfp4-mxfp4": problem_of(block_float_spec("fp4_e2m1", 32, "e8m0"), ActivationSpec("fp4_e2m1", "group", 32, scale_type="e8m0", exponent_rule="floor"), 64, 40),
    "mxfp8": problem_of(block_float_spec("fp8_e4m3fn", 32, "e8m0"), NO_ACTIVATION, 40, 24),
}


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_definition(case):
    assert KERNEL.refusal(CASES[case]) is None
    assert not check(KERNEL, Case(CASES[case], 4, options={"per token": 2}, seed=4), "cpu").problem


@needs_triton
def test_many_rows_of_one_expert_and_none_of_others():
    problem = CASES["int4-g32"]
    prepared, floor = sample_experts(KERNEL, problem), sample_experts(FLOOR, problem)
    x = torch.randn(37, problem.hidden, generator=torch.Generator().manual_seed(4))
    chosen = torch.full((37, 2), 3)
    chosen[:, 1] = torch.where(torch.arange(37) % 5 == 0, -1, 1)
    weight = torch.rand(37, 2, generator=torch.Generator().manual_seed(5))
    got, want = KERNEL.apply(x, weight, chosen, prepared), FLOOR.apply(x, weight, chosen, floor)
    assert torch.allclose(got, want, rtol=0, atol=1e-5 * want.abs().max().item())


@needs_triton
@pytest.mark.parametrize("element", ["int8", "fp8_e4m3fn"])
def test_each_expert_quantizes_its_input_with_its_own_stored_scale(element):
    weight = int_affine(8, "channel") if element == "int8" else float8("fp8_e4m3fn", "tensor")
    act = ActivationSpec(element, "tensor", dynamic=False)
    problem = replace(problem_of(weight, act, 40, 24), count=3)
    experts = []
    for index in range(problem.count):
        gate_up, down, _, _, bias, down_bias = sample_expert(problem, index)
        experts.append((gate_up, down, replace(act, scale=0.02 * 4**index), replace(act, scale=0.003 * 2**index), bias, down_bias))
    x, (routed, chosen) = torch.randn(5, 40, generator=torch.Generator().manual_seed(6)), sample_routing(5, 3, 2)
    got, want = (k.apply(x, routed, chosen, k.assemble([k.prepare(*e) for e in experts], join_of(problem))) for k in (KERNEL, FLOOR))
    assert torch.allclose(got, want, rtol=0, atol=2e-5 * want.abs().max().item())


@needs_triton
def test_experts_whose_data_differ_get_one_layout():
    """Groups of act-order of different lengths, as cuts along K leave them, and symmetric codes around different middles."""
    problem = replace(problem_of(int_affine(4, "group", 32, index=True), NO_ACTIVATION, 64, 48), count=3)
    experts = []
    for index in range(problem.count):
        gate_up, down, act, down_act, _, _ = sample_expert(problem, index)
        lengths = ([32, 32], [40, 24], [7, 57])[index]
        order = torch.repeat_interleave(torch.arange(2), torch.tensor(lengths))[torch.randperm(64, generator=torch.Generator().manual_seed(index))]
        gate_up = replace(gate_up, group_index=order.to(torch.int32), zero=8 + 500 * (index == 2))
        experts.append((gate_up, down, act, down_act, None, None))
    x, (routed, chosen) = torch.randn(5, 64, generator=torch.Generator().manual_seed(6)), sample_routing(5, 3, 2)
    got, want = (k.apply(x, routed, chosen, k.assemble([k.prepare(*e) for e in experts], join_of(problem))) for k in (KERNEL, FLOOR))
    assert torch.allclose(got, want, rtol=0, atol=2e-5 * want.abs().max().item())


def test_fidelity_says_what_the_products_are():
    assert KERNEL.fidelity(CASES["int4-g32"]) is Fidelity.EXACT
    assert KERNEL.fidelity(CASES["int8-token"]) is Fidelity.NATIVE
    assert KERNEL.fidelity(CASES["int8-asym-token"]) is Fidelity.NATIVE
    assert KERNEL.fidelity(CASES["fp8-tensor"]) is Fidelity.NATIVE
    assert KERNEL.fidelity(CASES["fp8-block"]) is Fidelity.EXACT
    assert KERNEL.fidelity(CASES["mxfp4-mxfp4"]) is Fidelity.EMULATED
    # gfx942 has the other 8-bit floats, which hold the same values halved; xe2 has none
    assert TritonExperts("hip").fidelity(CASES["fp8-tensor"]) is Fidelity.NATIVE
    assert TritonExperts("xpu").fidelity(CASES["fp8-tensor"]) is Fidelity.EMULATED


@needs_triton
@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (problem_of(int_affine(4, "group", 32, index=True), ActivationSpec("int8", "group", group_size=32), 64, 32), "act-order"),
        (problem_of(int_affine(8, "channel"), ActivationSpec("int8", "tensor"), 64, 32), "that of the whole input"),
        (problem_of(int_affine(8, "channel"), ActivationSpec("int8", "tensor", symmetric=False, dynamic=False), 64, 32), "stored zero points"),
        (problem_of(int_affine(8, "channel"), ActivationSpec("int8", "token", outlier_threshold=2.0), 64, 32), "stays as it is"),
        (problem_of(block_float_spec("fp4_e2m1", 16, "e4m3", "tensor"), NO_ACTIVATION, 64, 32), "one e8m0 scale"),
        (problem_of(int_affine(4, "group", 24), ActivationSpec("fp8_e4m3fn", "group", group_size=32), 96, 48), "divide each other"),
        (problem_of(int_affine(4, "group", 32), NO_ACTIVATION, 64, 32, down=block_float_spec("int8", 32, "e8m0")), "down: "),
    ],
    ids=lambda v: v.describe().replace(" ", "-") if hasattr(v, "describe") else "",
)  # fmt: skip
def test_what_it_cannot_do_is_refused_with_the_reason(problem, reason):
    assert reason in KERNEL.refusal(problem).reason


@needs_triton
def test_nan_codes_are_refused():
    weight = FloatWeight(torch.full((8, 8), float("nan")).to(torch.float8_e4m3fn), torch.ones(1, 1), (8, 8))
    with pytest.raises(BadValueError, match="NaN"):
        KERNEL.prepare(weight, weight, NO_ACTIVATION, NO_ACTIVATION, None, None)


@pytest.mark.parametrize("tokens", [1, 3, 40, 200])
def test_every_row_stands_in_one_tile_of_its_expert(tokens):
    chosen = torch.randint(-1, 7, (tokens, 3), generator=torch.Generator().manual_seed(tokens))
    rows, tile_expert, block = sort_rows(chosen, 7)
    assert rows.numel() == block * tile_expert.numel()
    for tile, expert in enumerate(tile_expert.tolist()):
        here = rows[tile * block : (tile + 1) * block]
        here = here[here >= 0]
        assert expert >= 7 or (chosen.flatten()[here] == expert).all()
    placed = rows[rows >= 0].sort().values
    # rows that name no expert may stand in tiles that no program runs
    assert torch.equal(placed, torch.arange(chosen.numel()))
    run = (tile_expert < 7).repeat_interleave(block) & (rows >= 0)
    assert torch.equal(rows[run].sort().values, (chosen.flatten() >= 0).nonzero()[:, 0])


def test_terms_add_up_in_the_order_of_their_experts():
    parts = torch.tensor([[[1.0], [2.0**-9], [2.0**-9]], [[2.0**-9], [2.0**-9], [1.0]]]).bfloat16()
    ones = torch.ones(2, 3).bfloat16()
    chosen = torch.tensor([[0, 1, 2], [0, 1, 2]])
    small_first = add_up(parts, ones, chosen)[:, 0].tolist()
    assert small_first == [1.0, (torch.tensor(2.0**-8) + 1).bfloat16().item()]
    assert torch.equal(add_up(parts.flip(1), ones, chosen.flip(1)), add_up(parts, ones, chosen))
    assert add_up(parts, ones, torch.full((2, 3), -1)).tolist() == [[0.0], [0.0]]


@needs_triton
def test_selection_says_that_it_was_not_run_on_hardware():
    selection = select(CASES["int4-g32"], "cuda", Policy(self_test=False))
    assert selection.kernel.name == "triton.experts" and selection.as_dict()["proof"] == availability.PROOF
    assert availability.PROOF in KERNEL.state()
    assert {p for o, p, k in kernel_entries() if k.name == "triton.experts"} == {"cuda", "hip", "xpu"}
    assert "triton.experts" not in [k.name for k in candidates("experts", "cpu")]


def test_triton_is_not_imported_before_it_is_asked_for():
    code = "import sys; from bitgrain.kernels.registry import kernel_entries; kernel_entries(); print([m for m in sys.modules if m.partition('.')[0] == 'triton'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "[]", result.stderr
