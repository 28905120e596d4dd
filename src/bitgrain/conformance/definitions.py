"""What operations compute, in float64 on the host: what every kernel is held against."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.base import ExpertsProblem
from bitgrain.kernels.samples import join_of, sample_expert
from bitgrain.weights import ActivationSpec


def linear(x: Tensor, values: Tensor, activation: ActivationSpec, bias: Tensor | None) -> Tensor:
    """float64 [M, N] of x [M, K]: the quantized input times the dequantized weight, plus the bias.

    Args:
        values: float64 [N, K].
    """
    y = activation.fake_quantize(x).double() @ values.T
    return y if bias is None else y + bias.double()


def experts(problem: ExpertsProblem, x: Tensor, weight: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Experts of samples.sample_expert, rounded to x's dtype where separate modules round.

    Returns:
        (float64 [M, hidden], float64 [M, 1]: the largest magnitude of the terms that were summed).
    """
    out, size = torch.zeros(*x.shape, dtype=torch.float64), torch.zeros(x.shape[0], 1, dtype=torch.float64)
    join = join_of(problem)
    for index in range(problem.count):
        rows, places = (chosen == index).nonzero(as_tuple=True)
        if len(rows) == 0:
            continue
        gate_up, down, first, second, bias, down_bias = sample_expert(problem, index)
        halves = linear(x[rows], gate_up.dequantize().double(), first, bias).to(x.dtype)
        part = linear(join(*halves.chunk(2, -1)), down.dequantize().double(), second, down_bias) * weight[rows, places, None].double()
        out[rows] += part
        size[rows] = torch.maximum(size[rows], part.abs().amax(1, keepdim=True))
    return out, size


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, wide: bool) -> Tensor:
    """See kernels.step.NormKernel; the quotient, or the product, is rounded to x's dtype."""
    values = x.double()
    quotient = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    y = (weight.double() * quotient).to(x.dtype) if wide else weight * quotient.to(x.dtype)
    return y.double() if bias is None else y.double() + bias.double()


def rotary(x: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool) -> Tensor:
    """See kernels.step.RotaryKernel: pairs (a, b) become (a cos - b sin, b cos + a sin); a pair is two neighbours, or halves apart."""
    y, turned = x.double().clone(), cosine.shape[-1]
    half = turned // 2
    first, second = (slice(0, turned, 2), slice(1, turned, 2)) if interleaved else (slice(0, half), slice(half, turned))
    a, b = y[..., first].clone(), y[..., second].clone()
    c, s = cosine.double(), sine.double()
    y[..., first], y[..., second] = a * c[..., first] - b * s[..., first], b * c[..., second] + a * s[..., second]
    return y


def attention(q: Tensor, keys: Tensor, values: Tensor, window: int | None, sinks: Tensor | None, scale: float | None, cap: float | None) -> Tensor:
    """See kernels.step.AttentionKernel."""
    q, keys, values = q.double(), *(x.double().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (keys, values))
    scores = torch.einsum("thd,lhd->htl", q, keys) * (q.shape[2] ** -0.5 if scale is None else scale)
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    behind = torch.arange(len(keys) - len(q), len(keys))[:, None] - torch.arange(len(keys))
    scores = scores.masked_fill((behind < 0) | (behind >= (window or len(keys))), -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[:, None, None].expand(-1, len(q), 1)), dim=2)
    return torch.einsum("htl,lhd->thd", torch.softmax(scores, dim=2)[..., : len(keys)], values)
