"""Walsh-Hadamard transforms in Triton against the definition: interpreter only, not run on hardware."""

import pytest
import torch

from bitgrain.kernels.base import HadamardProblem
from bitgrain.kernels.triton import availability
from bitgrain.kernels.triton.hadamard import LARGEST_WIDTH, TritonHadamard
from bitgrain.weights import Hadamard

pytestmark = pytest.mark.skipif(bool(availability.missing("")), reason=availability.missing("") or "present")
KERNEL = TritonHadamard("cuda")
# (entries per block, order of the base): widths of 1 to thousands; bases in one program and, from 65 rows on, in a second pass
SIZES = [(1, 1), (2, 1), (8, 1), (64, 1), (4096, 1), (12, 12), (24, 12), (20 * 16, 20), (28 * 64, 28), (76, 76), (172 * 4, 172)]


def transform_of(size, order, transpose=False):
    signs = None if order == 1 else torch.randint(0, 2, (order, order), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
    return Hadamard(size, signs, size**-0.5, transpose)


@pytest.mark.parametrize("transpose", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize(("size", "order"), SIZES)
def test_transform_agrees_with_the_definition(size, order, transpose):
    transform = transform_of(size, order, transpose)
    assert KERNEL.refusal(HadamardProblem(size, order, "float32")) is None
    for shape in ((3, 2 * size), (2, 1, size)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(size))
        got, want = KERNEL.apply(x, KERNEL.prepare(transform)), transform.apply(x.double())
        if order == 1:
            assert torch.equal(got, transform.apply(x))  # the same sums
        assert got.shape == x.shape and torch.allclose(got.double(), want, atol=2e-6 * want.abs().max().item(), rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("size", "order"), [(64, 1), (24, 12), (76, 76)])
def test_narrow_types_are_rounded_once(dtype, size, order):
    transform = transform_of(size, order)
    x = torch.randn(4, size, generator=torch.Generator().manual_seed(1)).to(dtype)
    got, want = KERNEL.apply(x, KERNEL.prepare(transform)), transform.apply(x)
    assert got.dtype == dtype
    if order == 1:
        assert torch.equal(got, want)
    # sums in another order: a few are rounded the other way
    assert (got == want).float().mean() > 0.9 and torch.allclose(got.float(), want.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_no_rows_give_no_rows():
    assert KERNEL.apply(torch.empty(0, 64), KERNEL.prepare(transform_of(64, 1))).shape == (0, 64)


def test_what_it_does_not_take_is_refused():
    assert "a power of two times the base's size" in KERNEL.refusal(HadamardProblem(36, 12, "float32")).reason
    assert "powers of two up to" in KERNEL.refusal(HadamardProblem(2 * LARGEST_WIDTH, 1, "float32")).reason
