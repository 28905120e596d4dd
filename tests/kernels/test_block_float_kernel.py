"""Small floats in blocks, natively: every element and scale type, exact values, odd blocks, second scales, extreme scales."""

import math
from dataclasses import replace

import pytest
import torch

from bitgrain.conformance.grid import int_affine
from bitgrain.errors import BadValueError
from bitgrain.kernels.base import Fidelity, LinearProblem
from bitgrain.kernels.cpu import library, panels
from bitgrain.kernels.cpu.block_float import BlockFloatLinear
from bitgrain.numerics.block_scales import decode_block_scale
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, BlockFloatWeight
from bitgrain.weights.block_float import ELEMENT_BITS, block_float_spec
from bitgrain.weights.synthetic import sample_weight

SETS = library.available_sets()
pytestmark = pytest.mark.skipif(not SETS, reason=library.missing() or "no instruction set")
KERNEL = BlockFloatLinear()


@pytest.fixture(params=SETS)
def instruction_set(request):
    before = library.instruction_set()
    library.choose_instruction_set(request.param)
    yield request.param
    library.choose_instruction_set(before)


def product(weight, x, act=NO_ACTIVATION):
    return KERNEL.apply(x, KERNEL.prepare(weight, act), None)


def agrees(weight, x, limit=2e-5):
    want = x.double() @ weight.dequantize().double().T
    return ((product(weight, x).double() - want).abs() <= limit * want.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("element", ELEMENT_BITS)
def test_every_code_is_decoded_exactly(element, dtype, instruction_set):
    size = 1 << ELEMENT_BITS[element]
    codes = torch.stack([torch.arange(size).roll(i) for i in range(20)]).to(torch.uint8)
    if element.startswith("fp8"):
        codes &= 0xBF  # no NaN, no infinity
    weight = BlockFloatWeight.from_codes(codes, element, torch.full((20, size // 16), 127, dtype=torch.uint8), "e8m0", 16)
    assert torch.equal(product(weight, torch.eye(size, dtype=dtype)).float(), weight.dequantize().to(dtype).float().T)


@pytest.mark.parametrize("scale_type", ["e8m0", "e4m3", "e5m3"])
@pytest.mark.parametrize("element", ["fp4_e2m1", "fp8_e4m3fn"])
def test_every_scale_is_that_of_the_definition(element, scale_type, instruction_set):
    scales = torch.arange(256)
    finite = torch.isfinite(decode_block_scale(scales, scale_type)) & (scales < (120 if scale_type == "e4m3" else 250))
    scales = scales[finite].to(torch.uint8).view(-1, 1)
    codes = torch.full((len(scales), 8), 0x3 if element == "fp4_e2m1" else 0x3C, dtype=torch.uint8)  # 1.5
    weight = BlockFloatWeight.from_codes(codes, element, scales, scale_type, 8)
    x = torch.zeros(1, 8)
    x[0, 3] = 1.0
    assert torch.equal(product(weight, x)[0], weight.dequantize()[:, 3])


@pytest.mark.parametrize("second", ["tensor", "channel"])
def test_two_levels_of_scales_are_multiplied_in_float32_first(second, instruction_set):
    weight = sample_weight(block_float_spec("fp4_e2m1", 16, "e4m3", second), 37, 96)
    x = torch.eye(96)
    # one product each, of which nothing else rounds: equal to the last bit
    assert torch.equal(product(weight, x), weight.dequantize().T)


@pytest.mark.parametrize("spec", [("fp4_e2m1", 16, "e4m3", "group"), ("fp8_e4m3fn", 20, "e8m0", "none"), ("fp4_e2m1", 12, "e5m3", "none"), ("int8", 32, "e8m0", "none")])
@pytest.mark.parametrize("k", [40, 100, 264])
def test_blocks_and_second_scales_of_odd_sizes(spec, k, instruction_set):
    weight = sample_weight(block_float_spec(*spec), 35, k)
    assert agrees(weight, torch.randn(5, k, generator=torch.Generator().manual_seed(k)))


def test_weights_cut_inside_a_block_stay_exact():
    weight = sample_weight(block_float_spec("fp4_e2m1", 32, "e8m0"), 24, 192).columns(24, 120)
    assert agrees(weight, torch.randn(3, 96, generator=torch.Generator().manual_seed(1)))


def test_scales_at_the_end_of_float32_keep_their_values(instruction_set):
    codes = torch.full((16, 32), 0x01, dtype=torch.uint8)  # 2^-9
    weight = BlockFloatWeight.from_codes(codes, "fp8_e4m3fn", torch.full((16, 1), 254, dtype=torch.uint8), "e8m0", 32)
    assert torch.equal(product(weight, torch.eye(32)), weight.dequantize().T) and weight.dequantize().max() == 2.0**118


def test_a_nan_scale_makes_the_outputs_of_its_row_nan(instruction_set):
    weight = sample_weight(block_float_spec("fp4_e2m1", 32, "e8m0"), 20, 64)
    weight.scale[3, 1] = 255
    y = product(weight, torch.ones(2, 64))
    assert y[:, 3].isnan().all() and not y[:, torch.arange(20) != 3].isnan().any()


def test_nan_codes_are_refused():
    codes = torch.full((16, 32), 0x7F, dtype=torch.uint8)
    weight = BlockFloatWeight.from_codes(codes, "fp8_e4m3fn", torch.full((16, 1), 127, dtype=torch.uint8), "e8m0", 32)
    with pytest.raises(BadValueError, match="512 NaN codes"):
        KERNEL.prepare(weight, NO_ACTIVATION)


def test_prepared_weights_stay_near_their_packed_size():
    for spec, factor in ((block_float_spec("fp4_e2m1", 32, "e8m0"), 1.07), (block_float_spec("fp4_e2m1", 16, "e4m3", "tensor"), 1.13)):
        weight = sample_weight(spec, 512, 1024)
        assert KERNEL.prepare(weight, NO_ACTIVATION).nbytes <= factor * weight.nbytes


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_leaves_the_others_as_they_are(bad, instruction_set):
    weight, x = sample_weight(block_float_spec("fp4_e2m1", 32, "e8m0"), 33, 160), torch.randn(9, 160, generator=torch.Generator().manual_seed(6))
    prepared = KERNEL.prepare(weight, NO_ACTIVATION)
    clean = KERNEL.apply(x, prepared, None)
    x[4, 9] = bad
    y = KERNEL.apply(x, prepared, None)
    others = torch.arange(9) != 4
    assert torch.equal(y[others], clean[others])
    want = x[4] @ weight.dequantize().T
    assert torch.equal(y[4].isnan(), want.isnan()) and torch.equal(y[4].isinf(), want.isinf())


@pytest.mark.parametrize("magnitude", [1e-40, 1e-30, 1e-6, 1e6, 1e30])
def test_magnitudes_of_inputs_do_not_matter(magnitude, instruction_set):
    weight = sample_weight(block_float_spec("fp4_e2m1", 32, "e8m0"), 33, 160)
    x = torch.randn(3, 160, generator=torch.Generator().manual_seed(8)) * magnitude
    # numbers near 1e-40 have few bits
    assert agrees(weight, x, 2e-5 if magnitude > 1e-35 else 2e-3)


def test_activations_that_schemes_quantize_are_emulated():
    act = ActivationSpec("fp4_e2m1", "group", 32, scale_type="e8m0", exponent_rule="floor")
    spec = block_float_spec("fp4_e2m1", 32, "e8m0")
    problem = LinearProblem(spec, act, 64, 128, "bfloat16")
    assert KERNEL.fidelity(problem) is Fidelity.EMULATED and KERNEL.fidelity(replace(problem, activation=NO_ACTIVATION)) is Fidelity.EXACT
    weight, x = sample_weight(spec, 64, 128), torch.randn(4, 128, generator=torch.Generator().manual_seed(2))
    want = act.fake_quantize(x).double() @ weight.dequantize().double().T
    assert torch.allclose(product(weight, x, act).double(), want, rtol=0, atol=2e-5 * want.abs().max().item())


def test_other_weights_are_refused():
    assert "blocks" in KERNEL.refusal(LinearProblem(int_affine(4, "group", 32), NO_ACTIVATION, 64, 128, "bfloat16")).reason


def test_pairs_hold_every_value_once():
    values = torch.arange(32 * 16).view(32, 16)
    packed = panels.pack_pairs(values).view(2, 2, 4, 16, 2)
    assert torch.equal(packed.permute(0, 3, 1, 2, 4).reshape(32, 16), values)
