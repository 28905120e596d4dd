"""Stores of four-bit keys and values, two codes per byte, the even column in the low nibble.

int4    over one token and head, with low = min(x, 0) and high = max(x, 0):
        scale = (high - low) / 15, zero = round(-low / scale), code = round(clamp(x / scale + zero, 0, 15))
        x' = (code - zero) * scale
        with stored scales: signed codes round(clamp(x / scale + zero, -8, 7)), x' = (code - zero) * scale
nvfp4   in blocks of 16 columns of one token and head, under a second scale t:
        s = e4m3(max |x| / (6 t)), code = e2m1(x / (s t)), both rounded to nearest even and saturated;  x' = e2m1(code) * (s t)
        t is the checkpoint's k_scale or v_scale, with which the values below it stay within e4m3's range; or, computed, max |x|
        of the token and head / (6 * 448), with which the largest block scale is 448.  A block whose s rounds to 0 reads as zeros.
NaN stays NaN for the whole row or block that holds it.
Source: formats specification, part 2, section 6.2; ModelOpt 0.47 (t = amax / 448).  The rotation that some engines apply before
int4 is not done here: it would change what a checkpoint's own scales mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kvcache.stores import PlainStore, Rows, expanded
from bitgrain.numerics.bitpack import pack_dense, unpack_dense
from bitgrain.numerics.block_scales import decode_block_scale, encode_block_scale, largest_scale
from bitgrain.numerics.small_floats import E2M1, decode, encode

BLOCK = 16
_NAN_SCALE = 0x7F


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [t, heads, ceil(D / 2)] of codes uint8 [t, heads, D] below 16."""
    return pack_dense(codes.flatten(0, 1).contiguous(), 4).view(*codes.shape[:2], -1)


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """uint8 [t, heads, columns]."""
    return unpack_dense(packed.flatten(0, 1), 4, columns).view(*packed.shape[:2], columns)


class PackedStore(PlainStore):
    """Packed codes, and further rows of numbers beside them.

    Args:
        beside: number of tensors that are kept per token beside the codes.
    """

    def __init__(self, most: int, beside: int) -> None:
        super().__init__(most)
        self._beside = tuple(Rows(most) for _ in range(beside))
        self._columns = 0

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes + sum(rows.nbytes for rows in self._beside)

    def keep(self, codes: Tensor, *beside: Tensor) -> None:
        """Append codes uint8 [t, heads, D] and what belongs to them."""
        self._columns = codes.shape[2]
        self._rows.append(pack_nibbles(codes))
        for rows, values in zip(self._beside, beside, strict=True):
            rows.append(values)

    def codes(self) -> Tensor:
        """uint8 [length, heads, D]."""
        return unpack_nibbles(self._rows.view(), self._columns)

    def truncate(self, length: int) -> None:
        super().truncate(length)
        for rows in self._beside:
            rows.length = self._rows.length


class Int4Store(PackedStore):
    """Unsigned codes with a float32 scale and a uint8 zero point per token and head."""

    def __init__(self, most: int) -> None:
        super().__init__(most, beside=2)

    def append(self, rows: Tensor) -> None:
        wide = rows.float()
        low, high = wide.amin(-1, keepdim=True).clamp(max=0.0), wide.amax(-1, keepdim=True).clamp(min=0.0)
        scale = (high - low) / 15
        divisor = torch.where(scale > 0, scale, torch.ones_like(scale))  # a row of zeros, or with NaN
        zero = torch.round(-low / divisor).nan_to_num(0.0).clamp(0, 15)
        codes = torch.round((wide / divisor).nan_to_num(0.0) + zero).clamp(0, 15)
        self.keep(codes.to(torch.uint8), scale, zero.to(torch.uint8))

    def read(self, dtype: torch.dtype) -> Tensor:
        scale, zero = (rows.view() for rows in self._beside)
        return ((self.codes().float() - zero.float()) * scale).to(dtype)


class StaticInt4Store(PackedStore):
    """Signed codes with stored scales and zero points, each one, one per head, or one per channel."""

    def __init__(self, most: int, scale: tuple[float, ...], zero: tuple[float, ...], channel: bool = False) -> None:
        super().__init__(most, beside=0)
        self._scale, self._zero, self._channel = scale, zero or (0.0,) * len(scale), channel

    def append(self, rows: Tensor) -> None:
        moved = rows.float() / expanded(self._scale, rows, self._channel) + expanded(self._zero, rows, self._channel)
        self.keep((torch.round(moved.clamp(-8, 7)) + 8).to(torch.uint8))

    def read(self, dtype: torch.dtype) -> Tensor:
        codes = self.codes()
        moved = codes.float() - 8 - expanded(self._zero, codes, self._channel)
        return (moved * expanded(self._scale, codes, self._channel)).to(dtype)


class NVFP4Store(PackedStore):
    """E2M1 codes with an E4M3 scale per block of 16 and a second scale.

    Args:
        second: one multiplier, or one per head; empty: computed per token and head, float32.
    """

    def __init__(self, most: int, second: tuple[float, ...]) -> None:
        super().__init__(most, beside=1 if second else 2)
        self._second = second

    def append(self, rows: Tensor) -> None:
        columns = rows.shape[2]
        wide = torch.nn.functional.pad(rows.float(), (0, -columns % BLOCK))
        if self._second:
            second = expanded(self._second, rows)[None]
        else:
            second = wide.abs().amax(-1, keepdim=True) / (E2M1.max * largest_scale("e4m3"))
        blocks = wide.unflatten(-1, (-1, BLOCK))
        ratio = blocks.abs().amax(-1) / E2M1.max / second  # 0 / 0 of a row of zeros is a scale of 0
        ratio = torch.where(second > 0, ratio, torch.zeros_like(ratio))
        scale = encode_block_scale(ratio.nan_to_num(0.0), "e4m3").masked_fill(ratio.isnan(), _NAN_SCALE)
        step = (decode_block_scale(scale, "e4m3") * second)[..., None]
        values = torch.where(step > 0, blocks / step, torch.zeros_like(blocks)).nan_to_num(0.0)
        codes = encode(values, E2M1).flatten(-2)[..., :columns]
        beside = (scale,) if self._second else (scale, second)
        self.keep(codes, *beside)

    def read(self, dtype: torch.dtype) -> Tensor:
        codes = self.codes()
        second = expanded(self._second, codes)[None] if self._second else self._beside[1].view()
        step = decode_block_scale(self._beside[0].view(), "e4m3") * second
        return (decode(codes, E2M1) * step.repeat_interleave(BLOCK, -1)[..., : codes.shape[2]]).to(dtype)
