"""Activation quantization: hand-worked codes and bounded error."""

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
