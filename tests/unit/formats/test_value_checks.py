"""Checks of stored values leave them as they are, whatever their size and element type."""

import pytest
import torch

from bitgrain.errors import BadValueError
from bitgrain.formats.value_checks import require_finite, require_scale

LARGE = (2100, 2100)  # more than one piece of what is looked at closely


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(4, 4), LARGE])
def test_values_are_returned_unchanged(dtype, shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = values.clone()
    assert require_finite("weight", values) is values
    assert torch.equal(values, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(4, 4), LARGE])
def test_one_value_that_is_not_finite_is_counted(bad, shape):
    values = torch.zeros(shape)
    values[1, 2] = bad
    with pytest.raises(BadValueError, match="weight: 1 of"):
        require_finite("weight", values)


def test_large_finite_values_whose_sum_overflows_are_accepted():
    for shape in ((4, 4), LARGE):
        values = torch.full(shape, torch.finfo(torch.float32).max)
        assert require_finite("weight", values) is values


def test_halves_whose_sum_has_no_half_are_accepted():
    values = torch.full(LARGE, 60000.0, dtype=torch.float16)
    assert require_finite("weight", values) is values
    values[-1, -1] = float("inf")
    with pytest.raises(BadValueError, match="1 of 4410000"):
        require_finite("weight", values)


def test_scales_are_neither_all_zero_nor_negative():
    with pytest.raises(BadValueError, match="every scale is zero"):
        require_scale("s", torch.zeros(3))
    with pytest.raises(BadValueError, match="1 negative"):
        require_scale("s", torch.tensor([1.0, -1.0]))
    empty, signed = torch.zeros(3), torch.tensor([1.0, -1.0])
    assert require_scale("s", empty, codes_are_zero=True) is empty and require_scale("s", signed, signed=True) is signed
