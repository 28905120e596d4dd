"""Rounding a dense matrix to the nearest quantized one, group by group, without calibration data.

    int, symmetric    s = amax / (2^(b-1) - 1/2), code = clamp(round(w / s) + 2^(b-1))
    int, zero points  s = (max - min) / (2^b - 1) with 0 included, z = round(-min / s), code = clamp(round(w / s) + z)
    float8            s = amax / largest number of the type
    MX                s = the power of two that numerics.block_scales gives by its rule "even", for 8 bits "ceil"
    NVFP4             t = amax / (largest scale * largest element), s = the E4M3 number nearest to amax of the block / (6 t)
    lookup            s = amax, code = the nearest entry of the NF4 table
All of it in float32, rounding ties to even.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.errors import LayoutError
from bitgrain.numerics.block_scales import decode_block_scale, encode_block_scale, largest_scale, shared_exponent
from bitgrain.numerics.small_floats import SMALL_FLOATS, encode
from bitgrain.weights import BlockFloatWeight, CodebookWeight, FloatWeight, IntAffineWeight, Weight, WeightSpec
from bitgrain.weights.float8 import FLOAT8_NAMES

# Quantiles of a normal distribution, zero included, scaled to [-1, 1].  Source: Dettmers et al., QLoRA (2023), appendix E.
NF4_TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
TINY = 2.0**-126


def quantize_nearest(dense: Tensor, spec: WeightSpec) -> Weight:
    """The weight of `spec` that rounding gives.

    Args:
        dense: floating point [N, K], finite.
        spec:  as in quantize.targets.TARGETS.
    Raises:
        LayoutError: no rule for such a spec.
    """
    values = dense.float()
    if spec.kind == "int_affine":
        return _int_affine(values, spec)
    if spec.kind == "float":
        return _float8(values, spec)
    if spec.kind == "block_float":
        return _block_float(values, spec)
    if spec.kind == "codebook":
        return _lookup(values, spec)
    raise LayoutError("quantize_nearest", spec.describe(), "integers, float8, blocks of small floats or a lookup table", "choose another target")


def _blocks(values: Tensor, size: int) -> Tensor:
    """[N, G, size], zeros after the last column."""
    short = -values.shape[1] % size
    padded = torch.nn.functional.pad(values, (0, short)) if short else values
    return padded.view(values.shape[0], -1, size)


def _int_affine(values: Tensor, spec: WeightSpec) -> Weight:
    n, k = values.shape
    size = min(spec.group_size, k) if spec.granularity == "group" else k
    grouped, half = _blocks(values, size), 1 << (spec.bits - 1)
    top = 2 * half - 1
    zero: int | Tensor = half
    if spec.zero == "constant":
        scale = (grouped.abs().amax(-1) / (top / 2)).clamp(min=TINY)
        codes = torch.round(grouped / scale[..., None]) + half
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = ((high - low) / top).clamp(min=TINY)
        zero = torch.round(-low / scale).clamp(0, top).to(torch.int16)
        codes = torch.round(grouped / scale[..., None]) + zero[..., None]
    codes = codes.clamp(0, top).to(torch.uint8).view(n, -1)[:, :k].contiguous()
    return IntAffineWeight.from_codes(codes, spec.bits, scale.to(getattr(torch, spec.scale_dtype)), zero, size)


def _float8(values: Tensor, spec: WeightSpec) -> Weight:
    n, k = values.shape
    rows, columns = {"tensor": (n, k), "channel": (1, k)}.get(spec.granularity, spec.block)
    grid = (-(-n // rows), -(-k // columns))
    padded = torch.nn.functional.pad(values, (0, grid[1] * columns - k, 0, grid[0] * rows - n))
    blocks = padded.view(grid[0], rows, grid[1], columns)
    scale = (blocks.abs().amax((1, 3)) / SMALL_FLOATS[spec.element].max).clamp(min=TINY)
    codes = (blocks / scale[:, None, :, None]).view(padded.shape)[:n, :k]
    dtype = next(d for d, name in FLOAT8_NAMES.items() if name == spec.element)
    limit = SMALL_FLOATS[spec.element].max
    return FloatWeight(codes.clamp(-limit, limit).contiguous().to(dtype), scale, (rows, columns))


def _block_float(values: Tensor, spec: WeightSpec) -> Weight:
    n, k = values.shape
    kind = SMALL_FLOATS[spec.element]
    blocks = _blocks(values, spec.group_size)
    peak = blocks.abs().amax(-1)
    second = None
    if spec.scale_dtype == "e8m0":
        # the largest E4M3 mantissa is 1.75: rounding a peak to its mantissa could leave it above the largest number
        rule = "ceil" if kind.bits == 8 else "even"
        scale = encode_block_scale(shared_exponent(peak, spec.element, rule), "e8m0")
        factor = decode_block_scale(scale, "e8m0")
    else:
        second = (peak.amax() / (largest_scale(spec.scale_dtype) * kind.max)).clamp(min=TINY).reshape(1, 1)
        scale = encode_block_scale(peak / kind.max / second, spec.scale_dtype)
        factor = decode_block_scale(scale, spec.scale_dtype) * second
    # a block whose scale is zero holds zeros
    divisor = torch.where(factor == 0, torch.full_like(factor, float("inf")), factor)
    codes = encode((blocks / divisor[..., None]).view(n, -1)[:, :k].contiguous(), kind)
    return BlockFloatWeight.from_codes(codes, spec.element, scale, spec.scale_dtype, spec.group_size, second, k if second is not None else 0)


def _lookup(values: Tensor, spec: WeightSpec) -> Weight:
    n, k = values.shape
    size = min(spec.group_size or k, k)
    blocks = _blocks(values, size)
    scale = blocks.abs().amax(-1).clamp(min=TINY)
    table = torch.tensor(NF4_TABLE)
    middles = (table[1:] + table[:-1]) / 2
    codes = torch.bucketize(blocks / scale[..., None], middles).to(torch.uint8)
    return CodebookWeight.from_codes(codes.view(n, -1)[:, :k].contiguous(), spec.bits, table[None], scale, size)
