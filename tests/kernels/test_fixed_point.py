"""Four-bit codes times inputs in whole numbers: every length of group, every tile of rows, and sums at their bounds."""

from dataclasses import replace

import pytest
import torch

from bitgrain.conformance.grid import int_affine
from bitgrain.kernels.cpu import library
from bitgrain.kernels.cpu.block_float import BlockFloatLinear
from bitgrain.kernels.cpu.int_affine import IntAffineLinear
from bitgrain.weights import NO_ACTIVATION
from bitgrain.weights.block_float import block_float_spec
from bitgrain.weights.synthetic import sample_weight

SETS = library.available_sets()
pytestmark = pytest.mark.skipif(not SETS, reason=library.missing() or "no instruction set")

INTEGERS = [(IntAffineLinear(), int_affine(4, "group", size, "integer")) for size in (8, 16, 24, 32, 48, 64, 128, 136, 256)]
FLOATS = [(BlockFloatLinear(), block_float_spec("fp4_e2m1", size, "e8m0")) for size in (8, 16, 24, 32, 48, 128)]
# digits of -128 in the two lower bytes, near the largest number of a chunk
WORST = float(40 * 65536 - 128 * 256 - 128)


def label(value):
    return value.describe().replace(" ", "-") if hasattr(value, "describe") else ""


@pytest.fixture(params=SETS)
def instruction_set(request):
    before = library.instruction_set()
    library.choose_instruction_set(request.param)
    yield request.param
    library.choose_instruction_set(before)


def errors(kernel, weight, x):
    """The largest error of each row, as a share of its largest output, and the product."""
    y = kernel.apply(x, kernel.prepare(weight, NO_ACTIVATION), None)
    want = x.double() @ weight.dequantize().double().T
    return (y.double() - want).abs().amax(1) / want.abs().amax(1), y


@pytest.mark.parametrize(("kernel", "spec"), [*INTEGERS, *FLOATS], ids=label)
def test_every_length_of_group_and_every_tile_of_rows(kernel, spec, instruction_set):
    weight = sample_weight(spec, 37, 1040)
    x = torch.randn(9, 1040, generator=torch.Generator().manual_seed(3))
    share, whole = errors(kernel, weight, x)
    assert share.max() < 2e-6
    held = kernel.prepare(weight, NO_ACTIVATION)
    for rows in range(1, 9):
        assert torch.equal(kernel.apply(x[:rows], held, None), whole[:rows])
        assert torch.equal(kernel.apply(x[9 - rows :], held, None), whole[9 - rows :])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("code", [0x00, 0xFF, 0x77])
@pytest.mark.parametrize(("kernel", "spec"), [INTEGERS[3], INTEGERS[6], FLOATS[1], FLOATS[3], FLOATS[5]], ids=label)
def test_sums_at_their_bounds_do_not_overflow(kernel, spec, code, sign, instruction_set):
    weight = sample_weight(spec, 16, 512)
    weight = replace(weight, packed=torch.full_like(weight.packed, code))
    x = torch.full((5, 512), sign * WORST)
    want = x.double() @ weight.dequantize().double().T
    y = kernel.apply(x, kernel.prepare(weight, NO_ACTIVATION), None)
    # what is subtracted for zero points may be larger than the result
    size = WORST * 512 * (weight.dequantize().abs().max() + 16 * (weight.scale.float().abs().max() if kernel.name == "cpu.int_affine" else 0))
    assert ((y.double() - want).abs() <= 1e-6 * size).all()
