"""Causal attention in torch: scaled_dot_product_attention where it can compute what is asked, plain products where it cannot."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from bitgrain.kernels.reference.step import ReferenceStep

# Columns that a head is widened by for its sink: two are used, eight keep rows aligned.
SINK_COLUMNS = 8
# Scores of capped attention that are held at once, in float32.
CAPPED_SCORES = 1 << 24


class ReferenceAttention(ReferenceStep):
    """See kernels.step.AttentionKernel."""

    name = "reference.attention"

    def apply(
        self, q: Tensor, keys: Tensor, values: Tensor, window: int | None, sinks: Tensor | None, scale: float | None, cap: float | None
    ) -> Tensor:
        return attend(q, keys, values, window, sinks, scale, cap)


def attend(
    q: Tensor, keys: Tensor, values: Tensor, window: int | None, sinks: Tensor | None = None, scale: float | None = None, cap: float | None = None
) -> Tensor:
    """[t, H, D]: causal attention of the last t of L tokens.

    Args:
        q:            [t, H, D], the last t tokens of the sequence.
        keys, values: [L, G, D] of q's dtype, L >= t, G divides H.
        window:       tokens that a token attends to, itself included; None: all.
        sinks:        [H], a score that joins each head's softmax and brings no value; None: there is none.
        scale:        of scores; None: 1 / sqrt(D).
        cap:          scores s become cap * tanh(s / cap); None: they stay.  Not together with sinks.
    """
    count, total = q.shape[0], keys.shape[0]
    if window is not None and total > window + count - 1:
        drop = total - (window + count - 1)  # no row of q sees these
        keys, values, total = keys[drop:], values[drop:], total - drop
    if cap is not None:
        assert sinks is None
        return _attend_capped(q, keys, values, window, q.shape[2] ** -0.5 if scale is None else scale, cap)
    mask = None
    if count > 1 and (total > count or sinks is not None or (window is not None and window < total)):
        mask = visible(count, total, window, q.device)
    if sinks is not None:
        return _attend_with_sinks(q, keys, values, mask, sinks, q.shape[2] ** -0.5 if scale is None else scale)
    out = scaled_dot_product_attention(
        q.transpose(0, 1)[None], keys.transpose(0, 1)[None], values.transpose(0, 1)[None],
        attn_mask=mask, is_causal=mask is None and count > 1, scale=scale, enable_gqa=q.shape[1] != keys.shape[1],
    )  # fmt: skip
    return out[0].transpose(0, 1)


def _attend_capped(q: Tensor, keys: Tensor, values: Tensor, window: int | None, scale: float, cap: float) -> Tensor:
    """As attend(), with capped scores, in float32.

    Memory: float32 copies of keys and values, and the scores of as many rows of q as fit into CAPPED_SCORES, three times.
    """
    (count, heads, _), (total, groups, size) = q.shape, values.shape
    wide_keys, wide_values = keys.float().permute(1, 2, 0), values.float().transpose(0, 1)  # [G, D, L], [G, L, D]
    out = q.new_empty(count, heads, size)
    rows = max(1, CAPPED_SCORES // (heads * total))
    for start in range(0, count, rows):
        part = q[start : start + rows].float().unflatten(1, (groups, -1))  # [n, G, H / G, D]
        last = total - count + start + len(part)  # no row of the part sees a later token
        scores = part.permute(1, 2, 0, 3).flatten(1, 2) @ wide_keys[..., :last]  # [G, n H / G, last]
        scores.mul_(scale / cap).tanh_().mul_(cap)
        hidden = ~visible(len(part), last, window, q.device)
        scores = scores.unflatten(1, (-1, len(part))).masked_fill_(hidden, -torch.inf).flatten(1, 2)
        mixed = torch.softmax(scores, dim=-1) @ wide_values[:, :last]
        out[start : start + rows] = mixed.unflatten(1, (-1, len(part))).permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)
    return out


def _attend_with_sinks(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, sinks: Tensor, scale: float) -> Tensor:
    """As attend(), with a first key whose score is each head's sink and whose value is zero.

    Columns behind a head's own make that score without a bias per head: s in q, 1 / scale in the sink's key (in two parts, so
    that it is exact enough in 16 bits), zeros in every other key.

    Args:
        mask: bool [t, L], or None where every row sees all keys.
    """
    dim, size = q.shape[2], values.shape[2]
    root = torch.tensor(1 / scale, dtype=torch.float64)
    high = root.to(keys.dtype)
    low = (root - high.double()).to(keys.dtype)
    wide = pad(q, (0, SINK_COLUMNS))
    wide[..., dim : dim + 2] = sinks.to(q.dtype)[:, None]
    keys, values = (pad(x, (0, SINK_COLUMNS, 0, 0, 1, 0)) for x in (keys, values))
    keys[0, :, dim], keys[0, :, dim + 1] = high, low
    if mask is not None:
        mask = pad(mask, (1, 0), value=True)
    out = scaled_dot_product_attention(
        wide.transpose(0, 1)[None], keys.transpose(0, 1)[None], values.transpose(0, 1)[None],
        attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != keys.shape[1],
    )  # fmt: skip
    return out[0, ..., :size].transpose(0, 1)


def visible(count: int, total: int, window: int | None, device: torch.device) -> Tensor:
    """bool [count, total]: which of `total` tokens each of the last `count` sees."""
    behind = torch.arange(total - count, total, device=device)[:, None] - torch.arange(total, device=device)
    seen = behind >= 0
    return seen if window is None else seen & (behind < window)
