"""One-byte scales of blocks: E8M0, E4M3 and the unsigned E5M3, decoded, encoded, and chosen for a block's values.

    e8m0  2^(code - 127), 255 is NaN; no zero                                  MX
    e4m3  the fp8_e4m3fn number of the code; a scale is never negative          NVFP4
    e5m3  unsigned, bias 15: 2^(e - 15) (1 + m / 8), or 2^-14 m / 8 for e = 0; 255 is NaN   AMD FP4, NVFP4 with E5M3 scales
Source: formats specification, section 0.2 (part 1) and section 3.2 (part 2).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from bitgrain.numerics.small_floats import E4M3FN, SMALL_FLOATS, decode_e8m0, decode_table

SCALE_TYPES = ("e8m0", "e4m3", "e5m3")

# The largest power of two that an element type holds.
LARGEST_EXPONENT = {"fp4_e0m3": 0, "fp4_e2m1": 2, "fp6_e2m3": 2, "fp6_e3m2": 4, "fp8_e4m3fn": 8, "fp8_e5m2": 15, "int8": 0}
EXPONENT_RULES = ("floor", "ceil", "round", "even", "top")
# Fraction bits below which "round" rounds a block's peak: those of E2M1 for every element but these.
ROUND_BITS = {"fp6_e2m3": 3, "fp6_e3m2": 2}


@cache
def _table(kind: str) -> Tensor:
    """float32 [256]: the value of every code; do not write to it."""
    code = torch.arange(256)
    if kind == "e8m0":
        return decode_e8m0(code)
    if kind == "e4m3":
        return decode_table(E4M3FN)
    mantissa, exponent = (code % 8).double() / 8, code // 8
    value = torch.where(exponent > 0, (1 + mantissa) * torch.exp2((exponent - 15).double()), mantissa * 2.0**-14)
    value[255] = float("nan")
    return value.float()


def largest_scale(kind: str) -> float:
    """The largest finite scale of a type."""
    table = _table(kind)
    return float(table[torch.isfinite(table)].max())


def decode_block_scale(codes: Tensor, kind: str) -> Tensor:
    """float32 of uint8 codes, same shape; NaN codes stay NaN.

    Args:
        kind: one of SCALE_TYPES.
    """
    return _table(kind).to(codes.device)[codes.long()]


def encode_block_scale(scale: Tensor, kind: str) -> Tensor:
    """uint8 codes of float32 scales >= 0, rounded to nearest (ties to even), saturated; E8M0 takes powers of two as they are."""
    if kind == "e8m0":
        exponent = torch.round(torch.log2(scale.double().clamp(min=2.0**-127)))
        return (exponent.clamp(-127, 127) + 127).to(torch.uint8)
    table = _table(kind)[:128] if kind == "e4m3" else _table(kind)
    keys = table[torch.isfinite(table)].to(scale.device)
    above = torch.searchsorted(keys, scale.float().clamp(0, largest_scale(kind)).contiguous()).clamp(1, len(keys) - 1)
    low, high = keys[above - 1].double(), keys[above].double()
    middle, value = (low + high) / 2, scale.double()
    # codes of equal spacing alternate between even and odd mantissas
    up = (value > middle) | ((value == middle) & (above % 2 == 0))
    return torch.where(up, above, above - 1).to(torch.uint8)


def shared_exponent(peak: Tensor, element: str, rule: str) -> Tensor:
    """float32 power of two by which a block is divided before it is rounded to `element`; same shape as `peak`.

    floor  2^(floor(log2 peak) - emax)                                       OCP MX 1.0, AutoRound
    ceil   2^ceil(log2(peak / max))                                          ModelOpt
    round  as floor, after the peak was rounded up from 1.75 * 2^e on (E2M3: 1.9375, E3M2: 1.875)  compressed-tensors
    even   as floor, after the peak was rounded to the element's mantissa, ties to even           Quark
    top    2^(ceil(log2 peak) - emax)                                                             Quark

    "round" uses the threshold of E2M1 for one-byte elements too: 1.75 * 2^8 is the largest E4M3 number.  An all-zero block
    gets the smallest exponent.

    Args:
        peak:    float32, the largest magnitude of each block.
        element: a key of LARGEST_EXPONENT.
    """
    largest = LARGEST_EXPONENT[element]
    mantissa = SMALL_FLOATS[element].mantissa_bits if element in SMALL_FLOATS else 6
    fraction, exponent = torch.frexp(peak.float())  # 0.5 <= fraction < 1
    if rule == "ceil":
        top = SMALL_FLOATS[element].max if element in SMALL_FLOATS else 127 / 64
        power = torch.ceil(torch.log2(peak.double() / top))
    else:
        step = 2.0 ** -(mantissa + 1)
        if rule == "round":
            fraction = fraction + 2.0 ** -(ROUND_BITS.get(element, 1) + 2)
        elif rule == "even":
            fraction = torch.round(fraction / step) * step
        # a power of two is its own ceiling
        raised = fraction > 0.5 if rule == "top" else fraction >= 1
        power = (exponent - 1 + raised.int() - largest).double()
    power = torch.where(peak == 0, torch.full_like(power, -127.0), power)
    return torch.exp2(power.clamp(-127, 127)).float()
