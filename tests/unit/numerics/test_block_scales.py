"""One-byte block scales: every code, rounding against a search of all codes, and the rules that choose a power of two."""

import math
from fractions import Fraction

import pytest
import torch

from bitgrain.numerics.block_scales import (
    EXPONENT_RULES,
    LARGEST_EXPONENT,
    SCALE_TYPES,
    decode_block_scale,
    encode_block_scale,
    largest_scale,
    shared_exponent,
)


def naive_value(code: int, kind: str) -> float:
    """The number of a code by the definition of its type; NaN where it has none."""
    if kind == "e8m0":
        return math.nan if code == 255 else 2.0 ** (code - 127)
    if kind == "e4m3":
        exponent, mantissa = (code >> 3) & 15, code & 7
        if exponent == 15 and mantissa == 7:
            return math.nan
        value = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6
        return -value if code & 0x80 else value
    exponent, mantissa = code >> 3, code & 7
    if exponent == 31 and mantissa == 7:
        return math.nan
    return (1 + mantissa / 8) * 2.0 ** (exponent - 15) if exponent else mantissa / 8 * 2.0**-14


@pytest.mark.parametrize("kind", SCALE_TYPES)
def test_every_code_decodes_to_its_definition(kind):
    codes = torch.arange(256, dtype=torch.uint8)
    want = torch.tensor([naive_value(c, kind) for c in range(256)], dtype=torch.float64)
    got = decode_block_scale(codes, kind)
    assert got.dtype == torch.float32
    assert torch.equal(torch.nan_to_num(got.double(), nan=-1e9), torch.nan_to_num(want, nan=-1e9))


@pytest.mark.parametrize(("kind", "largest"), [("e8m0", 2.0**127), ("e4m3", 448.0), ("e5m3", 114688.0)])
def test_largest_scale_is_finite(kind, largest):
    assert largest_scale(kind) == largest


@pytest.mark.parametrize("kind", SCALE_TYPES)
def test_every_scale_that_is_one_survives_encoding(kind):
    codes = torch.tensor([c for c in range(256) if naive_value(c, kind) >= 0 and not (kind == "e4m3" and c >= 128)], dtype=torch.uint8)
    assert torch.equal(encode_block_scale(decode_block_scale(codes, kind), kind), codes)


def nearest_even(value: float, kind: str) -> int:
    """The code nearest to a value, by comparing it with all; the even one of two that are as near."""
    values = [(c, naive_value(c, kind)) for c in range(128 if kind == "e4m3" else 256)]
    exact = Fraction(value)
    return min((abs(Fraction(v) - exact), c % 2, c) for c, v in values if not math.isnan(v))[2]


@pytest.mark.parametrize("kind", ["e4m3", "e5m3"])
def test_rounding_is_to_nearest_with_ties_to_even(kind):
    values = torch.exp2(torch.linspace(-20, 18, 400))
    table = decode_block_scale(torch.arange(126, dtype=torch.uint8), kind)
    ties = (table[:-1] + table[1:]) / 2
    values = torch.cat([values, ties, torch.nextafter(ties, torch.tensor(0.0)), torch.nextafter(ties, torch.tensor(1e9)), torch.zeros(1)])
    assert encode_block_scale(values, kind).tolist() == [nearest_even(v, kind) for v in values.tolist()]


def test_fractions_round_as_the_type_of_torch_does():
    values = torch.exp2(torch.linspace(-14, 10, 3001))
    want = values.clamp(max=448.0).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(encode_block_scale(values, "e4m3"), want)


@pytest.mark.parametrize("kind", SCALE_TYPES)
def test_scales_beyond_the_largest_saturate(kind):
    assert decode_block_scale(encode_block_scale(torch.tensor([3e38]), kind), kind).item() == largest_scale(kind)


ELEMENTS = {"fp4_e2m1": (6.0, 1), "fp6_e2m3": (7.5, 3), "fp6_e3m2": (28.0, 2), "fp8_e4m3fn": (448.0, 3), "fp8_e5m2": (57344.0, 2), "int8": (127 / 64, 6)}


def naive_power(peak: float, element: str, rule: str) -> int:
    """The exponent that a rule gives, in exact arithmetic.  floor(log2 v) = frexp(v)[1] - 1."""
    top, mantissa = ELEMENTS[element]
    exact, whole = Fraction(peak), math.frexp(peak)[1] - 1
    if rule == "ceil":
        power = math.floor(math.log2(peak / top)) - 2
        while Fraction(2) ** power * Fraction(top) < exact:
            power += 1
        return power
    if rule == "round":
        bits = {"fp6_e2m3": 3, "fp6_e3m2": 2}.get(element, 1)
        whole += exact + Fraction(2) ** (whole - bits - 1) >= Fraction(2) ** (whole + 1)
    elif rule == "even":
        step = Fraction(2) ** (whole - mantissa)
        whole += round(exact / step) * step >= Fraction(2) ** (whole + 1)
    elif rule == "top":
        whole += exact > Fraction(2) ** whole
    return whole - LARGEST_EXPONENT[element]


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("rule", EXPONENT_RULES)
def test_shared_exponent_follows_its_rule(rule, element):
    borders = torch.tensor([1.0, 1.25, 1.5, 1.75, 1.875, 1.9375, 1.96875, 1.984375, 1.5625, 1.999])
    peaks = (borders[:, None] * torch.exp2(torch.arange(-30.0, 30.0, 7.0))).flatten()
    peaks = torch.cat([peaks, torch.nextafter(peaks, torch.tensor(0.0)), torch.nextafter(peaks, torch.tensor(1e30))])
    want = [2.0 ** naive_power(p, element, rule) for p in peaks.tolist()]
    assert shared_exponent(peaks, element, rule).tolist() == want


@pytest.mark.parametrize("rule", EXPONENT_RULES)
def test_shared_exponent_of_nothing_is_the_smallest_and_of_much_the_largest(rule):
    got = shared_exponent(torch.tensor([[0.0], [3e38]]), "fp6_e2m3", rule)
    assert got.shape == (2, 1) and got[0].item() == 2.0**-127 and 2.0**124 <= got[1].item() <= 2.0**127


def test_rules_differ_where_they_should():
    # the largest E2M1 number is 6 = 1.5 * 2^2, the largest E4M3 number 448 = 1.75 * 2^8
    peaks = torch.tensor([6.0, 6.5, 7.0, 8.0])
    assert shared_exponent(peaks, "fp4_e2m1", "floor").tolist() == [1.0, 1.0, 1.0, 2.0]
    assert shared_exponent(peaks, "fp4_e2m1", "round").tolist() == [1.0, 1.0, 2.0, 2.0]
    assert shared_exponent(peaks, "fp4_e2m1", "even").tolist() == [1.0, 1.0, 2.0, 2.0]
    assert shared_exponent(peaks, "fp4_e2m1", "ceil").tolist() == [1.0, 2.0, 2.0, 2.0]
    assert shared_exponent(torch.tensor([447.0, 448.0, 449.0]), "fp8_e4m3fn", "round").tolist() == [1.0, 2.0, 2.0]
