"""Causal attention over 16-bit or 32-bit keys and values in Triton: softmax in one pass, everything between the products in float32.

Keys are taken in chunks that begin at fixed tokens, and chunks are joined in their order, so that a row's result is the same
whether the chunks run side by side (few rows) or one after the other.  This module imports triton, and is imported only when it runs.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from bitgrain.kernels.triton.ahead import CompileExample
from bitgrain.kernels.triton.rounding import narrowed


@triton.jit
def weight_of(score, peak):
    """exp(score - peak); 0 where nothing was seen."""
    return tl.where(score == float("-inf"), 0.0, tl.exp(score - tl.where(peak == float("-inf"), 0.0, peak)))


@triton.jit
def joined(peak, total, mixed, other_peak, other_total, other_mixed):
    """Two parts of a softmax as one: (largest score, sum of weights, weighted sum of values)."""
    new = tl.maximum(peak, other_peak)
    own, other = weight_of(peak, new), weight_of(other_peak, new)
    return new, total * own + other_total * other, mixed * own[:, None] + other_mixed * other[:, None]


@triton.jit
def product(weights, values, total, WIDE: tl.constexpr):
    """total + weights values; float32 weights times 16-bit values as two products, which together are as good as one in float32."""
    if WIDE:
        return tl.dot(weights, values.to(tl.float32), total, input_precision="ieee")
    if values.dtype == tl.float32:
        return tl.dot(weights, values, total, input_precision="ieee")
    high = weights.to(values.dtype)
    total = tl.dot(high, values, total)
    return tl.dot((weights - high.to(tl.float32)).to(values.dtype), values, total)


@triton.jit
def attend_chunk(
    rows_q, k_at, v_at, first, last, place, position, lowest, k_step, v_step, scale, cap, size, value_size,
    CAPPED: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A part of the softmax: that of keys `first` up to `last`; a row sees keys `lowest` to `position`."""
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total, mixed = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    for start in range(first, last, BLOCK_L):
        key = (start + tl.arange(0, BLOCK_L)).to(tl.int64)
        here = key < last
        keys = tl.load(k_at + key[None, :] * k_step + d[:, None], mask=here[None, :] & (d < size)[:, None], other=0)
        if WIDE:
            scores = tl.dot(rows_q.to(tl.float32), keys.to(tl.float32), input_precision="ieee") * scale
        else:
            scores = tl.dot(rows_q, keys, input_precision="ieee") * scale
        if CAPPED:
            scores = cap * (2.0 / (1.0 + tl.exp(tl.minimum(-2.0 * scores / cap, 88.0))) - 1.0)
        seen = here[None, :] & (key[None, :] <= position[:, None]) & (key[None, :] >= lowest[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(peak, tl.max(scores, axis=1))
        own = weight_of(peak, new)
        weights = weight_of(scores, new[:, None])
        values = tl.load(v_at + key[:, None] * v_step + e[None, :], mask=here[:, None] & (e < value_size)[None, :], other=0)
        total = total * own + tl.sum(weights, axis=1)
        mixed = product(weights, values, mixed * own[:, None], WIDE)
        peak = new
    return peak, total, mixed


@triton.jit
def attend(
    q, keys, values, sinks, out, peaks, totals,
    count, length, heads, per, size, value_size, q_step, q_head_step, k_step, k_head_step, v_step, v_head_step, window, scale, cap, chunk,
    SINKS: tl.constexpr, CAPPED: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """kernels.step.AttentionKernel for BLOCK_M rows (token, head) of one head of keys, which `per` heads of q share.

    Args:
        window: tokens that a token sees, itself included.
        chunk:  keys that are joined by themselves, a multiple of BLOCK_L.
        PARTS:  the program takes one chunk and writes its part: out float32 [chunks, count, heads, value_size], peaks and totals
                float32 [chunks, count, heads].
    """
    group = tl.program_id(1)
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = place < count * per
    token, head = (tl.where(here, place // per, 0)).to(tl.int64), group * per + place % per
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    rows_q = tl.load(q + token[:, None] * q_step + head[:, None] * q_head_step + d[None, :], mask=here[:, None] & (d < size)[None, :], other=0)
    position = token.to(tl.int32) + (length - count)
    lowest = tl.maximum(position - window + 1, 0)
    earliest = tl.maximum((tl.program_id(0) * BLOCK_M) // per + (length - count) - window + 1, 0)
    latest = tl.minimum((tl.program_id(0) * BLOCK_M + BLOCK_M - 1) // per, count - 1) + (length - count) + 1
    k_at, v_at = keys + group.to(tl.int64) * k_head_step, values + group.to(tl.int64) * v_head_step
    if PARTS:
        first = tl.maximum(tl.program_id(2) * chunk, earliest // BLOCK_L * BLOCK_L)
        last = tl.minimum(tl.program_id(2) * chunk + chunk, latest)
        peak, total, mixed = attend_chunk(
            rows_q, k_at, v_at, first, last, place, position, lowest, k_step, v_step, scale, cap, size, value_size, CAPPED, WIDE, BLOCK_M, BLOCK_L, BLOCK_D, BLOCK_E
        )
        at = (tl.program_id(2) * count + token) * heads + head
        tl.store(peaks + at, peak, mask=here)
        tl.store(totals + at, total, mask=here)
        tl.store(out + at[:, None] * value_size + e[None, :], mixed, mask=here[:, None] & (e < value_size)[None, :])
    else:
        peak, total, mixed = beginning(sinks, head, here, SINKS, BLOCK_M, BLOCK_E)
        for begin in range(earliest // chunk * chunk, latest, chunk):
            first = tl.maximum(begin, earliest // BLOCK_L * BLOCK_L)
            last = tl.minimum(begin + chunk, latest)
            own_peak, own_total, own_mixed = attend_chunk(
                rows_q, k_at, v_at, first, last, place, position, lowest, k_step, v_step, scale, cap, size, value_size,
                CAPPED, WIDE, BLOCK_M, BLOCK_L, BLOCK_D, BLOCK_E,
            )  # fmt: skip
            peak, total, mixed = joined(peak, total, mixed, own_peak, own_total, own_mixed)
        result = narrowed(mixed / total[:, None], out.dtype.element_ty, WIDE)
        tl.store(out + (token * heads + head)[:, None] * value_size + e[None, :], result, mask=here[:, None] & (e < value_size)[None, :])


@triton.jit
def beginning(sinks, head, here, SINKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """The softmax before any key: a head's sink has a weight and no value."""
    mixed = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    if SINKS:
        return tl.load(sinks + head, mask=here, other=0).to(tl.float32), tl.full((BLOCK_M,), 1.0, tl.float32), mixed
    return tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32), mixed


@triton.jit
def join_parts(
    parts, peaks, totals, sinks, out, rows, heads, value_size, chunks,
    SINKS: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Parts of chunks joined in their order, for `rows` rows of (token, head)."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    here, e = row < rows, tl.arange(0, BLOCK_E)
    both = here[:, None] & (e < value_size)[None, :]
    peak, total, mixed = beginning(sinks, row % heads, here, SINKS, BLOCK_M, BLOCK_E)
    for part in range(chunks):
        at = part * rows + row
        own_peak, own_total = tl.load(peaks + at, mask=here, other=0), tl.load(totals + at, mask=here, other=0)
        own_mixed = tl.load(parts + at[:, None] * value_size + e[None, :], mask=both, other=0)
        peak, total, mixed = joined(peak, total, mixed, own_peak, own_total, own_mixed)
    tl.store(out + row[:, None] * value_size + e[None, :], narrowed(mixed / total[:, None], out.dtype.element_ty, WIDE), mask=both)


_SIZES = ("count", "length", "heads", "per", "size", "value_size", "q_step", "q_head_step", "k_step", "k_head_step", "v_step", "v_head_step", "window", "chunk")
_TYPES = {
    **dict.fromkeys(("q", "keys", "values", "sinks", "out"), "*bf16"), "peaks": "*fp32", "totals": "*fp32", **dict.fromkeys(_SIZES, "i32"), "scale": "fp32", "cap": "fp32",
}  # fmt: skip
_TILES = {"SINKS": False, "CAPPED": False, "PARTS": False, "WIDE": False, "BLOCK_M": 64, "BLOCK_L": 64, "BLOCK_D": 128, "BLOCK_E": 128}
COMPILE_EXAMPLES = [
    CompileExample(attend, _TYPES, _TILES, "prefill", only=("sm90", "gfx942")),
    CompileExample(attend, {**_TYPES, "out": "*fp32"}, {**_TILES, "PARTS": True, "BLOCK_M": 16}, "decode"),
    CompileExample(attend, {**_TYPES, **dict.fromkeys(("q", "keys", "values", "sinks", "out"), "*fp16")}, {**_TILES, "SINKS": True, "BLOCK_M": 64, "BLOCK_D": 64, "BLOCK_E": 64}, "sinks", only=("sm80", "sm100")),
    CompileExample(attend, {**_TYPES, **dict.fromkeys(("q", "keys", "values", "sinks", "out"), "*fp32")}, {**_TILES, "CAPPED": True, "BLOCK_M": 16, "BLOCK_L": 16, "BLOCK_D": 256, "BLOCK_E": 256}, "capped", only=("sm80", "gfx942")),
    CompileExample(attend, _TYPES, {**_TILES, "BLOCK_M": 16, "BLOCK_L": 16, "BLOCK_D": 1024, "BLOCK_E": 512}, "large head", only=("sm90", "gfx942")),
    CompileExample(
        join_parts, {"parts": "*fp32", "peaks": "*fp32", "totals": "*fp32", "sinks": "*bf16", "out": "*bf16", **dict.fromkeys(("rows", "heads", "value_size", "chunks"), "i32")},
        {"SINKS": True, "WIDE": False, "BLOCK_M": 4, "BLOCK_E": 128},
    ),
]  # fmt: skip
