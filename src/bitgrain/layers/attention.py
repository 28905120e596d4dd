"""Grouped-query attention over the caches of a batch's sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from bitgrain.kvcache.cache import SequenceCache
from bitgrain.layers.norm import RMSNorm
from bitgrain.layers.rotary import rotate

if TYPE_CHECKING:
    from bitgrain.layers.builder import ModelBuilder

# Columns that a head is widened by for its sink: two are used, eight keep rows aligned.
SINK_COLUMNS = 8


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Sizes of one attention module.

    Args:
        kv_heads: divides `heads`.
        window:   tokens that a token attends to, itself included; None: all.
        norm_eps: None, or the epsilon of the norms over each head of q and k (q_norm, k_norm).
        sinks:    each head has a learned score (sinks) of a token that is not there and has no value.
    """

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    norm_eps: float | None = None
    sinks: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of one forward pass share.

    Args:
        cosine, sine: [T, 1, D], of each row's position.
        parts:        (cache, first row, number of rows) of each sequence, in the order of rows.
    """

    cosine: Tensor
    sine: Tensor
    parts: tuple[tuple[SequenceCache, int, int], ...]


class Attention(nn.Module):
    """y = o(softmax(q k^T / sqrt(D) + mask) v), each sequence by itself.

    Maps of q and k behind the rotary embedding run if the checkpoint has them; keys are cached in their basis.

    Args:
        index: the layer's place in the caches.
    """

    def __init__(self, builder: ModelBuilder, name: str, index: int, shape: AttentionShape) -> None:
        super().__init__()
        self.name, self.index, self.shape = name, index, shape
        self.qkv = builder.linears(tuple(f"{name}.{part}_proj" for part in "qkv"))
        eps, dim = shape.norm_eps, shape.head_dim
        self.q_norm = None if eps is None else RMSNorm(builder.vector(f"{name}.q_norm.weight", dim), eps)
        self.k_norm = None if eps is None else RMSNorm(builder.vector(f"{name}.k_norm.weight", dim), eps)
        self.o = builder.linear(f"{name}.o_proj")
        self.sinks = builder.vector(f"{name}.sinks", shape.heads) if shape.sinks else None
        self.cache_spec = builder.kv_cache_spec(name)
        self.q_maps, self.k_maps = builder.head_transforms(name, shape.head_dim)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """[T, hidden] for x [T, hidden]; appends keys and values to the caches."""
        q, k, v = (part.unflatten(-1, (-1, self.shape.head_dim)) for part in self.qkv(x))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, step.cosine, step.sine), rotate(k, step.cosine, step.sine)
        for transform in self.q_maps:
            q = transform.apply(q)
        for transform in self.k_maps:
            k = transform.apply(k)
        mixed = []
        for cache, start, count in step.parts:
            rows = slice(start, start + count)
            cache.append(self.index, k[rows], v[rows])
            keys, values = cache.read(self.index, q.dtype)
            mixed.append(attend(q[rows], keys, values, self.shape.window, self.sinks))
        out: Tensor = self.o(torch.cat(mixed).flatten(1))
        return out


def attend(q: Tensor, keys: Tensor, values: Tensor, window: int | None, sinks: Tensor | None = None) -> Tensor:
    """[t, H, D]: causal attention of the last t of L tokens.

    Args:
        q:            [t, H, D], the last t tokens of the sequence.
        keys, values: [L, G, D] of q's dtype, L >= t, G divides H.
        window:       tokens that a token attends to, itself included; None: all.
        sinks:        [H], a score that joins each head's softmax and brings no value; None: there is none.
    """
    count, total = q.shape[0], keys.shape[0]
    if window is not None and total > window + count - 1:
        drop = total - (window + count - 1)  # no row of q sees these
        keys, values, total = keys[drop:], values[drop:], total - drop
    mask = None
    if count > 1 and (total > count or sinks is not None or (window is not None and window < total)):
        mask = visible(count, total, window, q.device)
    if sinks is not None:
        return _attend_with_sinks(q, keys, values, mask, sinks)
    out = scaled_dot_product_attention(
        q.transpose(0, 1)[None], keys.transpose(0, 1)[None], values.transpose(0, 1)[None],
        attn_mask=mask, is_causal=mask is None and count > 1, enable_gqa=q.shape[1] != keys.shape[1],
    )  # fmt: skip
    return out[0].transpose(0, 1)


def _attend_with_sinks(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, sinks: Tensor) -> Tensor:
    """As attend(), with a first key whose score is each head's sink and whose value is zero.

    Columns behind a head's own make that score without a bias per head: s in q, sqrt(D) in the sink's key (in two parts, so
    that it is exact enough in 16 bits), zeros in every other key.

    Args:
        mask: bool [t, L], or None where every row sees all keys.
    """
    dim = q.shape[2]
    root = torch.tensor(dim**0.5, dtype=torch.float64)
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
        attn_mask=mask, scale=dim**-0.5, enable_gqa=q.shape[1] != keys.shape[1],
    )  # fmt: skip
    return out[0, ..., :dim].transpose(0, 1)


def visible(count: int, total: int, window: int | None, device: torch.device) -> Tensor:
    """bool [count, total]: which of `total` tokens each of the last `count` sees."""
    behind = torch.arange(total - count, total, device=device)[:, None] - torch.arange(total, device=device)
    seen = behind >= 0
    return seen if window is None else seen & (behind < window)
