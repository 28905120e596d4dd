"""Attention against the formula written out."""

import sys

import pytest
import torch

from bitgrain.kernels.reference.attention import attend, visible

MODULE = sys.modules[attend.__module__]


def written_out(q, keys, values, window, sinks=None, scale=None, cap=None):
    """softmax(cap(scale q k^T)) v in float64, one head and one row at a time; a sink takes part in the sum below only."""
    count, heads, dim = q.shape
    total, groups, _ = keys.shape
    out = torch.zeros(count, heads, dim, dtype=torch.float64)
    for row in range(count):
        place = total - count + row
        first = 0 if window is None else max(0, place - window + 1)
        for head in range(heads):
            group = head // (heads // groups)
            k, v = keys[first : place + 1, group].double(), values[first : place + 1, group].double()
            scores = k @ q[row, head].double() * (dim**-0.5 if scale is None else scale)
            weight = torch.exp(scores if cap is None else cap * torch.tanh(scores / cap))
            out[row, head] = weight @ v / (weight.sum() + (0 if sinks is None else torch.exp(sinks[head].double())))
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 8, 50])
@pytest.mark.parametrize(("count", "total"), [(1, 1), (1, 9), (9, 9), (4, 9), (2, 17)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_is_the_formula(window, count, total, groups):
    generator = torch.Generator().manual_seed(total)
    q, keys, values = (torch.randn(n, h, 16, generator=generator) for n, h in ((count, 4), (total, groups), (total, groups)))
    found = attend(q, keys, values, window)
    assert found.shape == (count, 4, 16)
    assert torch.allclose(found.double(), written_out(q, keys, values, window), atol=2e-6)


def test_visible_tokens_are_the_past_and_the_window():
    assert visible(2, 4, None, torch.device("cpu")).tolist() == [[True, True, True, False], [True, True, True, True]]
    assert visible(2, 4, 2, torch.device("cpu")).tolist() == [[False, True, True, False], [False, False, True, True]]


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize(("count", "total"), [(1, 1), (1, 9), (9, 9), (4, 9)])
@pytest.mark.parametrize(("groups", "dim"), [(1, 16), (2, 24), (4, 10)])
def test_attention_with_sinks_is_the_formula(window, count, total, groups, dim):
    generator = torch.Generator().manual_seed(total)
    q, keys, values = (torch.randn(n, h, dim, generator=generator) for n, h in ((count, 4), (total, groups), (total, groups)))
    sinks = torch.tensor([-2.0, 0.3, 1.5, 6.0])
    before = [t.clone() for t in (q, keys, values, sinks)]
    found = attend(q, keys, values, window, sinks)
    assert found.shape == (count, 4, dim)
    assert torch.allclose(found.double(), written_out(q, keys, values, window, sinks), atol=2e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, keys, values, sinks), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [24, 64])
def test_sinks_are_exact_in_sixteen_bits(dtype, dim):
    """A sink far from zero must not be rounded by the square root of the head size: the bound is that of the values."""
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.zeros(7, 2, dim, dtype=dtype), torch.ones(7, 2, dim, dtype=dtype)
    q, sinks = torch.randn(1, 4, dim, generator=generator).to(dtype), torch.tensor([9.0, 5.0, 2.0, -7.0]).to(dtype)
    want = 7 / (7 + torch.exp(sinks.double()))
    found = attend(q, keys, values, None, sinks).double()
    assert torch.allclose(found, want[None, :, None].expand_as(found), rtol=0.6 * torch.finfo(dtype).eps)


def test_without_sinks_nothing_is_added():
    q, keys, values = (torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    far = attend(q, keys, values, None, torch.full((2,), -80.0))
    assert torch.allclose(far, attend(q, keys, values, None), atol=1e-6)


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize(("count", "total"), [(1, 1), (1, 9), (9, 9), (4, 9), (2, 17)])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("held", [1 << 24, 1, 100], ids=["one-block", "row-by-row", "some-rows"])
def test_capped_attention_is_the_formula_in_blocks_of_any_size(monkeypatch, window, count, total, groups, held):
    monkeypatch.setattr(MODULE, "CAPPED_SCORES", held)
    generator = torch.Generator().manual_seed(total)
    q, keys, values = (3 * torch.randn(n, h, 16, generator=generator) for n, h in ((count, 4), (total, groups), (total, groups)))
    before = [t.clone() for t in (q, keys, values)]
    found = attend(q, keys, values, window, scale=0.4, cap=2.5)
    assert torch.allclose(found.double(), written_out(q, keys, values, window, scale=0.4, cap=2.5), atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, keys, values), strict=True))


def test_scores_of_capped_attention_are_held_in_blocks(monkeypatch):
    monkeypatch.setattr(MODULE, "CAPPED_SCORES", 4 * 64 * 8)
    largest, softmax = [], torch.softmax

    def watched(scores, dim):
        largest.append(scores.numel())
        return softmax(scores, dim)

    monkeypatch.setattr(torch, "softmax", watched)
    q, keys, values = (torch.randn(64, h, 16) for h in (4, 2, 2))
    attend(q, keys, values, None, cap=5.0)
    assert len(largest) == 8 and max(largest) <= 4 * 64 * 8


def test_capped_attention_rounds_to_the_dtype_of_queries_only():
    generator = torch.Generator().manual_seed(3)
    q, keys, values = (torch.randn(n, h, 16, generator=generator).bfloat16() for n, h in ((5, 4), (9, 2), (9, 2)))
    found = attend(q, keys, values, None, scale=0.3, cap=4.0)
    expected = written_out(q, keys, values, None, scale=0.3, cap=4.0)
    assert found.dtype is torch.bfloat16
    assert torch.allclose(found.double(), expected, rtol=0.6 * torch.finfo(torch.bfloat16).eps, atol=1e-6)


@pytest.mark.parametrize("sinks", [None, torch.tensor([-2.0, 0.3, 1.5, 6.0])], ids=["plain", "sinks"])
def test_scale_takes_the_place_of_the_root_of_a_head(sinks):
    generator = torch.Generator().manual_seed(5)
    q, keys, values = (torch.randn(n, h, 16, generator=generator) for n, h in ((4, 4), (9, 2), (9, 2)))
    found = attend(q, keys, values, 3, sinks, scale=0.7)
    assert torch.allclose(found.double(), written_out(q, keys, values, 3, sinks, scale=0.7), atol=2e-6)
    assert not torch.allclose(found, attend(q, keys, values, 3, sinks), atol=1e-2)
