"""Norms, rotary embedding and gates in Triton, rounded where torch's own arithmetic rounds.

This module imports triton, and is imported only when one of them runs.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from bitgrain.kernels.triton.ahead import CompileExample
from bitgrain.kernels.triton.rounding import narrowed

SILU, GELU, GELU_TANH, RELU, CLAMPED = 0, 1, 2, 3, 4


@triton.jit
def rounded(value, TYPE: tl.constexpr, WIDE: tl.constexpr):
    """float32 that TYPE holds."""
    return narrowed(value, TYPE, WIDE).to(tl.float32)


@triton.jit
def norm_rows(x, weight, bias, out, k, step, eps, BIAS: tl.constexpr, LATE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """One row of kernels.step.NormKernel: x [M, k], rows `step` apart; out [M, k].  LATE: round after the product with the weight."""
    row = tl.program_id(0).to(tl.int64)
    kind = out.dtype.element_ty
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, k, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(x + row * step + at, mask=at < k, other=0).to(tl.float32)
        total += values * values
    factor = 1.0 / tl.sqrt(tl.sum(total, axis=0) / k + eps)
    for start in range(0, k, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(x + row * step + at, mask=at < k, other=0).to(tl.float32) * factor
        if not LATE:
            values = rounded(values, kind, WIDE)
        values = rounded(values * tl.load(weight + at, mask=at < k, other=0).to(tl.float32), kind, WIDE)
        if BIAS:
            values += tl.load(bias + at, mask=at < k, other=0).to(tl.float32)
        tl.store(out + row * k + at, narrowed(values, kind, WIDE), mask=at < k)


@triton.jit
def rotate_heads(
    x, cosine, sine, out, heads, size, turned, x_step, x_head_step,
    INTERLEAVED: tl.constexpr, WIDE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads of one row of kernels.step.RotaryKernel: x [T, heads, size]; cosine and sine [T, turned]; out [T, heads, size].

    Products are rounded to the type of x where the angles are of it, as torch rounds them.  Launch without fused multiply-adds.
    """
    row = tl.program_id(0).to(tl.int64)
    head, at = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    here = (head < heads)[:, None] & (at < size)[None, :]
    pair = here & (at < turned)[None, :]
    if INTERLEAVED:
        other, first = at ^ 1, (at % 2) == 0
    else:
        half = turned // 2
        first = at < half
        other = tl.where(first, at + half, at - half)
    line = x + row * x_step + head[:, None] * x_head_step
    own = tl.load(line + at[None, :], mask=here, other=0).to(tl.float32)
    partner = tl.load(line + other[None, :], mask=pair, other=0).to(tl.float32)
    partner = tl.where(first[None, :], -partner, partner)
    angle = tl.load(cosine + row * turned + at, mask=at < turned, other=0).to(tl.float32)
    across = tl.load(sine + row * turned + at, mask=at < turned, other=0).to(tl.float32)
    straight, crossed = own * angle[None, :], partner * across[None, :]
    if cosine.dtype.element_ty == x.dtype.element_ty:
        straight, crossed = rounded(straight, x.dtype.element_ty, WIDE), rounded(crossed, x.dtype.element_ty, WIDE)
    result = tl.where((at < turned)[None, :], straight + crossed, own)
    tl.store(out + (row * heads + head[:, None]) * size + at[None, :], narrowed(result, out.dtype.element_ty, WIDE), mask=here)


@triton.jit
def logistic(value):
    """1 / (1 + exp(-value)); its power stays finite."""
    return 1.0 / (1.0 + tl.exp(tl.minimum(-value, 88.0)))


@triton.jit
def activated(value, GATE: tl.constexpr):
    """The activation of a gate, float32."""
    if GATE == 0:
        return value * logistic(value)
    if GATE == 1:
        return 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    if GATE == 2:
        # (1 + tanh(u)) / 2 is the logistic function of 2 u
        return value * logistic(1.5957691216057308 * (value + 0.044715 * value * value * value))
    return tl.maximum(value, 0.0)


@triton.jit
def join_halves(gate, up, out, count, k, gate_step, up_step, alpha, limit, GATE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK entries of kernels.step.GateKernel: out [M, k] of `count` entries; gate and up [M, k], rows `*_step` apart."""
    kind = out.dtype.element_ty
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, column = at // k, at % k
    left = tl.load(gate + row * gate_step + column, mask=at < count, other=0).to(tl.float32)
    right = tl.load(up + row * up_step + column, mask=at < count, other=0).to(tl.float32)
    if GATE == 4:
        edge = rounded(limit + tl.zeros((BLOCK,), tl.float32), kind, WIDE)
        left = tl.where(left > edge, edge, left)
        right = tl.where(right > edge, edge, tl.where(right < -edge, -edge, right))
        opened = rounded(logistic(rounded(left * alpha, kind, WIDE)), kind, WIDE)
        result = rounded(right + 1.0, kind, WIDE) * rounded(left * opened, kind, WIDE)
    else:
        result = rounded(activated(left, GATE), kind, WIDE) * right
    tl.store(out + at, narrowed(result, kind, WIDE), mask=at < count)


_NORM = {"x": "*bf16", "weight": "*bf16", "bias": "*bf16", "out": "*bf16", "k": "i32", "step": "i32", "eps": "fp32"}
_ROTARY = {
    **dict.fromkeys(("x", "cosine", "sine", "out"), "*bf16"), **dict.fromkeys(("heads", "size", "turned", "x_step", "x_head_step"), "i32"),
}  # fmt: skip
_GATE = {
    **dict.fromkeys(("gate", "up", "out"), "*fp16"), **dict.fromkeys(("count", "k", "gate_step", "up_step"), "i32"), "alpha": "fp32", "limit": "fp32",
}  # fmt: skip
COMPILE_EXAMPLES = [
    CompileExample(norm_rows, _NORM, {"BIAS": True, "LATE": False, "WIDE": False, "BLOCK": 1024}),
    CompileExample(norm_rows, {**_NORM, "weight": "*fp32"}, {"BIAS": False, "LATE": True, "WIDE": False, "BLOCK": 4096}, "late", warps=8),
    CompileExample(rotate_heads, _ROTARY, {"INTERLEAVED": False, "WIDE": False, "BLOCK_H": 16, "BLOCK_D": 128}),
    CompileExample(rotate_heads, {**_ROTARY, "cosine": "*fp32", "sine": "*fp32"}, {"INTERLEAVED": True, "WIDE": False, "BLOCK_H": 4, "BLOCK_D": 64}, "interleaved"),
    *(CompileExample(join_halves, _GATE, {"GATE": gate, "WIDE": False, "BLOCK": 1024}, str(gate)) for gate in range(5)),
]
