"""Multi-head latent attention: keys and values of all heads come from one small vector per token, which alone is cached.

    c = kv_norm(W_a x) [r],  k_h = [K_h c, rotated(k') ],  v_h = V_h c        k' [R] is shared by all heads; kv_b holds K_h and V_h
    score_h = scale * (q_h K_h c + rotated(q'_h) rotated(k'))                  out_h = sum over tokens of p_h * V_h c

The two ways to compute it are equal up to rounding:

    expanded   k_h and v_h of every cached token, then attention as usual: less work per pair of tokens
    absorbed   (K_h^T q_h) c, and V_h (sum p_h c): nothing is expanded, so that a step reads only what is cached

Either way kv_b is used as a dense copy in the dtype of activations: the absorbed way multiplies by each head's part of it,
and by its transpose, which no kernel of a linear module does.  An input quantization of kv_b is applied to c before it is
cached.  Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1; transformers 5.19 modeling_deepseek_v3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bitgrain.errors import RequestError
from bitgrain.kernels.reference.attention import visible
from bitgrain.layers.attention import Step
from bitgrain.layers.norm import NormStyle
from bitgrain.weights import ActivationSpec, Transform, Transformed

if TYPE_CHECKING:
    from bitgrain.layers.builder import ModelBuilder

PATHS = ("auto", "absorbed", "expanded")
# Elements that are held at once: scores of absorbed attention, keys and values of expanded attention.
HELD_ELEMENTS = 1 << 24
# Of the norms inside of latent attention, whatever config.json says of the others: so the models were made.
LATENT_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class LatentShape:
    """Sizes of one module of latent attention.

    Args:
        rank:        r, of a cached latent.
        nope, rope:  entries of a head's query and key that are not rotated, and that are.
        value:       of a head's value.
        scale:       of scores.
        q_rank:      of the queries' own latent; None: queries come straight from x.
        interleaved: rotary pairs are neighbours.
    """

    heads: int
    rank: int
    nope: int
    rope: int
    value: int
    scale: float
    q_rank: int | None = None
    interleaved: bool = True

    @property
    def query(self) -> int:
        """Entries of a head's query."""
        return self.nope + self.rope

    def prefers_absorbed(self, count: int) -> bool:
        """Whether `count` new tokens cost fewer multiplications absorbed: (2 r + R) per head and pair of tokens against
        (dn + R + dv), and r (dn + dv) per head and cached token to expand it."""
        return count * (2 * self.rank - self.nope - self.value) < self.rank * (self.nope + self.value)


@dataclass(slots=True)
class DenseCopy:
    """y = W m(x) + b, for a layer that multiplies by itself.

    Args:
        weight:     W [N, K] in the dtype of activations.
        bias:       [N] of the same, or None.
        maps:       of the input, one after another.
        activation: the quantization of the mapped input; what m(x) is after it.
    """

    weight: Tensor
    bias: Tensor | None
    maps: tuple[Transform, ...]
    activation: ActivationSpec

    @classmethod
    def of(cls, builder: ModelBuilder, name: str) -> DenseCopy:
        """The copy of a linear module, whatever its format.

        Raises:
            RequestError: what is quantized is not the input that W multiplies.
        """
        stored, activation, bias = builder.matrix((name,))
        maps: tuple[Transform, ...] = ()
        if isinstance(stored, Transformed) and not activation.is_none:
            if stored.low_rank is not None or stored.outputs:
                raise _unseparable(name, "a map of its output or a low-rank part, and a quantized input")
            maps, stored = stored.inputs, stored.inner
        if not activation.of_output().is_none:
            raise _unseparable(name, "a quantized output")
        weight = builder.moved_bias(stored.effective())
        assert weight is not None  # it is given one
        maps = tuple(m.map_tensors(lambda tensor: tensor.to(weight.device)) for m in maps)
        return cls(weight, builder.moved_bias(bias), maps, activation)

    def mapped(self, x: Tensor) -> Tensor:
        """m(x) [M, K] of x's dtype."""
        for transform in self.maps:
            x = transform.apply(x)
        return x if self.activation.is_none else self.activation.fake_quantize(x).to(x.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix, the bias and the maps."""
        held = [self.weight, *(() if self.bias is None else (self.bias,)), *(t for m in self.maps for t in m.data_tensors().values())]
        return sum(t.numel() * t.element_size() for t in held)


def _unseparable(name: str, found: str) -> RequestError:
    needed = "a matrix whose input alone is mapped or quantized, because latent attention uses it from both sides"
    return RequestError(name, found, needed, "use a checkpoint that leaves this module unquantized, or load with activations='none'")


class LatentAttention(nn.Module):
    """See the module.

    Args:
        index: the layer's place in the caches.
    Attributes:
        path: "absorbed", "expanded", or "auto": per sequence and step, whichever needs fewer multiplications.
    """

    def __init__(self, builder: ModelBuilder, name: str, index: int, shape: LatentShape) -> None:
        super().__init__()
        self.name, self.index, self.shape, self.path = name, index, shape, PATHS[0]
        first = "q_proj" if shape.q_rank is None else "q_a_proj"
        self.inputs = builder.linears((f"{name}.{first}", f"{name}.kv_a_proj_with_mqa"))
        style = NormStyle(LATENT_EPS)
        self.q_norm = None if shape.q_rank is None else style.build(builder, f"{name}.q_a_layernorm", shape.q_rank)
        self.q_b = None if shape.q_rank is None else builder.linear(f"{name}.q_b_proj")
        self.kv_norm = style.build(builder, f"{name}.kv_a_layernorm", shape.rank)
        self.kv_b = DenseCopy.of(builder, f"{name}.kv_b_proj")
        self.o = builder.linear(f"{name}.o_proj")
        self.rotary = builder.step_kernel("rotary", shape.rope)
        self.kernel = builder.step_kernel("attention", shape.query)
        self.cache_spec = builder.kv_cache_spec(name, latent=True)
        if any(builder.head_transforms(name, shape.rope)):
            raise RequestError(
                name, "maps of queries and keys behind the rotary embedding", "none: latent attention has no keys per head to map",
                "use a checkpoint without them, or run this one with the program that it was made for",
            )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of the dense copy of kv_b."""
        return self.kv_b.nbytes

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """[T, hidden] for x [T, hidden]; appends latents and rotated keys to the caches."""
        s = self.shape
        q, joint = self.inputs(x)
        if self.q_b is not None and self.q_norm is not None:
            q = self.q_b(self.q_norm(q))
        plain, turning = q.unflatten(-1, (s.heads, -1)).split((s.nope, s.rope), dim=-1)
        latent, key = joint.split((s.rank, s.rope), dim=-1)
        latent = self.kv_b.mapped(self.kv_norm(latent))
        turned, key = self._turned(turning, step), self._turned(key[:, None], step)
        mixed = []
        for cache, start, count in step.parts:
            rows = slice(start, start + count)
            cache.append(self.index, key[rows], latent[rows, None])
            keys, latents = cache.read(self.index, x.dtype)
            absorbed = self.path == "absorbed" or (self.path == "auto" and s.prefers_absorbed(count))
            mixed.append((self._absorbed if absorbed else self._expanded)(plain[rows], turned[rows], keys, latents[:, 0]))
        out: Tensor = self.o(torch.cat(mixed).flatten(1))
        return out

    def _turned(self, x: Tensor, step: Step) -> Tensor:
        """x [T, H, R] at its positions; interleaved pairs are drawn apart, alike in queries and keys."""
        if self.shape.interleaved:
            x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        out: Tensor = self.rotary.apply(x, step.cosine, step.sine, False)
        return out

    def _absorbed(self, plain: Tensor, turned: Tensor, keys: Tensor, latents: Tensor) -> Tensor:
        """[t, H, dv] for plain [t, H, dn], turned [t, H, R], keys [L, 1, R] and latents [L, r]; scores are float32."""
        s, count, total = self.shape, len(plain), len(latents)
        to_key, to_value = self.kv_b.weight.view(s.heads, -1, s.rank).split((s.nope, s.value), dim=1)
        inner = torch.bmm(plain.transpose(0, 1), to_key)  # [H, t, r]
        query = torch.cat((inner, turned.transpose(0, 1)), dim=-1).float()
        beside = torch.cat((latents, keys[:, 0]), dim=-1).float().t()  # [r + R, L]
        wide = latents.float()
        sums = torch.empty_like(inner)
        rows = max(1, HELD_ELEMENTS // (s.heads * total))
        for start in range(0, count, rows):
            part = query[:, start : start + rows]
            scores = (part.flatten(0, 1) @ beside).mul_(s.scale).unflatten(0, (s.heads, -1))
            if count > 1:  # the last token sees all
                scores.masked_fill_(~visible(count, total, None, latents.device)[start : start + rows], -torch.inf)
            weight = torch.softmax(scores, dim=-1)
            sums[:, start : start + rows] = (weight.flatten(0, 1) @ wide).unflatten(0, (s.heads, -1)).to(sums.dtype)
        out = torch.bmm(sums, to_value.transpose(1, 2)).transpose(0, 1)
        # what a bias adds to a head's keys adds the same to all its scores; its values get it whole, as weights sum to 1
        return out if self.kv_b.bias is None else out + self.kv_b.bias.view(s.heads, -1)[:, s.nope :]

    def _expanded(self, plain: Tensor, turned: Tensor, keys: Tensor, latents: Tensor) -> Tensor:
        """The same, from the keys and values of as many heads at once as fit into HELD_ELEMENTS."""
        s, total = self.shape, len(latents)
        height = s.nope + s.value
        many = min(s.heads, max(1, HELD_ELEMENTS // (total * (height + s.rope))))
        mixed = []
        for first in range(0, s.heads, many):
            heads = slice(first, min(first + many, s.heads))
            rows = slice(heads.start * height, heads.stop * height)
            bias = None if self.kv_b.bias is None else self.kv_b.bias[rows]
            expanded = nn.functional.linear(latents, self.kv_b.weight[rows], bias).unflatten(-1, (-1, height))
            own, values = expanded.split((s.nope, s.value), dim=-1)
            full = torch.cat((own, keys.expand(-1, own.shape[1], -1)), dim=-1)
            query = torch.cat((plain[:, heads], turned[:, heads]), dim=-1)
            mixed.append(self.kernel.apply(query, full, values, None, None, s.scale, None))
        return torch.cat(mixed, dim=1)
