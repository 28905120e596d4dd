"""Trellis codes: overlapping windows of a circular bit stream, and the values that a window stands for.

    window t of a stream = the `window` bits that begin at bit t * advance, most significant bit first, circular
    decoders, s the window read as a number:
        lut           row s of the table
        quantlut      row (z >> (16 - b)) mod 2^b of the table, z = s (s + 1), 2^b rows
        quantlut_sym  row (z >> (15 - b)) mod 2^b, its first entry negated where bit 15 of z is set
        1mad          x = 34038481 s + 76625530 mod 2^32; (sum of the four bytes of x - 510) / 147.800537109375
        2mad          x = 264435761 s + 1013904223 mod 2^32; x = (1664525 x >> 32) + x mod 2^32; as 1mad
        3inst         x = 89226354 s + 64248484; (x and 0x8FFF8FFF) xor 0x3B603B60; the two halves added as float16
Source: formats specification, section 4.3; QTIP (commit e90c668) lib/codebook/bitshift.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from bitgrain.errors import LayoutError

COMPUTED = ("1mad", "2mad", "3inst")
TABLED = ("lut", "quantlut", "quantlut_sym")
MAX_WINDOW = 20  # bits; a table of all windows has 2^20 rows then
_WORD = 0xFFFFFFFF


def bit_windows(stream: Tensor, window: int, advance: int) -> Tensor:
    """Every window of circular bit streams.

    Args:
        stream: uint8 [T, B], most significant bit first.
        window: 1 to 25 bits.
        advance: bits between the starts of windows; divides 8 B.
    Returns:
        int32 [T, 8 B / advance], each below 2**window.
    """
    bits = 8 * stream.shape[1]
    if not 1 <= window <= min(25, bits) or bits % advance:
        raise LayoutError("bit_windows", f"windows of {window} bits every {advance} bits of {bits}", "1 to 25 bits, at steps that divide the stream", "check the settings")
    first = torch.arange(0, bits, advance, device=stream.device)
    wide = torch.zeros(stream.shape[0], len(first), dtype=torch.int32, device=stream.device)
    for place in range(4):
        wide |= stream[:, (first // 8 + place) % stream.shape[1]].to(torch.int32) << (24 - 8 * place)
    # the shift drags copies of the sign in from the left; the mask removes them
    return (wide >> (32 - window - first % 8).to(torch.int32)) & ((1 << window) - 1)


def state_values(decoder: str, window: int, table: Tensor | None) -> Tensor:
    """float32 [2**window, V]: the V values of every window; V = 1 for computed ones.

    Args:
        table: floating point [2**b, V] for "lut" (b = window), "quantlut" and "quantlut_sym"; None otherwise.
    """
    if table is None:
        return _computed(decoder, window)
    if decoder == "lut":
        return table.float()
    size = table.shape[0].bit_length() - 1
    state = torch.arange(1 << window, device=table.device)
    z = state * (state + 1)
    if decoder == "quantlut":
        return table.float()[z >> (16 - size) & ((1 << size) - 1)]
    values = table.float()[z >> (15 - size) & ((1 << size) - 1)]
    values[:, 0] *= 1 - 2 * (z >> 15 & 1)
    return values


@lru_cache(maxsize=4)
def _computed(decoder: str, window: int) -> Tensor:
    return _COMPUTERS[decoder](torch.arange(1 << window))[:, None]


def _one_mad(state: Tensor) -> Tensor:
    return _byte_sum(state * 34038481 + 76625530 & _WORD)


def _two_mad(state: Tensor) -> Tensor:
    x = state * 264435761 + 1013904223 & _WORD
    return _byte_sum((x * 1664525 >> 32) + x & _WORD)


def _byte_sum(x: Tensor) -> Tensor:
    total = sum(((x >> 8 * i & 255) for i in range(4)), start=torch.zeros_like(x))
    return (total - 510).float() / 147.800537109375


def _three_instructions(state: Tensor) -> Tensor:
    x = (state * 89226354 + 64248484 & 0x8FFF8FFF) ^ 0x3B603B60
    # int64 to int16 keeps the low 16 bits
    halves = [(x >> shift).to(torch.int16).view(torch.float16) for shift in (16, 0)]
    return (halves[0] + halves[1]).float()


_COMPUTERS: dict[str, Callable[[Tensor], Tensor]] = {"1mad": _one_mad, "2mad": _two_mad, "3inst": _three_instructions}
