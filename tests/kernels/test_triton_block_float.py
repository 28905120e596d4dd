"""Linear modules of small floats in blocks, in Triton, against the float64 definition: interpreter only, not run on hardware."""

from dataclasses import replace

import pytest
import torch

from bitgrain.conformance.tolerances import allowed
from bitgrain.errors import BadValueError
from bitgrain.kernels.base import Fidelity, LinearProblem
from bitgrain.kernels.triton import availability, block_float_launch
from bitgrain.kernels.triton.block_float import TritonBlockFloat, multiplication, planes
from bitgrain.platforms import probe
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, BlockFloatWeight
from bitgrain.weights.block_float import ELEMENT_BITS, block_float_spec
from bitgrain.weights.synthetic import sample_activation, sample_weight

pytestmark = pytest.mark.skipif(bool(availability.missing("")), reason=availability.missing("") or "present")

MXFP4, MXFP8 = block_float_spec("fp4_e2m1", 32, "e8m0"), block_float_spec("fp8_e4m3fn", 32, "e8m0")
NVFP4 = block_float_spec("fp4_e2m1", 16, "e4m3", "tensor")
MX_INPUT = ActivationSpec("fp4_e2m1", "group", 32, scale_type="e8m0")
NV_INPUT = ActivationSpec("fp4_e2m1", "group", 16, scale_type="e4m3", second_scale="dynamic")
INT8, FP8 = ActivationSpec("int8", "token"), ActivationSpec("fp8_e4m3fn", "token")


@pytest.fixture(params=["cuda@host", "cuda:sm100@host"])
def platform(request):
    """Devices without, and with, products of scaled blocks."""
    with probe.counting_on(request.param):
        yield request.param


def kernel():
    return TritonBlockFloat("cuda")


def check(weight, activation, dtype, rows, bias=True, fidelity=None):
    """(result, x) of one product, which agrees with the definition."""
    activation = sample_activation(activation)
    n, k = weight.shape
    problem = LinearProblem(weight.spec, activation.without_values(), n, k, dtype)
    assert kernel().refusal(problem) is None and fidelity in (None, kernel().fidelity(problem))
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).to(getattr(torch, dtype))
    added = torch.randn(n, generator=torch.Generator().manual_seed(9)).to(x.dtype) if bias else None
    got = kernel().apply(x, kernel().prepare(weight, activation), added)
    want = activation.fake_quantize(x).double() @ weight.dequantize().double().T + (0 if added is None else added.double())
    assert got.dtype == x.dtype and got.shape == (rows, n)
    worst = ((got.double() - want).abs() / want.abs().amax(1, keepdim=True)).max().item()
    assert worst <= allowed(dtype, kernel().fidelity(problem).value), f"{problem.describe()}: {worst:.2g}"
    return got, x


SPECS = [
    *(block_float_spec(element, 32, "e8m0") for element in ELEMENT_BITS),
    *(block_float_spec("fp4_e2m1", 16, scale, second) for scale, second in (("e4m3", "tensor"), ("e4m3", "channel"), ("e4m3", "group"), ("e5m3", "none"))),
    block_float_spec("fp4_e2m1", 12, "e8m0"),
    block_float_spec("fp6_e3m2", 10, "e8m0"),  # blocks that begin inside of a byte
    block_float_spec("int8", 16, "e4m3"),  # values that 16-bit brain floats do not hold together with their scales
]


@pytest.mark.parametrize("index", range(len(SPECS)), ids=lambda i: SPECS[i].describe().replace(" ", "-"))
def test_float_inputs_are_exact(index):
    """One of the types for each; the conformance grid has all."""
    dtype = ("float16", "bfloat16", "float32")[index % 3]
    check(sample_weight(SPECS[index], 33, 98), NO_ACTIVATION, dtype, 2, fidelity=Fidelity.EXACT)


def test_many_rows_and_no_bias():
    check(sample_weight(MXFP4, 70, 66), NO_ACTIVATION, "bfloat16", 17, bias=False)


@pytest.mark.parametrize(
    ("spec", "dtype", "mode"),
    [
        (MXFP4, "bfloat16", 0), (MXFP4, "float16", 0), (NVFP4, "bfloat16", 0), (SPECS[-1], "float16", 0), (SPECS[-1], "bfloat16", 1), (SPECS[-2], "bfloat16", 0),
        (block_float_spec("fp4_e2m1", 10, "e4m3"), "float16", 0),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_scales_are_folded_where_the_type_holds_the_product(spec, dtype, mode):
    prepared = kernel().prepare(sample_weight(spec, 20, 80), NO_ACTIVATION)
    assert multiplication(prepared, getattr(torch, dtype), None).mode == mode


@pytest.mark.parametrize(
    ("dtype", "lowest", "highest", "mode"),
    [("float16", 96, 126, 1), ("float16", 106, 126, 0), ("float16", 90, 106, 0), ("bfloat16", 96, 140, 0), ("bfloat16", 2, 240, 0), ("bfloat16", 1, 120, 0), ("bfloat16", 0, 238, 1), ("float32", 96, 140, 0)],
)
def test_scales_far_apart_are_exact_too(dtype, lowest, highest, mode):
    """Those that a type holds when all are shifted, and those that it does not; a block of zeros, whose scale is the smallest."""
    weight = sample_weight(MXFP4, 20, 64)
    scale = torch.randint(lowest, highest + 1, (20, 1), generator=torch.Generator().manual_seed(2)).to(torch.uint8).repeat(1, 2)
    scale[0], scale[1] = lowest, highest  # a row is of one size, so that its sum shows all of it
    codes = weight.codes()
    codes[4, :32], scale[4, 0] = 0, 0
    wide = BlockFloatWeight.from_codes(codes, "fp4_e2m1", scale, "e8m0", 32)
    prepared = kernel().prepare(wide, NO_ACTIVATION)
    assert multiplication(prepared, getattr(torch, dtype), None).mode == mode
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
    got, want = kernel().apply(x, prepared, None), x.double() @ wide.dequantize().double().T
    assert bool(((got.double() - want).abs() <= allowed(dtype, "exact") * want.abs().amax(0, keepdim=True) + torch.finfo(x.dtype).tiny).all())


@pytest.mark.parametrize(
    ("spec", "activation"),
    [
        (MXFP4, MX_INPUT), (MXFP4, FP8), (MXFP4, INT8), (MXFP8, replace(MX_INPUT, element="fp8_e4m3fn")), (MXFP8, ActivationSpec("fp8_e4m3fn", "tensor", dynamic=False)),
        (NVFP4, NV_INPUT), (NVFP4, replace(NV_INPUT, second_scale="static")), (block_float_spec("fp4_e2m1", 16, "e4m3", "group"), NV_INPUT),
        (MXFP4, NV_INPUT), (MXFP4, ActivationSpec("int8", "token", symmetric=False)), (MXFP4, ActivationSpec("int8", "tensor", outlier_threshold=2.0)),
        (block_float_spec("fp6_e2m3", 32, "e8m0"), replace(MX_INPUT, element="fp6_e2m3")), (block_float_spec("int8", 32, "e8m0"), ActivationSpec("int8", "group", 64)),
        (block_float_spec("fp6_e3m2", 10, "e8m0"), ActivationSpec("int8", "group", 20)),
        (block_float_spec("fp6_e3m2", 32, "e8m0"), ActivationSpec("int8", "group", 10)),
    ],
    ids=lambda v: v.describe().replace(" ", "-"),
)  # fmt: skip
def test_quantized_inputs_agree_with_the_definition(spec, activation, platform):
    """What a device multiplies itself is native there, and emulated everywhere else."""
    blocks = [(MXFP4, MX_INPUT), (MXFP8, replace(MX_INPUT, element="fp8_e4m3fn")), (NVFP4, NV_INPUT), (NVFP4, replace(NV_INPUT, second_scale="static"))]
    rows = [(MXFP4, FP8), (MXFP8, ActivationSpec("fp8_e4m3fn", "tensor", dynamic=False))]
    native = "sm100" in platform and (spec, activation) in blocks + rows
    check(sample_weight(spec, 33, 98), activation, "float16" if spec is MXFP8 else "bfloat16", 2, fidelity=Fidelity.NATIVE if native else Fidelity.EMULATED)


@pytest.mark.parametrize("platform", ["cuda:sm100@host"], indirect=True)
def test_wide_inputs_are_not_multiplied_in_narrow_sums(platform):
    check(sample_weight(MXFP4, 33, 98), MX_INPUT, "float32", 2, fidelity=Fidelity.EMULATED)


@pytest.mark.parametrize("platform", ["cuda:sm75@host"], indirect=True)
def test_devices_without_brain_floats_multiply_them_as_float32(platform):
    check(sample_weight(MXFP4, 33, 98), NO_ACTIVATION, "bfloat16", 2, fidelity=Fidelity.EXACT)


@pytest.mark.parametrize("platform", ["cuda@host", "cuda:sm100@host"], indirect=True)
@pytest.mark.parametrize(("spec", "activation"), [(MXFP4, NO_ACTIVATION), (MXFP4, MX_INPUT), (NVFP4, FP8)], ids=["exact", "blocks", "tokens"])
def test_parts_of_k_add_up_to_the_same_bits_for_any_rows(spec, activation, platform, monkeypatch):
    """Side by side for few rows, one after the other for many."""
    monkeypatch.setattr(block_float_launch, "SMALLEST_CHUNK", 64)
    monkeypatch.setattr(block_float_launch, "PROGRAMS_PER_CORE", 8)  # of one core
    weight, dtype = sample_weight(spec, 40, 256), "bfloat16"
    few, x = check(weight, activation, dtype, 3)
    monkeypatch.setattr(block_float_launch, "FEW_ROWS", 0)
    prepared = kernel().prepare(weight, activation)
    bias = torch.randn(40, generator=torch.Generator().manual_seed(9)).to(x.dtype)
    assert torch.equal(kernel().apply(x, prepared, bias), few)
    launch = block_float_launch.Launch(3, 40, 256, 1)
    assert launch.chunk(64)[1] == 4


def test_no_rows_give_no_rows():
    assert kernel().apply(torch.empty(0, 64), kernel().prepare(sample_weight(MXFP4, 5, 64), NO_ACTIVATION), None).shape == (0, 5)


def test_six_bits_take_six_bits():
    weight = sample_weight(block_float_spec("fp6_e2m3", 32, "e8m0"), 3, 128)
    assert sum(plane.numel() for plane in planes(weight)) == 3 * 128 * 6 // 8


def test_codes_that_are_no_numbers_are_refused():
    codes = torch.zeros(4, 32, dtype=torch.uint8)
    codes[2, 5] = 0x7F
    with pytest.raises(BadValueError, match="1 NaN or infinite codes"):
        kernel().prepare(BlockFloatWeight.from_codes(codes, "fp8_e4m3fn", torch.full((4, 1), 127, dtype=torch.uint8), "e8m0", 32), NO_ACTIVATION)


def test_other_weights_are_refused():
    from bitgrain.conformance.grid import int_affine

    assert "not int_affine" in kernel().refusal(LinearProblem(int_affine(4, "group", 32), NO_ACTIVATION, 8, 32, "float32")).reason
