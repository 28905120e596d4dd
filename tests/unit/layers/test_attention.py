"""Attention against the formula written out."""

import pytest
import torch

from bitgrain.layers.attention import attend, visible


def written_out(q, keys, values, window):
    """softmax(q k^T / sqrt(D)) v in float64, one head and one row at a time."""
    count, heads, dim = q.shape
    total, groups, _ = keys.shape
    out = torch.zeros(count, heads, dim, dtype=torch.float64)
    for row in range(count):
        place = total - count + row
        first = 0 if window is None else max(0, place - window + 1)
        for head in range(heads):
            group = head // (heads // groups)
            k, v = keys[first : place + 1, group].double(), values[first : place + 1, group].double()
            out[row, head] = torch.softmax(k @ q[row, head].double() / dim**0.5, 0) @ v
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
