"""Activation quantization in Triton equals the definition to the bit: interpreter only, not run on hardware."""

from dataclasses import replace

import pytest
import torch

from bitgrain.conformance.grid import ACTIVATIONS
from bitgrain.errors import LayoutError
from bitgrain.kernels.triton import availability
from bitgrain.kernels.triton.activation_quantization import block_codes, covered, fake_quantize, quantize
from bitgrain.numerics.block_scales import EXPONENT_RULES, decode_block_scale
from bitgrain.numerics.small_floats import SMALL_FLOATS, decode
from bitgrain.weights import NO_ACTIVATION, ActivationSpec
from bitgrain.weights.synthetic import sample_activation

pytestmark = pytest.mark.skipif(bool(availability.missing("")), reason=availability.missing("") or "present")

MX = ActivationSpec("fp4_e2m1", "group", 32, scale_type="e8m0")
NVFP4 = ActivationSpec("fp4_e2m1", "group", 16, scale_type="e4m3", second_scale="dynamic")
SPECS = [
    *ACTIVATIONS[1:],
    *(replace(MX, element=element, exponent_rule=rule) for element in ("fp4_e2m1", "fp6_e2m3", "fp6_e3m2", "fp8_e4m3fn", "fp8_e5m2") for rule in EXPONENT_RULES),
    replace(MX, element="int8"),
    replace(MX, element="fp4_e0m3", exponent_rule="even"),
    replace(MX, second_scale="group", second_group=96, exponent_rule="ceil"),
    replace(MX, upper_bound=1.5, lower_bound=0.25),
    NVFP4,
    replace(NVFP4, scale_type="e5m3", second_scale="none"),
    replace(NVFP4, second_scale="none", lowest_scale=0.0625),
    replace(NVFP4, second_scale="static", second=500.0, second_divides=True),
    replace(NVFP4, second_scale="static", second=0.002, clipped=True, clip=0.8),
    replace(NVFP4, clipped=True, clip=0.8),
    replace(NVFP4, upper_bound=1.5),
    ActivationSpec("int8", "token", reciprocal=True),
    ActivationSpec("int8", "token", symmetric=False, reciprocal=True),
    ActivationSpec("int4", "token", symmetric=False, clipped=True, clip=0.7),
    ActivationSpec("int4", "group", 32, symmetric=False),
    ActivationSpec("int8", "group", 24, top=127.0),
    ActivationSpec("int4", "group", 32, top=7.0, clipped=True, clip=0.6),
    ActivationSpec("int8", "token", symmetric=False, outlier_threshold=1.5),
    ActivationSpec("int8", "tensor", top=127.0, outlier_threshold=2.5),
    ActivationSpec("int8", "tensor", symmetric=False),
    ActivationSpec("int8", "tensor", dynamic=False, scale=0.02, zero=3, symmetric=False, reciprocal=True),
    ActivationSpec("fp8_e4m3fn", "tensor"),
    ActivationSpec("fp8_e4m3fnuz", "token"),
    ActivationSpec("fp8_e5m2", "token", upper_bound=0.7),
    ActivationSpec("fp8_e4m3fn", "token", scale_type="e4m3", second_scale="dynamic"),
]


def name_of(spec: ActivationSpec) -> str:
    extra = [spec.exponent_rule] if spec.scale_type == "e8m0" else []
    flags = [f for f in ("clipped", "reciprocal", "second_divides") if getattr(spec, f)]
    return "-".join([spec.describe().replace(" ", "-"), *extra, *flags, *(f"{spec.top:g}" for _ in range(spec.top is not None))])


def inputs(dtype: torch.dtype, k: int = 100) -> torch.Tensor:
    """Rows of order 1, of one sign, of zeros, of very large and very small numbers, on ties of small types."""
    x = torch.randn(7, k, generator=torch.Generator().manual_seed(k))
    x[1], x[2], x[3] = x[1].abs(), 0.0, x[3] * 100
    x[4] *= 2.0**-20
    x[4, : k // 2] *= 2.0**-9
    x[5] = (torch.arange(k) % 33 - 16) / 8
    x[6] = -x[6].abs()
    return x.to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize("index", range(len(SPECS)), ids=lambda i: name_of(SPECS[i]))
def test_codes_scales_and_zeros_are_the_definitions(index):
    spec = SPECS[index] if SPECS[index].second is not None or SPECS[index].scale is not None else sample_activation(SPECS[index])
    x = inputs((torch.float32, torch.bfloat16, torch.float32, torch.float16)[index % 4])
    for found, wanted in zip(quantize(spec, x), spec.quantize(x), strict=True):
        assert same(found, wanted)
    assert same(fake_quantize(spec, x[:2, :33]), spec.fake_quantize(x[:2, :33]))


def test_all_but_outliers_and_ranges_of_rows_in_groups_runs_here():
    assert not covered(NO_ACTIVATION)
    left = [spec for spec in SPECS if not covered(spec)]
    assert left == [replace(NVFP4, clipped=True, clip=0.8)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_codes_come_in_any_type_that_holds_them(dtype):
    x = inputs(torch.float32)
    codes, _, _ = quantize(ActivationSpec("fp8_e4m3fn", "token"), x, dtype)
    assert codes.dtype == dtype and torch.equal(codes.float(), ActivationSpec("fp8_e4m3fn", "token").quantize(x)[0])


@pytest.mark.parametrize("spec", [replace(MX, exponent_rule="even"), replace(MX, element="fp8_e4m3fn"), replace(MX, element="fp8_e5m2"), NVFP4], ids=name_of)
def test_bytes_are_the_same_numbers(spec):
    x = inputs(torch.bfloat16, 67)  # an odd last column, a short last group
    found, (codes, scale, _) = block_codes(spec, x), spec.quantize(x)
    stored = found.codes
    if spec.bits == 4:
        stored = torch.stack((stored & 15, stored >> 4), dim=-1).flatten(1)[:, : x.shape[1]]
    assert torch.equal(decode(stored, SMALL_FLOATS[spec.element]), codes)
    assert torch.equal(decode_block_scale(found.scale, spec.scale_type) * (1 if found.second is None else found.second), scale)


def test_what_has_no_bytes_is_refused():
    with pytest.raises(LayoutError, match="groups of small floats"):
        block_codes(ActivationSpec("int8", "token"), torch.zeros(1, 32))


def test_stored_scales_of_rows_replace_the_modules():
    spec, x = ActivationSpec("int8", "tensor", dynamic=False, scale=1.0), inputs(torch.float32)
    stored = torch.rand(len(x), 1, generator=torch.Generator().manual_seed(2)) + 0.01
    codes, scale, _ = quantize(spec, x, stored=stored)
    assert torch.equal(scale, stored) and torch.equal(codes, torch.cat([replace(spec, scale=float(s)).quantize(row[None])[0] for s, row in zip(stored, x, strict=True)]))


@pytest.mark.parametrize("spec", [ActivationSpec("int8", "token", symmetric=False), ActivationSpec("fp8_e4m3fn", "token"), MX, NVFP4], ids=name_of)
def test_a_nan_shows_and_no_rows_give_no_rows(spec):
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    x[1, 3] = float("nan")
    values = fake_quantize(spec, x)
    assert bool(values[1, :16].isnan().any()) and (spec is NVFP4 or not bool(values[0].isnan().any()))
    codes, scale, zero = quantize(spec, x[:0])
    assert codes.shape == (0, 64) and scale.shape == zero.shape and len(scale) == 0
