"""Small floats: every code against torch's own types, and rounding at ties, ends and specials."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.errors import BadValueError
from bitgrain.numerics import small_floats as sf

TORCH_TYPES = [sf.E4M3FN, sf.E4M3FNUZ, sf.E5M2]
ALL = list(sf.SMALL_FLOATS.values())


def ids(kind):
    return kind.name


@pytest.mark.parametrize("kind", TORCH_TYPES, ids=ids)
def test_decode_table_equals_torch_for_every_code(kind):
    codes = torch.arange(256, dtype=torch.uint8)
    want = codes.view(kind.storage).float()
    got = sf.decode(codes, kind)
    assert torch.equal(torch.isnan(got), torch.isnan(want))
    assert torch.equal(got.nan_to_num(0.0), want.nan_to_num(0.0))


@pytest.mark.parametrize("kind", ALL, ids=ids)
def test_encode_of_decode_is_identity_for_every_number(kind):
    codes = torch.arange(1 << kind.bits, dtype=torch.uint8)
    values = sf.decode(codes, kind)
    finite = torch.isfinite(values)
    assert torch.equal(sf.encode(values[finite], kind), codes[finite])


@pytest.mark.parametrize("kind", TORCH_TYPES, ids=ids)
@settings(max_examples=200, deadline=None)
@given(value=st.floats(-500, 500, width=32))
def test_encode_rounds_as_torch_inside_the_range(kind, value):
    x = torch.tensor([value])
    if abs(value) > kind.max:
        return
    assert sf.decode(sf.encode(x, kind), kind).item() == x.to(kind.storage).float().item()


def test_e2m1_ties_round_to_even():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert sf.decode(sf.encode(ties, sf.E2M1), sf.E2M1).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]


@pytest.mark.parametrize(("kind", "top"), [(sf.E2M1, 6.0), (sf.E2M3, 7.5), (sf.E3M2, 28.0), (sf.E4M3FN, 448.0), (sf.E4M3FNUZ, 240.0), (sf.E5M2, 57344.0)])
def test_values_beyond_the_range_saturate(kind, top):
    assert kind.max == top
    assert sf.decode(sf.encode(torch.tensor([1e9, -1e9, math.inf]), kind), kind).tolist() == [top, -top, top]


def test_infinity_is_kept_where_the_type_has_it_and_saturation_is_off():
    assert sf.decode(sf.encode(torch.tensor([math.inf]), sf.E5M2, saturate=False), sf.E5M2).item() == math.inf


@pytest.mark.parametrize("kind", [k for k in ALL if k.has_nan], ids=ids)
def test_nan_stays_nan(kind):
    assert sf.decode(sf.encode(torch.tensor([math.nan]), kind), kind).isnan().all()


def test_nan_is_refused_where_the_type_has_none():
    with pytest.raises(BadValueError, match="NaN"):
        sf.encode(torch.tensor([math.nan]), sf.E2M1)


def test_fnuz_has_no_negative_zero():
    assert sf.encode(torch.tensor([-0.0]), sf.E4M3FNUZ).item() == 0


def test_e8m0_covers_the_subnormal_and_nan():
    values = sf.decode_e8m0(torch.tensor([0, 1, 127, 254, 255], dtype=torch.uint8))
    assert values[:4].tolist() == [2.0**-127, 2.0**-126, 1.0, 2.0**127] and bool(values[4].isnan())
