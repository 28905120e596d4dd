"""Large and ragged sizes through every instruction set: blocks of rows and of K, tails of tiles, one rounding, no mixing of rows."""

from dataclasses import replace

import pytest
import torch

from bitgrain.conformance.grid import float8, int_affine
from bitgrain.kernels.cpu import library
from bitgrain.kernels.cpu.float8 import Float8Linear
from bitgrain.kernels.cpu.int_affine import IntAffineLinear
from bitgrain.kernels.cpu.int_dot import IntDotLinear
from bitgrain.kernels.cpu.native_kernel import quantized_input
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, FloatWeight, IntAffineWeight
from bitgrain.weights.synthetic import sample_weight

SETS = library.available_sets()
pytestmark = pytest.mark.skipif(not SETS, reason=library.missing() or "no instruction set")

TOKEN = ActivationSpec("int8", "token", symmetric=False)
# K = 2,100: more than one block of decoded weights, a short last group, a short last step
CASES = {
    "w4-g32": (IntAffineLinear(), int_affine(4, "group", 32, "integer"), NO_ACTIVATION),
    "w4-g20": (IntAffineLinear(), int_affine(4, "group", 20, "float"), NO_ACTIVATION),
    "w4-channel": (IntAffineLinear(), int_affine(4, "channel"), NO_ACTIVATION),
    "w4-channel-asym": (IntAffineLinear(), int_affine(4, "channel", zero="integer"), NO_ACTIVATION),
    "w4-act-order": (IntAffineLinear(), int_affine(4, "group", 64, "integer", index=True), NO_ACTIVATION),
    "w8-channel": (IntAffineLinear(), int_affine(8, "channel"), NO_ACTIVATION),
    "w4a8": (IntAffineLinear(), int_affine(4, "group", 128), TOKEN),
    "fp8-block": (Float8Linear(), float8("fp8_e4m3fn", "block", (128, 128)), NO_ACTIVATION),
    "fp8-e5m2": (Float8Linear(), float8("fp8_e5m2", "channel"), NO_ACTIVATION),
    "fp8-fp8": (Float8Linear(), float8("fp8_e4m3fn", "tensor"), ActivationSpec("fp8_e4m3fn", "token")),
    "w8a8": (IntDotLinear(), int_affine(8, "channel"), TOKEN),
}
ROWS, N, K = 550, 49, 2100


@pytest.fixture(params=SETS)
def instruction_set(request):
    before = library.instruction_set()
    library.choose_instruction_set(request.param)
    yield request.param
    library.choose_instruction_set(before)


def inputs():
    return (torch.randn(ROWS, K, generator=torch.Generator().manual_seed(11)) + 0.3).bfloat16()


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_outputs_are_the_exact_product_rounded_once(case, instruction_set):
    kernel, spec, act = CASES[case]
    weight, x = sample_weight(spec, N, K), inputs()[:70]
    y = kernel.apply(x, kernel.prepare(weight, act), None)
    want = act.fake_quantize(x).double() @ weight.dequantize().double().T
    # float32 sums are wrong by about 1e-6 of the row, a bfloat16 rounding is 4e-3: few products lie so near to a tie
    assert (y == want.bfloat16()).double().mean() > 0.99
    # those that do are off by one unit of the output, those that cancel by a little of the row
    assert ((y.double() - want).abs() <= 2**-8 * want.abs() + 1e-5 * want.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("case", CASES)
def test_rows_do_not_depend_on_their_number_or_position(case, instruction_set):
    kernel, spec, act = CASES[case]
    prepared, x = kernel.prepare(sample_weight(spec, N, K), act), inputs()
    rows = ROWS if instruction_set != "portable" else 40
    whole = kernel.apply(x[:rows], prepared, None)
    for start, stop in ((0, 1), (rows - 1, rows), (0, 16), (3, 20), (rows - 33, rows)):
        assert torch.equal(kernel.apply(x[start:stop], prepared, None), whole[start:stop]), (start, stop)


@pytest.mark.parametrize("case", ["w4-g32", "fp8-block", "w4a8", "w8a8"])
def test_a_nan_reaches_all_of_its_row_and_no_other(case, instruction_set):
    kernel, spec, act = CASES[case]
    prepared, x = kernel.prepare(sample_weight(spec, N, K), act), inputs()[:20]
    clean = kernel.apply(x, prepared, None)
    x[7, 5] = float("nan")
    y = kernel.apply(x, prepared, None)
    others = torch.arange(20) != 7
    assert torch.equal(y[others], clean[others])
    assert y[7].isnan().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_dynamic_range_that_is_not_finite_makes_every_output_nan_as_in_the_definition(bad, symmetric, instruction_set):
    act = ActivationSpec("int8", "tensor", symmetric=symmetric)
    weight, x = sample_weight(int_affine(8, "channel"), N, 64), torch.randn(5, 64)
    x[2, 3] = bad
    assert act.fake_quantize(x).isnan().any(1).all()
    assert IntDotLinear().apply(x, IntDotLinear().prepare(weight, act), None).isnan().all()


@pytest.mark.parametrize("k", [8, 60, 64, 72, 128, 200])
@pytest.mark.parametrize("rows", [1, 5, 16, 17, 40])
def test_integer_sums_are_exact_for_every_tail(k, rows, instruction_set):
    weight = replace(sample_weight(int_affine(8, "channel"), 33, k), scale=torch.ones(33, 1))
    act = ActivationSpec("int8", "tensor", dynamic=False, scale=1.0, zero=-5, symmetric=False)
    x = torch.randint(-123, 133, (rows, k), generator=torch.Generator().manual_seed(k)).float()
    y = IntDotLinear().apply(x, IntDotLinear().prepare(weight, act), None)
    assert torch.equal(y.double(), x.double() @ weight.dequantize().double().T)


@pytest.mark.parametrize(
    "act",
    [TOKEN, ActivationSpec("int4", "token"), ActivationSpec("fp8_e5m2", "tensor"), ActivationSpec("int8", "tensor", symmetric=False, dynamic=False, scale=0.1, zero=-128)],
    ids=lambda a: a.describe().replace(" ", "-"),
)
def test_quantized_input_loses_nothing_in_bfloat16(act):
    x = torch.randn(6, 300, generator=torch.Generator().manual_seed(2)) * 9
    values, row_scale = quantized_input(act, x)
    assert values.dtype == torch.bfloat16
    assert torch.equal(values.float() * row_scale[:, None], act.fake_quantize(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8_e4m3fn", "fp8_e5m2"])
def test_every_code_is_decoded_exactly(kind, dtype, instruction_set):
    size = 16 if kind == "int4" else 256
    codes = torch.stack([torch.arange(size).roll(i) for i in range(20)]).to(torch.uint8)
    if kind.startswith("int"):
        bits = int(kind[3:])
        kernel, weight = IntAffineLinear(), IntAffineWeight.from_codes(codes, bits, torch.ones(20, 1), size // 2, size)
    else:
        element = getattr(torch, f"float8_{kind[4:]}")
        codes[~torch.isfinite(codes.view(element).float())] = 0
        kernel, weight = Float8Linear(), FloatWeight(codes.view(element), torch.ones(1, 1), (20, size))
    y = kernel.apply(torch.eye(size, dtype=dtype), kernel.prepare(weight, NO_ACTIVATION), None)
    assert torch.equal(y.float(), weight.dequantize().T)
