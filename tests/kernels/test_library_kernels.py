"""Kernels over torch's and installed packages' operators, against models of the operators' contracts: not run on hardware."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from bitgrain.conformance.cases import Depth, cases, thinned
from bitgrain.conformance.checks import check
from bitgrain.conformance.grid import float8, int_affine
from bitgrain.conformance.tolerances import allowed
from bitgrain.errors import BadValueError
from bitgrain.kernels.base import Fidelity, LinearProblem
from bitgrain.kernels.cuda import contracts as cuda_contracts
from bitgrain.kernels.cuda import marlin
from bitgrain.kernels.registry import kernel_entries
from bitgrain.kernels.selection import Policy, select
from bitgrain.kernels.torch_library import block_scaled, contracts, dense
from bitgrain.kernels.torch_library.block_scaled import BlockScaledLinear
from bitgrain.kernels.torch_library.dense import DenseLinear
from bitgrain.kernels.torch_library.float8 import Float8Linear, halved
from bitgrain.kernels.torch_library.int8 import Int8Linear
from bitgrain.kernels.torch_library.int8_weights import Int8WeightLinear
from bitgrain.kernels.xpu import contracts as xpu_contracts
from bitgrain.numerics.small_floats import SMALL_FLOATS, decode_table
from bitgrain.platforms import probe
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, BlockFloatWeight, WeightSpec
from bitgrain.weights.block_float import block_float_spec
from bitgrain.weights.synthetic import sample_weight

SIMULATED = ("cuda:sm75@host", "cuda:sm90@host", "cuda:sm100@host", "hip:gfx942@host", "hip:gfx950@host", "xpu@host")
NAMES = ("torch.dense", "torch.fp8", "torch.block_scaled", "torch.int8", "torch.int4_weights", "torch.int8_weights", "cuda.marlin", "xpu.int4_weights")
DENSE = WeightSpec("dense", "bfloat16", 16)
FP8 = ActivationSpec("fp8_e4m3fn", "token")
NVFP4 = ActivationSpec("fp4_e2m1", "group", 16, scale_type="e4m3", second_scale="static", second=0.002)
INT8 = ActivationSpec("int8", "token")


def kernels_of(key):
    return [kernel for operation, platform, kernel in kernel_entries() if operation == "linear" and platform == key and kernel.name in NAMES]


@cache
def grid():
    """The linear cases of kinds that some kernel here takes."""
    return [case for case in cases("linear", "cuda") if case.problem.weight.kind in ("dense", "int_affine", "float", "block_float")]


def inside(kernel):
    """The cases that a kernel takes."""
    taken = {problem: kernel.refusal(problem) is None for problem in {case.problem for case in grid()}}
    return [case for case in grid() if taken[case.problem]]


@pytest.fixture
def simulate(monkeypatch):
    return lambda text: monkeypatch.setenv("BITGRAIN_PLATFORM", text)


def problem(spec, activation, n=64, k=128, dtype="bfloat16"):
    return LinearProblem(spec, activation.without_values(), n, k, dtype)


def run(kernel, spec, activation, n=64, k=128, m=3, dtype="bfloat16", bias=True, weight=None):
    """(worst error relative to the largest entry of a row, y): of the definition in float64."""
    weight = weight or sample_weight(spec, n, k)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(getattr(torch, dtype))
    b = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(x.dtype) if bias else None
    y = kernel.apply(x, kernel.prepare(weight, activation), b)
    want = activation.fake_quantize(x).double() @ weight.dequantize().double().T + (0 if b is None else b.double())
    assert y.dtype is x.dtype and y.shape == want.shape
    return ((y.double() - want).abs().amax(1) / want.abs().amax(1)).max().item() if m else 0.0, y


@pytest.mark.parametrize("text", SIMULATED)
def test_every_kernel_agrees_with_the_definition_on_a_simulated_platform(text, simulate):
    simulate(text)
    key = text.partition("@")[0].partition(":")[0]
    taken = {}
    for kernel in kernels_of(key):
        # int8 takes hundreds: one of each weight is enough for what zero points and rows are tested for below
        outcomes = [(case, check(kernel, case, "cpu")) for case in thinned(inside(kernel), Depth.SLICE if kernel.name == "torch.int8" else Depth.QUICK)]
        assert not [f"{kernel.name}: {case.describe()}: {outcome.problem}" for case, outcome in outcomes if outcome.problem]
        taken[kernel.name] = len(outcomes)
    expected = {
        "cuda:sm75@host": {"torch.dense", "torch.int8", "torch.int8_weights"},
        "cuda:sm90@host": {"torch.dense", "torch.fp8", "torch.int8", "torch.int4_weights", "torch.int8_weights"},
        "cuda:sm100@host": {"torch.dense", "torch.fp8", "torch.block_scaled", "torch.int8", "torch.int4_weights", "torch.int8_weights"},
        "hip:gfx942@host": {"torch.dense", "torch.fp8", "torch.int8", "torch.int4_weights"},
        "hip:gfx950@host": {"torch.dense", "torch.fp8", "torch.int8", "torch.int4_weights"},
        "xpu@host": {"torch.dense", "torch.int8", "xpu.int4_weights"},
    }[text]
    assert {name for name, count in taken.items() if count} == expected


@pytest.mark.parametrize("text", ["cuda:sm100@host", "hip:gfx942@host", "xpu@host"])
def test_prepare_and_apply_ask_nothing_of_the_device_and_keep_to_it(text, simulate, monkeypatch):
    """On tensors without data, whose values nobody can read: the operators' own shape functions check the arguments."""
    simulate(text)
    monkeypatch.setattr("bitgrain.kernels.triton.availability.missing", lambda *arguments: "absent")  # its interpreter reads values
    key = text.partition("@")[0].partition(":")[0]
    asked = 0
    for kernel in [k for k in kernels_of(key) if k.name != "torch.int4_weights"]:  # whose shape function takes torch's fake tensors only
        for case in thinned([case for case in inside(kernel) if case.rows], Depth.SLICE):
            p = case.problem
            weight, x = sample_weight(p.weight, p.n, p.k), torch.randn(case.rows, p.k).to(getattr(torch, p.dtype))
            kernel.apply(x, kernel.prepare(weight, case.activation), None)  # fills the caches of tables
            if p.weight.element == "fp8_e4m3fn" and "gfx942" in text:
                continue  # looks for NaN codes, once, when it prepares
            if kernel.name == "xpu.int4_weights":
                continue  # looks at the range of zero points, once, when it prepares
            prepared = kernel.prepare(weight.map_tensors(lambda t: t.to("meta")), case.activation)
            y = kernel.apply(x.to("meta"), prepared, torch.empty(p.n, dtype=x.dtype, device="meta"))
            assert y.device.type == "meta" and y.shape == (case.rows, p.n) and y.dtype is x.dtype
            assert all(tensor.device.type == "meta" for tensor in prepared.tensors.values())
            asked += 1
    assert asked


def test_library_ranks_above_triton_where_it_fuses_the_scales(simulate):
    simulate("cuda@host")
    policy = Policy(self_test=False)
    assert select(problem(DENSE, NO_ACTIVATION), "cuda", policy).kernel.name == "torch.dense"
    assert select(problem(float8("fp8_e4m3fn", "channel"), FP8), "cuda", policy).kernel.name == "torch.fp8"
    rows = {c.name for c in select(problem(int_affine(8, "channel"), INT8), "cuda", policy).candidates}
    assert "torch.int8" in rows and next(k for k in kernels_of("cuda") if k.name == "torch.int8").rank < 40


@pytest.mark.parametrize("name", ["torch.int4_weights", "cuda.marlin", "xpu.int4_weights"])
def test_products_that_round_the_weights_need_fidelity_fast(name):
    kernel = next(k for key in ("cuda", "xpu") for k in kernels_of(key) if k.name == name)
    assert kernel.fidelity(problem(int_affine(4, "group", 32), NO_ACTIVATION)) is Fidelity.APPROXIMATE


def test_operator_that_is_not_registered_is_named(simulate, monkeypatch):
    simulate("cuda@host")
    without = replace(probe.target("cuda"), features=frozenset({"bf16", "fp16", "int8_dot", "fp8_dot"}))
    monkeypatch.setattr("bitgrain.kernels.torch_library.operators.target", lambda key: without)
    kernel = Int8Linear("cuda")
    assert "aten::_int_mm" in kernel.refusal(problem(int_affine(8, "channel"), INT8)).reason
    assert kernel.state() == "torch registers no aten::_int_mm for cuda"


# dense


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dense_forbids_sums_of_fewer_bits_and_restores_the_switches(dtype, simulate, monkeypatch):
    simulate("cuda@host")
    switches, seen, linear = torch.backends.cuda.matmul, {}, torch.nn.functional.linear
    names = [name for name, _ in dense._SWITCHES[dtype]]
    permissive = {"fp32_precision": "tf32"}
    before = {name: getattr(switches, name) for name in names}

    def spy(*arguments):
        seen.update({name: getattr(switches, name) for name in names})
        return linear(*arguments)

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    try:
        for name in names:
            setattr(switches, name, permissive.get(name, True))
        x = torch.randn(2, 128).to(dtype)
        DenseLinear("cuda").apply(x, DenseLinear("cuda").prepare(sample_weight(WeightSpec("dense", str(dtype)[6:], 16), 64, 128), NO_ACTIVATION), None)
        assert seen == {name: "ieee" if name == "fp32_precision" else False for name in names}
        assert all(getattr(switches, name) == permissive.get(name, True) for name in names)
    finally:
        for name, value in before.items():
            setattr(switches, name, value)


def test_dense_widens_and_never_narrows(simulate):
    simulate("cuda@host")
    kernel = DenseLinear("cuda")
    assert "would round" in kernel.refusal(problem(DENSE, NO_ACTIVATION, dtype="float16")).reason
    wide = WeightSpec("dense", "float32", 32)
    assert kernel.refusal(problem(wide, NO_ACTIVATION)) is None
    assert run(kernel, wide, NO_ACTIVATION)[0] <= allowed("bfloat16", "exact")


# int8


@pytest.mark.parametrize("m", [0, 1, 16, 17, 40])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int8_pads_rows_and_folds_zero_points_exactly(m, symmetric, simulate):
    simulate("cuda@host")
    kernel, activation = Int8Linear("cuda"), ActivationSpec("int8", "token", symmetric=symmetric)
    for zero in ("constant", "integer"):
        error, y = run(kernel, int_affine(8, "channel", zero=zero, scale="float32"), activation, 24, 72, m, "float32")
        assert error <= allowed("float32", "native") and y.shape == (m, 24)
    other = replace(sample_weight(int_affine(8, "channel", scale="float32"), 24, 72), zero=3)
    assert run(kernel, None, activation, 24, 72, m, "float32", weight=other)[0] <= allowed("float32", "native")


@pytest.mark.parametrize("m", [0, 2, 12])
@pytest.mark.parametrize("zero", [3, 128, 255])
def test_int8_weights_take_any_constant_zero_point(m, zero, simulate):
    simulate("cuda@host")
    weight = replace(sample_weight(int_affine(8, "channel"), 24, 72), zero=zero)
    for dtype in ("float32", "bfloat16"):
        assert run(Int8WeightLinear("cuda"), None, NO_ACTIVATION, 24, 72, m, dtype, weight=weight)[0] <= allowed(dtype, "exact")


def test_int8_row_alone_is_the_row_among_others(simulate):
    simulate("cuda@host")
    kernel, weight = Int8Linear("cuda"), sample_weight(int_affine(8, "channel"), 24, 72)
    prepared, x = kernel.prepare(weight, INT8), torch.randn(30, 72).bfloat16()
    assert torch.equal(kernel.apply(x, prepared, None)[:1], kernel.apply(x[:1], prepared, None))


@pytest.mark.parametrize(
    ("spec", "activation", "n", "k", "said"),
    [
        (int_affine(8, "group", 32), INT8, 64, 128, "one scale per channel"),
        (int_affine(8, "channel"), INT8, 37, 128, "multiples of 8"),
        (int_affine(8, "channel"), NO_ACTIVATION, 64, 128, "integer activations"),
        (int_affine(8, "channel"), ActivationSpec("int8", "token", outlier_threshold=2.0), 64, 128, "one scale per token"),
        (int_affine(8, "channel"), INT8, 64, 131072, "int32"),
        (int_affine(8, "channel", zero="float"), INT8, 64, 128, "integer zero points"),
    ],
)
def test_int8_refuses_what_the_operator_does_not_take(spec, activation, n, k, said, simulate):
    simulate("cuda@host")
    assert said in Int8Linear("cuda").refusal(problem(spec, activation, n, k)).reason


@pytest.mark.parametrize(("m", "n", "k"), [(16, 8, 16), (17, 9, 16), (17, 8, 12)])
def test_integer_contract_refuses_what_a_gpu_refuses(m, n, k):
    with pytest.raises(RuntimeError, match="contract"):
        contracts.int_mm(torch.zeros(m, k, dtype=torch.int8), torch.zeros(k, n, dtype=torch.int8))


# 8-bit floats


@pytest.mark.parametrize("text", ["cuda@host", "hip:gfx942@host", "hip:gfx950@host"])
@pytest.mark.parametrize("m", [0, 1, 33])
def test_fp8_scales_of_every_kind_agree_with_the_definition(text, m, simulate):
    simulate(text)
    kernel = Float8Linear(text.partition(":")[0].partition("@")[0])
    for granularity in ("tensor", "channel"):
        for activation in (FP8, ActivationSpec("fp8_e4m3fn", "tensor"), ActivationSpec("fp8_e4m3fn", "tensor", dynamic=False, scale=0.01)):
            for dtype in ("bfloat16", "float16"):
                assert run(kernel, float8("fp8_e4m3fn", granularity), activation, 48, 64, m, dtype)[0] <= allowed(dtype, "native")


def test_fp8_asks_for_full_accumulation(simulate, monkeypatch):
    simulate("cuda@host")
    asked, product = [], contracts.scaled_mm
    monkeypatch.setattr(contracts, "scaled_mm", lambda *a, **named: asked.append(named["use_fast_accum"]) or product(*a, **named))
    for granularity, dtype in (("tensor", "bfloat16"), ("channel", "bfloat16"), ("channel", "float16")):
        run(Float8Linear("cuda"), float8("fp8_e4m3fn", granularity), FP8, dtype=dtype)
    assert asked == [False] * 3


def test_fp8_codes_of_the_other_type_are_exactly_half():
    codes = torch.tensor([c for c in range(256) if c & 127 != 127], dtype=torch.uint8).view(2, -1)
    table = decode_table(SMALL_FLOATS["fp8_e4m3fn"])
    assert torch.equal(halved(codes.view(torch.float8_e4m3fn)).float() * 2, table[codes.long()].abs() * torch.where(codes >= 128, -1.0, 1.0))
    with pytest.raises(BadValueError, match="1 NaN"):
        halved(torch.tensor([[1, 255]], dtype=torch.uint8).view(torch.float8_e4m3fn))


def test_fp8_refuses_what_devices_do_not_multiply(simulate):
    spec = float8("fp8_e4m3fn", "channel")
    simulate("cuda:sm80@host")
    assert "does not multiply 8-bit floats" in Float8Linear("cuda").refusal(problem(spec, FP8)).reason
    simulate("cuda:sm90@host")
    kernel = Float8Linear("cuda")
    assert "float32" in kernel.refusal(problem(spec, FP8, dtype="float32")).reason
    assert "multiples of 16" in kernel.refusal(problem(spec, FP8, n=40)).reason
    assert "one scale per channel or tensor" in kernel.refusal(problem(float8("fp8_e4m3fn", "block", (128, 128)), FP8)).reason


def test_scaled_contract_refuses_what_a_gpu_refuses():
    a, b, one = torch.zeros(2, 32).to(torch.float8_e4m3fn), torch.zeros(16, 32).to(torch.float8_e4m3fn), torch.ones(())
    bias = torch.zeros(16)
    rows, channels = torch.ones(2, 1), torch.ones(1, 16)
    for change in (
        {"b": b.t().contiguous()}, {"bias": bias}, {"out_dtype": torch.bfloat16, "bias": bias}, {"scale_a": rows}, {"use_fast_accum": True},
        {"scale_a": rows, "scale_b": channels, "out_dtype": torch.float16}, {"a": a[:, :24], "b": b[:, :24].t()}, {"a": a.to(torch.float8_e5m2), "b": b.to(torch.float8_e5m2).t()},
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="contract"):
            contracts.scaled_mm(**{"a": a, "b": b.t(), "scale_a": one, "scale_b": one, "out_dtype": torch.float32, **change})
    assert contracts.scaled_mm(a, b.t(), rows, channels, out_dtype=torch.bfloat16).shape == (2, 16)


# blocks


def test_block_scales_stand_where_the_documented_formula_puts_them():
    rows, blocks = 256, 8
    scale = torch.arange(rows * blocks).view(rows, blocks)
    stored = scale.flatten()[contracts.block_scale_order(rows, blocks, scale.device)]
    tiles = scale.view(rows // 128, 4, 32, blocks // 4, 4).permute(0, 3, 2, 1, 4)
    assert torch.equal(stored, tiles.flatten())
    assert stored[1] == 1 and stored[4] == 32 * blocks and stored[16] == blocks and stored[512] == 4


@pytest.mark.parametrize("m", [0, 1, 5, 130])
def test_block_scaled_agrees_with_the_definition(m, simulate):
    simulate("cuda:sm100@host")
    kernel = BlockScaledLinear("cuda")
    mx = ActivationSpec("fp8_e4m3fn", "group", 32, scale_type="e8m0", exponent_rule="floor")
    divided = replace(NVFP4, second_divides=True, second=500.0)
    for spec, activation in (
        (block_float_spec("fp4_e2m1", 16, "e4m3", "tensor"), NVFP4), (block_float_spec("fp4_e2m1", 16, "e4m3", "channel"), NVFP4),
        (block_float_spec("fp4_e2m1", 16, "e4m3", "tensor"), divided), (block_float_spec("fp8_e4m3fn", 32, "e8m0"), mx),
    ):  # fmt: skip
        assert kernel.refusal(problem(spec, activation, 160, 96)) is None
        for dtype in ("bfloat16", "float16"):
            assert run(kernel, spec, activation, 160, 96, m, dtype)[0] <= allowed(dtype, "native")


def test_block_scaled_keeps_rows_of_zeros_at_zero(simulate):
    simulate("cuda:sm100@host")
    weight = sample_weight(block_float_spec("fp4_e2m1", 16, "e4m3", "tensor"), 64, 64)
    assert isinstance(weight, BlockFloatWeight)
    kernel = BlockScaledLinear("cuda")
    assert not kernel.apply(torch.zeros(3, 64).bfloat16(), kernel.prepare(weight, NVFP4), None).any()


def test_block_scaled_refuses_other_blocks_and_devices(simulate):
    spec = block_float_spec("fp4_e2m1", 16, "e4m3", "tensor")
    simulate("cuda:sm90@host")
    assert "blocks with scales" in BlockScaledLinear("cuda").refusal(problem(spec, NVFP4)).reason
    simulate("cuda:sm100@host")
    kernel = BlockScaledLinear("cuda")
    assert "blocks of the weight" in kernel.refusal(problem(spec, NO_ACTIVATION)).reason
    assert "fp4_e2m1 in blocks of 16" in kernel.refusal(problem(block_float_spec("fp4_e2m1", 32, "e8m0"), NVFP4)).reason
    assert "stored ones" in kernel.refusal(problem(spec, replace(NVFP4, second_scale="dynamic", second=None))).reason
    assert "multiples of 32" in kernel.refusal(problem(spec, NVFP4, n=48)).reason
    assert block_scaled.placed(torch.zeros(3, 5, dtype=torch.uint8)).numel() == 128 * 8


# Marlin-class products


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("spec", [int_affine(4, "group", 32), int_affine(4, "group", 128, scale="float32"), int_affine(4, "channel")], ids=lambda s: s.describe())
def test_marlin_layout_agrees_with_the_definition(dtype, spec):
    kernel = marlin.MarlinLinear("cuda")
    assert kernel._problem(problem(spec, NO_ACTIVATION, 192, 256, dtype)) == ""
    for m in (0, 1, 20):
        # weights are rounded to the dtype, which errors of one rounding of y do not hide
        assert run(kernel, spec, NO_ACTIVATION, 192, 256, m, dtype)[0] <= 2 * allowed(dtype, "exact")


def test_marlin_names_types_as_packages_do():
    assert cuda_contracts.UINT4_MIDDLE_8 == 1125899907892224


def test_marlin_refuses_without_a_package_and_off_its_domain(simulate, monkeypatch):
    kernel, spec = marlin.MarlinLinear("cuda"), int_affine(4, "group", 128)
    simulate("cuda@host")
    assert "devices that are present" in kernel.refusal(problem(spec, NO_ACTIVATION, 64, 256)).reason
    here = replace(probe.target("cuda"), state="present")
    monkeypatch.setattr(marlin, "target", lambda key: here)
    monkeypatch.setattr(marlin, "registered", lambda: None)
    assert "no installed package" in kernel.refusal(problem(spec, NO_ACTIVATION, 64, 256)).reason
    for other, n, k, said in ((int_affine(4, "group", 32, "integer"), 64, 128, "symmetric"), (spec, 48, 128, "multiple of 64"), (int_affine(4, "group", 12), 64, 128, "whole groups")):
        assert said in kernel.refusal(problem(other, NO_ACTIVATION, n, k)).reason


def test_marlin_calls_any_version_by_its_argument_names(simulate, monkeypatch):
    simulate("cuda@host")
    here = replace(probe.target("cuda"), state="present")
    monkeypatch.setattr(marlin, "target", lambda key: here)

    class Version:
        def __init__(self, arguments):
            self._schema = torch._C.parse_schema(f"other({arguments}) -> Tensor")

    older = Version("Tensor a, Tensor? c_or_none, Tensor b_q_weight, Tensor b_scales, Tensor? b_zeros_or_none, Tensor workspace, int b_q_type_id, SymInt size_m, SymInt size_n, SymInt size_k, bool is_k_full")
    monkeypatch.setattr(marlin, "registered", lambda: ("_C::older", older))
    assert marlin.MarlinLinear("cuda").refusal(problem(int_affine(4, "group", 128), NO_ACTIVATION, 64, 256)) is None
    named = marlin.arguments(older, torch.zeros(2, 256), {"codes": 1, "scale": 2, "workspace": 3}, 64, 256)
    assert named["b_q_type_id"] == cuda_contracts.UINT4_MIDDLE_8 and named["c_or_none"] is None and (named["size_m"], named["size_n"], named["size_k"]) == (2, 64, 256)
    newer = Version("Tensor a, Tensor b_q_weight, Tensor thread_map")
    monkeypatch.setattr(marlin, "registered", lambda: ("_C::marlin_gemm", newer))
    assert "thread_map" in marlin.MarlinLinear("cuda").refusal(problem(int_affine(4, "group", 128), NO_ACTIVATION, 64, 256)).reason


def test_marlin_is_found_in_the_registry_by_its_arguments():
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    try:
        tail = "Tensor a, Tensor b_q_weight, Tensor b_scales, Tensor workspace"
        library.define(f"moe_marlin_gemm({tail}, Tensor sorted_token_ids, int b_q_type_id) -> Tensor")
        library.define(f"fp8_marlin_gemm({tail}, int num_bits) -> Tensor")
        library.define(f"the_marlin_gemm({tail}, int b_q_type_id, SymInt size_m, SymInt size_n, SymInt size_k) -> Tensor")
        marlin.registered.cache_clear()
        assert marlin.registered()[0] == "sgl_kernel::the_marlin_gemm"
    finally:
        library._destroy()
        marlin.registered.cache_clear()
    assert marlin.registered() is None


def test_xpu_contract_refuses_what_the_device_refuses():
    words, scale, zero = torch.zeros(8, 8, dtype=torch.int32), torch.ones(2, 8).half(), torch.zeros(2, 8, dtype=torch.int8)
    x = torch.zeros(1, 64).half()
    assert xpu_contracts.weight_int4pack_mm_with_scales_and_zeros(x, words, 32, scale, zero).shape == (1, 8)
    for arguments in ((x, words, 16, scale, zero), (x, words, 32, scale.float(), zero), (x, words, 32, scale, zero.int()), (x, words.byte(), 32, scale, zero)):
        with pytest.raises(RuntimeError, match="contract"):
            xpu_contracts.weight_int4pack_mm_with_scales_and_zeros(*arguments)
