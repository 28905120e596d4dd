"""Activation quantization: hand-worked codes, naive formulas, and bounded error."""

import math
from dataclasses import replace

import pytest
import torch

from bitgrain.weights import NO_ACTIVATION, ActivationSpec


def test_no_quantization_returns_the_input():
    x = torch.randn(2, 8)
    assert torch.equal(NO_ACTIVATION.fake_quantize(x), x)


def test_symmetric_int8_scale_is_half_the_bit_range():
    codes, scale, zero = ActivationSpec("int8", "token").quantize(torch.tensor([[-127.5, 51.0, 0.0]]))
    assert scale.item() == 1.0 and zero.item() == 0.0
    assert codes.tolist() == [[-128, 51, 0]]


def test_asymmetric_int8_maps_the_range_onto_all_codes():
    codes, scale, zero = ActivationSpec("int8", "token", symmetric=False).quantize(torch.tensor([[0.0, 255.0, 100.0]]))
    assert (scale.item(), zero.item()) == (1.0, -128.0)
    assert codes.tolist() == [[-128, 127, -28]]


def test_static_values_are_used_as_stored():
    spec = ActivationSpec("int8", "tensor", symmetric=False, dynamic=False, scale=0.5, zero=3)
    codes, _, _ = spec.quantize(torch.tensor([[1.0, -2.0, 1000.0]]))
    assert codes.tolist() == [[5, -1, 127]]
    assert spec.fake_quantize(torch.tensor([[1.0, -2.0]])).tolist() == [[1.0, -2.0]]


def test_clamping_comes_before_rounding():
    spec = ActivationSpec("int8", "tensor", dynamic=False, scale=1.0)
    assert spec.quantize(torch.tensor([[127.6, -128.9]]))[0].tolist() == [[127, -128]]


def test_fp8_token_scale_maps_the_peak_to_448():
    x = torch.tensor([[896.0, 1.0], [4.48, -0.01]])
    codes, scale, _ = ActivationSpec("fp8_e4m3fn", "token").quantize(x)
    assert codes[:, 0].tolist() == [448.0, 448.0]
    assert torch.allclose(scale, torch.tensor([[2.0], [0.01]]))


def test_group_scales_are_independent_and_cover_a_short_last_group():
    x = torch.cat([torch.full((1, 4), 1.0), torch.full((1, 4), 100.0), torch.full((1, 2), 5.0)], dim=1)
    codes, scale, _ = ActivationSpec("fp8_e4m3fn", "group", group_size=4).quantize(x)
    assert tuple(scale.shape) == (1, 3) and codes.shape == x.shape
    assert torch.allclose(codes * torch.repeat_interleave(scale, 4, dim=1)[:, :10], x)


def test_power_of_two_scales_round_up():
    _, scale, _ = ActivationSpec("fp8_e4m3fn", "token", scale_type="e8m0").quantize(torch.tensor([[449.0]]))
    assert scale.item() == 2.0


def test_zero_rows_do_not_divide_by_zero():
    for element in ("int8", "fp8_e4m3fn"):
        assert torch.equal(ActivationSpec(element, "token").fake_quantize(torch.zeros(2, 4)), torch.zeros(2, 4))


@pytest.mark.parametrize("spec", [ActivationSpec("int8", "token"), ActivationSpec("int8", "token", symmetric=False), ActivationSpec("int8", "tensor")])
def test_dynamic_int8_error_is_at_most_half_a_step(spec):
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    _, scale, _ = spec.quantize(x)
    assert bool(((spec.fake_quantize(x) - x).abs() <= scale * 0.5000001 + 1e-7).all())


# --- against naive formulas, number by number -----------------------------------------------------------------------------
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def nearest_e2m1(value: float) -> float:
    """The E2M1 number nearest to a value; of two that are as near, the one with an even code."""
    near = min(range(8), key=lambda code: (abs(E2M1[code] - abs(value)), code % 2))
    return math.copysign(E2M1[near], value)


def nearest_e4m3(value: float) -> float:
    return torch.tensor(value).clamp(-448, 448).to(torch.float8_e4m3fn).float().item()


def f32(value: float) -> float:
    """Rounded once to float32."""
    return torch.tensor(value, dtype=torch.float64).float().item()


def spread(columns: int) -> torch.Tensor:
    """[60, columns] of magnitudes over 20 powers of two, with an empty row, an empty block and tiny rows."""
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(60, columns, generator=generator) * torch.exp2(torch.arange(60.0) % 20 - 12)[:, None]
    x[0] = 0
    x[1, :16] = 0
    x[2] *= 1e-7
    return x


def naive_blocks(x, group, scale_of, element):
    """x with each block of a row divided by its scale, rounded, and multiplied again."""
    want = torch.zeros_like(x)
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], group):
            block = x[row, start : start + group].tolist()
            scale = scale_of(max(abs(v) for v in block))
            for i, v in enumerate(block):
                want[row, start + i] = f32(element(f32(v / scale)) * scale)
    return want


@pytest.mark.parametrize("columns", [32, 40], ids=["whole-blocks", "short-block"])
def test_nvfp4_with_a_stored_divisor_follows_its_formula(columns):
    # block scale = e4m3(divisor * (amax / 6)), and 2^-3 if that is zero; effective scale = block scale / divisor
    divisor = f32(731.3)
    spec = ActivationSpec("fp4_e2m1", "group", 16, scale_type="e4m3", second_scale="static", second=divisor, second_divides=True)
    x = spread(columns)
    want = naive_blocks(x, 16, lambda peak: f32((nearest_e4m3(f32(divisor * f32(peak / 6))) or 0.125) / divisor), nearest_e2m1)
    assert torch.equal(spec.fake_quantize(x), want)


def test_nvfp4_with_a_stored_multiplier_follows_its_formula():
    second = f32(1 / 731.3)
    spec = ActivationSpec("fp4_e2m1", "group", 16, scale_type="e4m3", second_scale="static", second=second)
    x = spread(32)
    want = naive_blocks(x, 16, lambda peak: f32((nearest_e4m3(f32(f32(peak / 6) / second)) or 0.125) * second), nearest_e2m1)
    assert torch.equal(spec.fake_quantize(x), want)


def test_nvfp4_without_a_second_scale_follows_its_formula():
    spec = ActivationSpec("fp4_e2m1", "group", 16, scale_type="e4m3")
    x = spread(48)
    want = naive_blocks(x, 16, lambda peak: nearest_e4m3(f32(peak / 6)) or 0.125, nearest_e2m1)
    assert torch.equal(spec.fake_quantize(x), want)


def test_nvfp4_with_a_computed_second_scale_uses_the_whole_input():
    spec = ActivationSpec("fp4_e2m1", "group", 16, scale_type="e4m3", second_scale="dynamic")
    x = spread(32)[20:]
    second = f32(f32(x.abs().max().item() / 6) / 448)
    want = naive_blocks(x, 16, lambda peak: f32((nearest_e4m3(f32(f32(peak / 6) / second)) or 0.125) * second), nearest_e2m1)
    assert torch.equal(spec.fake_quantize(x), want)


def test_a_divisor_and_its_reciprocal_mean_the_same_input():
    divides = ActivationSpec("fp4_e2m1", "group", 16, scale_type="e4m3", second_scale="static", second=1024.0, second_divides=True)
    x = spread(32)
    assert torch.equal(divides.fake_quantize(x), replace(divides, second=1 / 1024, second_divides=False).fake_quantize(x))


def test_blocks_whose_scale_vanishes_become_zero():
    x = torch.full((1, 32), 1e-6)
    x[0, 16:] = 1.0
    spec = ActivationSpec("fp4_e2m1", "group", 16, scale_type="e4m3", second_scale="static", second=1.0, second_divides=True)
    assert spec.fake_quantize(x)[0, :16].tolist() == [0.0] * 16 and spec.quantize(x)[1][0, 0].item() == 0.125


MX = {"fp4_e2m1": (nearest_e2m1, 2), "fp8_e4m3fn": (nearest_e4m3, 8)}


@pytest.mark.parametrize("columns", [64, 72], ids=["whole-blocks", "short-block"])
@pytest.mark.parametrize("element", MX)
def test_mx_inputs_follow_their_formula(element, columns):
    # the exponent of amax goes up from 1.75 * 2^e on
    nearest, largest = MX[element]

    def power(peak):
        whole = math.frexp(peak)[1] - 1
        return 2.0**-127 if peak == 0 else 2.0 ** (whole + (peak >= 1.75 * 2.0**whole) - largest)

    x = spread(columns)
    top = 448.0 if element == "fp8_e4m3fn" else 6.0
    want = naive_blocks(x, 32, power, lambda v: nearest(max(-top, min(top, v))))
    assert torch.equal(ActivationSpec(element, "group", 32, scale_type="e8m0", exponent_rule="round").fake_quantize(x), want)


@pytest.mark.parametrize("granularity", ["token", "tensor", "group"])
@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_integers_follow_their_formula(bits, granularity):
    group = {"token": 48, "tensor": 0, "group": 16}[granularity]
    x = spread(48)
    half = 1 << (bits - 1)

    def code(v):
        return round(max(-half, min(half - 1, v)))  # to nearest, ties to even

    whole = f32(x.abs().max().item() / (half - 0.5))
    eps = torch.finfo(torch.float32).eps
    want = naive_blocks(x, group or 48, lambda peak: whole if granularity == "tensor" else (f32(peak / (half - 0.5)) or eps), code)
    spec = ActivationSpec(f"int{bits}", granularity, group if granularity == "group" else 0)
    assert torch.equal(spec.fake_quantize(x), want)


@pytest.mark.parametrize("bits", [4, 8])
def test_asymmetric_integers_follow_their_formula(bits):
    x = spread(24) + torch.linspace(-1, 1, 60)[:, None]
    x[3] = x[3].abs() + 1
    half, want = 1 << (bits - 1), torch.zeros_like(x)
    for row, values in enumerate(x.tolist()):
        low, high = min(0.0, *values), max(0.0, *values)
        scale = f32(f32(high - low) / (2 * half - 1))
        zero = round(max(-half, min(half - 1, f32(-half - f32(low / scale)))))
        for i, v in enumerate(values):
            code = round(max(-half, min(half - 1, f32(f32(v / scale) + zero))))
            want[row, i] = f32((code - zero) * scale)
    assert torch.equal(ActivationSpec(f"int{bits}", "token", symmetric=False).fake_quantize(x), want)


@pytest.mark.parametrize("granularity", ["token", "group"])
def test_floats_of_eight_bits_follow_their_formula(granularity):
    x = spread(40)
    group = 40 if granularity == "token" else 16
    eps = torch.finfo(torch.float32).eps
    want = naive_blocks(x, group, lambda peak: f32(peak / 448) or eps, lambda v: nearest_e4m3(max(-448.0, min(448.0, v))))
    spec = ActivationSpec("fp8_e4m3fn", granularity, 0 if granularity == "token" else 16)
    assert torch.equal(spec.fake_quantize(x), want)
