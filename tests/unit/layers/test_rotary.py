"""Rotary frequencies by hand, and rotation as multiplication of complex numbers."""

import math

import pytest
import torch

from bitgrain.kernels.reference.step import rotate
from bitgrain.layers.rotary import DynamicRope, LinearRope, Llama3Rope, LongRope, Rope, Rotary, YarnRope


def test_plain_frequencies_are_powers_of_theta():
    assert Rope(10000.0, 8).frequencies(1).tolist() == pytest.approx([1, 0.1, 0.01, 0.001])


def test_linear_scaling_divides_frequencies():
    assert LinearRope(10000.0, 8, 4.0).frequencies(1).tolist() == pytest.approx([0.25, 0.025, 0.0025, 0.00025])


def test_dynamic_scaling_begins_past_the_trained_length():
    rope = DynamicRope(10000.0, 8, 2.0, 100)
    assert torch.equal(rope.frequencies(60), Rope(10000.0, 8).frequencies(60))
    theta = 10000.0 * (2.0 * 150 / 100 - 1.0) ** (8 / 6)
    assert rope.frequencies(150).tolist() == pytest.approx([theta ** (-i / 4) for i in range(4)])


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones():
    rope = Llama3Rope(10000.0, 8, 8.0, 1.0, 4.0, 200)
    found = rope.frequencies(1).tolist()
    smooth = (200 / (2 * math.pi / 0.1) - 1) / 3  # the wave of 62.8 lies between 200 / 4 and 200 / 1
    assert found == pytest.approx([1, (1 - smooth) * 0.1 / 8 + smooth * 0.1, 0.01 / 8, 0.001 / 8])


def test_yarn_blends_between_its_bounds():
    rope = YarnRope(10000.0, 8, 4.0, 4096)
    # bounds: 8 ln(4096 / 2 pi b) / 2 ln(10000) = 1.309 and 2.814 for b = 32 and 1: rounded outwards to 1 and 3
    assert rope.frequencies(1).tolist() == pytest.approx([1, 0.1, 0.5 * 0.01 + 0.5 * 0.01 / 4, 0.001 / 4])
    low, high = (8 * math.log(4096 / (2 * math.pi * b)) / (2 * math.log(10000)) for b in (32, 1))
    blend = (2 - low) / (high - low)
    exact = YarnRope(10000.0, 8, 4.0, 4096, truncate=False).frequencies(1).tolist()
    assert exact == pytest.approx([1, 0.1, (1 - blend) * 0.01 + blend * 0.01 / 4, 0.001 / 4])


@pytest.mark.parametrize(
    ("theta", "beta_fast", "low", "high"),
    [(100.0, 32.0, 2, 6), (10.0, 1000.0, 0, 7)],  # 6 is past the last frequency; -0.7 and 11.3 are moved to the ends of a head
)
def test_yarn_bounds_lie_within_a_head(theta, beta_fast, low, high):
    rope = YarnRope(theta, 8, 4.0, 4096, beta_fast=beta_fast)
    blend = [min(max((i - low) / (high - low), 0), 1) for i in range(4)]
    plain = [theta ** (-i / 4) for i in range(4)]
    assert rope.frequencies(1).tolist() == pytest.approx([(1 - b) * f + b * f / 4 for b, f in zip(blend, plain, strict=True)])


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"scale": 1.5}, 1.5),
        ({"mscale": 0.7, "mscale_all_dim": 1.2}, (0.07 * math.log(4) + 1) / (0.12 * math.log(4) + 1)),
        ({"mscale": 0.7}, 0.1 * math.log(4) + 1),
    ],
)
def test_yarn_attention_factor(settings, factor):
    assert YarnRope(10000.0, 8, 4.0, 4096, **settings).attention_factor == pytest.approx(factor)
    assert YarnRope(10000.0, 8, 1.0, 4096).attention_factor == 1.0


def test_longrope_switches_factors_at_the_trained_length():
    rope = LongRope(10000.0, 8, (1.0, 2.0, 1.0, 1.0), (1.0, 4.0, 8.0, 1.0), 100, 16.0)
    assert rope.frequencies(100).tolist() == pytest.approx([1, 0.05, 0.01, 0.001])
    assert rope.frequencies(101).tolist() == pytest.approx([1, 0.025, 0.00125, 0.001])
    assert rope.attention_factor == pytest.approx(math.sqrt(1 + math.log(16) / math.log(100)))


def test_rotation_is_multiplication_by_a_complex_number():
    x = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 5, 90])
    cosine, sine = Rotary(Rope(100.0, 8), torch.float32).angles(positions, ((3, 99),))
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * positions[:, None, None] * Rope(100.0, 8).frequencies(1))
    assert torch.allclose(rotate(x, cosine, sine), torch.cat((turned.real, turned.imag), -1), atol=1e-5)


def test_attention_factor_multiplies_cosine_and_sine():
    cosine, sine = Rotary(YarnRope(10000.0, 8, 4.0, 4096, scale=1.5), torch.float32).angles(torch.tensor([0]), ((1, 1),))
    assert cosine.unique().tolist() == [1.5] and sine.unique().tolist() == [0.0]


def test_each_sequence_has_the_frequencies_of_its_own_length():
    rope = LongRope(10000.0, 8, (1.0,) * 4, (2.0,) * 4, 10, 2.0)
    rotary = Rotary(rope, torch.float32)
    positions = torch.tensor([3, 4, 3, 4, 5])
    cosine, _ = rotary.angles(positions, ((2, 8), (3, 20)))
    assert torch.equal(cosine[:2], rotary.angles(positions[:2], ((2, 8),))[0])
    assert torch.equal(cosine[2:], rotary.angles(positions[2:], ((3, 20),))[0])
    assert not torch.equal(cosine[0], cosine[2])
