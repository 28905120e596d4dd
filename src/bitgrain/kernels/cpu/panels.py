"""Packed panels, the layout of the native kernels; see native/include/kernels.hpp.

16 out features (a panel) and 8 in features (a unit) lie together.  N is padded to 16 with zero codes, every group of K to 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

PANEL, UNIT = 16, 8
NIBBLE, BYTE, E4M3, E5M2, TABLE4, DENSE_BF16, DENSE_F16, DENSE_F32 = range(8)
# E4M3 is read as a half of another bias, which is 2^8 too small
E4M3_FACTOR = 256.0


def pad_rows(values: Tensor, fill: float = 0) -> Tensor:
    """[ceil16(N), ...]: rows of `fill` below."""
    short = -values.shape[0] % PANEL
    if not short:
        return values
    return torch.cat([values, values.new_full((short, *values.shape[1:]), fill)])


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [N, K] of uint8 [panels, units, 64]: per out feature four bytes of eight codes, the even in feature in the low half."""
    panels, units = packed.shape[:2]
    lanes = packed.view(panels, units, PANEL, UNIT // 2)
    codes = torch.stack([lanes & 15, lanes >> 4], dim=-1).view(panels, units, PANEL, UNIT)
    return codes.permute(0, 2, 1, 3).reshape(panels * PANEL, units * UNIT).contiguous()


def unpack_quads(packed: Tensor) -> Tensor:
    """[N, K] of int8 or uint8 [panels, units, 128]: per four in features, 16 lanes of four bytes."""
    panels, units = packed.shape[:2]
    split = packed.view(panels, units, 2, PANEL, 4).permute(0, 3, 1, 2, 4)
    return split.reshape(panels * PANEL, units * UNIT).contiguous()


def pack_columns(codes: Tensor) -> Tensor:
    """[panels, units, 128] of codes or values [N, K]: per in feature, 16 out features."""
    n, k = codes.shape
    split = codes.view(n // PANEL, PANEL, k // UNIT, UNIT)
    return split.permute(0, 2, 3, 1).reshape(n // PANEL, k // UNIT, 128).contiguous()


def unpack_columns(packed: Tensor) -> Tensor:
    """Inverse of pack_columns."""
    panels, units = packed.shape[:2]
    return packed.view(panels, units, UNIT, PANEL).permute(0, 3, 1, 2).reshape(panels * PANEL, units * UNIT).contiguous()


def pack_pairs(values: Tensor) -> Tensor:
    """[panels, units, 128] of 16-bit values [N, K]: per two in features, 16 lanes of two."""
    n, k = values.shape
    split = values.view(n // PANEL, PANEL, k // UNIT, UNIT // 2, 2)
    return split.permute(0, 2, 3, 1, 4).reshape(n // PANEL, k // UNIT, 128).contiguous()


def pack_group_values(values: Tensor) -> Tensor:
    """[panels, groups, 16] of one value per out feature and group, [N, groups]; N % 16 == 0."""
    n, groups = values.shape
    return values.view(n // PANEL, PANEL, groups).permute(0, 2, 1).contiguous()


def layout_columns(k: int, group_size: int, group_index: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """How in features are laid out so that every group is a whole number of units.

    Returns:
        (gather, group_ends): gather int32 [padded K], the in feature of each place or -1 for padding, None when the places
        are 0 .. K - 1 and padding stands only at the end; group_ends int32 [groups], in units.
    """
    if group_index is None:
        groups = -(-k // group_size)
        if group_size % UNIT == 0 or groups == 1:
            ends = torch.arange(1, groups + 1, dtype=torch.int64) * group_size
            return None, (ends.clamp(max=-(-k // UNIT) * UNIT) + UNIT - 1).div(UNIT, rounding_mode="floor").to(torch.int32)
        group_index = torch.arange(k) // group_size
    groups = int(group_index.max()) + 1
    order = torch.argsort(group_index.long(), stable=True)
    counts = torch.bincount(group_index.long(), minlength=groups)
    padded = -(-counts // UNIT) * UNIT
    starts = torch.cumsum(padded, 0) - padded
    gather = torch.full((int(padded.sum()),), -1, dtype=torch.int32)
    within = torch.arange(k) - torch.repeat_interleave(torch.cumsum(counts, 0) - counts, counts)
    gather[torch.repeat_interleave(starts, counts) + within] = order.to(torch.int32)
    return gather, (torch.cumsum(padded, 0) // UNIT).to(torch.int32)


def place_columns(codes: Tensor, gather: Tensor | None, width: int, fill: int) -> Tensor:
    """codes [N, K] in the places of `gather`, [N, width], padding filled."""
    if gather is not None:
        placed = codes[:, gather.clamp(min=0).long()]
        placed[:, gather < 0] = fill
        return placed
    return torch.nn.functional.pad(codes, (0, width - codes.shape[1]), value=fill)
