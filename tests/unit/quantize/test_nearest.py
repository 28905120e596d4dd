"""Rounding to the nearest quantized weight: the error bound of each target, and its exact cases."""

import pytest
import torch

from bitgrain.errors import LayoutError, RequestError
from bitgrain.quantize import TARGETS, find_target, quantize_nearest
from bitgrain.quantize.targets import require_target
from bitgrain.weights import WeightSpec

# half a step of the coarsest place, relative to the largest magnitude that shares a scale
BOUND = {
    "int8": 0.5 / 127.5 * 1.01, "int4": 0.5 * 2 / 15 * 1.01, "int4-a8": 0.5 / 7.5 * 1.01, "fp8": 2**-4, "fp8-block": 2**-4, "mxfp8": 2**-4, "mxfp6": 2**-3,
    "mxfp4": 1 / 4, "nvfp4": 1 / 5, "nf4": 0.16,
}  # fmt: skip


def dense(n, k, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def peaks(values, spec):
    """The largest magnitude of the elements that share a scale, per element."""
    n, k = values.shape
    rows = spec.block[0] or 1
    columns = spec.block[1] or spec.group_size or k
    result = torch.empty(n, k)
    for i in range(0, n, rows):
        for j in range(0, k, columns):
            result[i : i + rows, j : j + columns] = values[i : i + rows, j : j + columns].abs().max()
    return result


@pytest.mark.parametrize("shape", [(32, 256), (7, 100), (130, 150)])
@pytest.mark.parametrize("name", TARGETS)
def test_every_element_is_within_half_a_step(name, shape):
    target, values = TARGETS[name], dense(*shape)
    weight = quantize_nearest(values, target.weight)
    assert weight.shape == shape
    error = (weight.dequantize() - values).abs() / peaks(values, target.weight)
    bound = BOUND.get(name, BOUND[name.rpartition("-")[0]] if "-" in name else None)
    assert error.max() <= bound, f"{error.max():.4f}"
    assert error.max() > bound / 40  # the bound says something


@pytest.mark.parametrize("name", TARGETS)
def test_zeros_stay_zeros(name):
    values = dense(8, 256)
    values[:, :128] = 0
    values[0] = 0
    got = quantize_nearest(values, TARGETS[name].weight).dequantize()
    assert not got[0].any() and (name == "fp8-block" or not got[:, :32].any() or "int" in name or name == "fp8" or name == "fp8-a16")
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "nvfp4", "mxfp6"])
def test_what_is_on_the_grid_stays_there(name):
    """Quantizing a quantized weight again changes nothing."""
    once = quantize_nearest(dense(16, 128), TARGETS[name].weight).dequantize()
    torch.testing.assert_close(quantize_nearest(once, TARGETS[name].weight).dequantize(), once, rtol=1e-6, atol=0)


def test_int8_uses_the_whole_range():
    codes = quantize_nearest(dense(4, 512), TARGETS["int8"].weight).codes()
    assert codes.min() <= 1 and codes.max() == 255


def test_names_in_any_spelling():
    assert find_target("INT4_A8") is TARGETS["int4-a8"] and find_target("gptq") is None
    assert require_target("x", "none") is None
    with pytest.raises(RequestError, match="int9"):
        require_target("x", "int9")


def test_a_spec_without_a_rule_is_refused():
    with pytest.raises(LayoutError, match="bfloat16"):
        quantize_nearest(dense(2, 2), WeightSpec("dense", "bfloat16", 16))
