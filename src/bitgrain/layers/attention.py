"""Grouped-query attention over the caches of a batch's sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bitgrain.kernels.decode_step import AppendOperation, AttentionOperation, Place, RotaryOperation, StepDescription, Undescribed
from bitgrain.kvcache.cache import SequenceCache
from bitgrain.kvcache.spec import KVCacheSpec
from bitgrain.layers.norm import NormStyle

if TYPE_CHECKING:
    from bitgrain.layers.builder import ModelBuilder


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Sizes and switches of one attention module.

    Args:
        kv_heads:    divides `heads`.
        window:      tokens that a token attends to, itself included; None: all.
        norm:        the norms of q and k (q_norm, k_norm); None: there are none.
        norm_all:    one such norm over all heads together, instead of one over each.
        sinks:       each head has a learned score (sinks) of a token that is not there and has no value.
        joint:       q, k and v are stored as one module, qkv_proj.
        interleaved: rotary pairs are neighbours.
        local:       turned by the angles of layers with a window, where those have their own.
        scale:       of scores; None: 1 / sqrt(head_dim).
        cap:         scores s become cap * tanh(s / cap); None: they stay.
    """

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    norm: NormStyle | None = None
    norm_all: bool = False
    sinks: bool = False
    joint: bool = False
    interleaved: bool = False
    local: bool = False
    scale: float | None = None
    cap: float | None = None

    @property
    def heights(self) -> tuple[int, int, int]:
        """Out features of q, k and v."""
        return self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of one forward pass share.

    Args:
        cosine, sine: [T, 1, R], of each row's position; R entries of a head are rotated.
        parts:        (cache, first row, number of rows) of each sequence, in the order of rows.
        local:        cosine and sine of layers with a window, where those have their own.
        query_scale:  [T, 1, 1], multiplies the rotated queries; None: nothing does.
    """

    cosine: Tensor
    sine: Tensor
    parts: tuple[tuple[SequenceCache, int, int], ...]
    local: tuple[Tensor, Tensor] | None = None
    query_scale: Tensor | None = None


class Attention(nn.Module):
    """y = o(softmax(cap(scale q k^T) + mask) v), each sequence by itself.

    Maps of q and k behind the rotary embedding run if the checkpoint has them; keys are cached in their basis.

    Args:
        index: the layer's place in the caches.
    """

    def __init__(self, builder: ModelBuilder, name: str, index: int, shape: AttentionShape) -> None:
        super().__init__()
        self.name, self.index, self.shape = name, index, shape
        stored = tuple(f"{name}.{part}_proj" for part in "qkv")
        self.qkv = builder.joint_linear(f"{name}.qkv_proj", shape.heights) if shape.joint else builder.linears(stored)
        sizes = shape.heights if shape.norm_all else (shape.head_dim, shape.head_dim)
        self.q_norm = None if shape.norm is None else shape.norm.build(builder, f"{name}.q_norm", sizes[0])
        self.k_norm = None if shape.norm is None else shape.norm.build(builder, f"{name}.k_norm", sizes[1])
        self.o = builder.linear(f"{name}.o_proj")
        self.sinks = builder.vector(f"{name}.sinks", shape.heads) if shape.sinks else None
        self.cache_spec = builder.kv_cache_spec(name)
        self.q_maps, self.k_maps = builder.head_transforms(name, shape.head_dim)
        self.rotary = builder.step_kernel("rotary", shape.head_dim)
        self.kernel = builder.step_kernel("attention", shape.head_dim)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """[T, hidden] for x [T, hidden]; appends keys and values to the caches."""
        q, k, v = self.qkv(x)
        if self.shape.norm_all:
            q, k = self._normed(q, k)
        q, k, v = (part.unflatten(-1, (-1, self.shape.head_dim)) for part in (q, k, v))
        if not self.shape.norm_all:
            q, k = self._normed(q, k)
        q, k = self._turned(q, k, step)
        for transform in self.q_maps:
            q = transform.apply(q)
        for transform in self.k_maps:
            k = transform.apply(k)
        mixed = []
        for cache, start, count in step.parts:
            rows = slice(start, start + count)
            cache.append(self.index, k[rows], v[rows])
            keys, values = cache.read(self.index, q.dtype)
            mixed.append(self.kernel.apply(q[rows], keys, values, self.shape.window, self.sinks, self.shape.scale, self.shape.cap))
        out: Tensor = self.o((mixed[0] if len(mixed) == 1 else torch.cat(mixed)).flatten(1))
        return out

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return (q, k) if self.q_norm is None or self.k_norm is None else (self.q_norm(q), self.k_norm(k))

    def _turned(self, q: Tensor, k: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Queries and keys at their positions."""
        cosine, sine = step.local if self.shape.local and step.local is not None else (step.cosine, step.sine)
        q, k = (self.rotary.apply(part, cosine, sine, self.shape.interleaved) for part in (q, k))
        return (q if step.query_scale is None else q * step.query_scale), k

    def describe_step(self, step: StepDescription, source: Place, name: str) -> Place:
        """Its operations in a decode step; see kernels.decode_step."""
        shape = self.shape
        if self.q_maps or self.k_maps:
            raise Undescribed(f"{self.name} maps queries and keys behind the rotary embedding")
        if self.cache_spec != KVCacheSpec():
            raise Undescribed(f"{self.name} keeps a KV cache in {self.cache_spec.element}")
        q, k, v = step.parts(self.qkv, source, f"{name}.qkv")
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm.describe_into(step, q, q), self.k_norm.describe_into(step, k, k)
        for part in (q, k):
            step.add(RotaryOperation(self.rotary, part, shape.head_dim, shape.interleaved, shape.local))
        step.add(AppendOperation(self.index, k, v))
        step.stores[self.index] = (shape.kv_heads, shape.head_dim)
        mixed = step.place(f"{name}.mixed", q.width)
        step.add(
            AttentionOperation(self.kernel, q, mixed, self.index, shape.heads, shape.kv_heads, shape.head_dim, shape.window, self.sinks, shape.scale, shape.cap)
        )
        return step.through(self.o, mixed, f"{name}.o")
