"""How the codes of a weight lie in memory for the packed product: rows of units, whose bytes hold codes a part of a unit apart.

The columns of a row are dealt out to *slots*.  A *segment* is the columns that share all scales; each takes `width` slots, a multiple of
the unit of 16, 32 or 64.  A unit of u slots with codes of b bits is u * b / 8 bytes: for each plane of w bits (3 = 2 + 1, 5 = 4 + 1,
6 = 4 + 2, 7 = 4 + 2 + 1, low bits first) u * w / 8 bytes, of which byte i holds the slots i, i + R, i + 2R, ... for R = u * w / 8, low bits
first.  So neighbouring slots are neighbouring bytes for every width: what loads in vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.numerics.bitpack import PLANES

UNITS = (64, 32, 16)
# A larger unit is taken as long as it adds at most this part of the columns as padding.
PADDING = 1 / 16


@dataclass(frozen=True, slots=True)
class Slots:
    """Where the columns of a row go.

    Args:
        segment: columns that share all scales.
        count:   segments of a row.
        width:   slots of a segment, a multiple of `unit`.
        regular: slot s holds column (s // width) * segment + s % width, where s % width < segment; else a gather says which.
    """

    segment: int
    count: int
    width: int
    unit: int
    regular: bool = True

    @property
    def total(self) -> int:
        return self.count * self.width

    def even(self, k: int) -> bool:
        """No slot is empty."""
        return self.regular and self.total == k


def unit_for(columns: int, smallest: int) -> int:
    """The unit of segments of so many columns: the largest that wastes little."""
    fitting = [u for u in UNITS if u >= smallest]
    padded = {u: -(-columns // u) * u for u in fitting}
    return next((u for u in fitting if padded[u] <= columns * (1 + PADDING)), min(fitting, key=lambda u: (padded[u], -u)))


def lay_out(k: int, segment: int, smallest: int, group_index: Tensor | None = None, groups: int = 1) -> tuple[Slots, Tensor | None]:
    """(slots of K columns, int32 [slots] column of each or -1; None where Slots says it).

    Args:
        smallest:    smallest unit that the product takes.
        group_index: int [K]: the segment of each column, where columns are not in order; `groups` segments.
    """
    if group_index is None:
        unit = unit_for(min(segment, k), smallest)
        segment = min(segment, k)
        return Slots(segment, -(-k // segment), -(-segment // unit) * unit, unit), None
    index = group_index.long()
    counts = torch.bincount(index, minlength=groups)
    segment = max(1, int(counts.max()))
    unit = unit_for(segment, smallest)
    width = -(-segment // unit) * unit
    order = torch.argsort(index, stable=True)
    starts = torch.cumsum(counts, 0) - counts
    owner = index[order]
    gather = torch.full((groups * width,), -1, dtype=torch.int32, device=index.device)
    gather[owner * width + torch.arange(k, device=index.device) - starts[owner]] = order.to(torch.int32)
    return Slots(segment, groups, width, unit, regular=False), gather


def columns_of(slots: Slots, k: int, gather: Tensor | None, device: torch.device) -> Tensor:
    """int64 [slots]: the column of each slot, -1 where there is none."""
    if gather is not None:
        return gather.long()
    slot = torch.arange(slots.total, device=device)
    inner, column = slot % slots.width, slot // slots.width * slots.segment + slot % slots.width
    return torch.where((inner < slots.segment) & (column < k), column, -1)


def deal(codes: Tensor, columns: Tensor) -> Tensor:
    """uint8 [N, slots] of codes uint8 [N, K]; 0 in empty slots."""
    dealt = codes.index_select(1, columns.clamp(min=0))
    return dealt.masked_fill_(columns < 0, 0)


def pack_units(codes: Tensor, bits: int, unit: int) -> Tensor:
    """uint8 [N, slots * bits / 8] of unsigned codes uint8 [N, slots]."""
    n = codes.shape[0]
    units = codes.view(n, -1, unit)
    parts, low = [], 0
    for width in PLANES[bits]:
        plane = (units >> low) & ((1 << width) - 1)
        lanes = plane.view(n, -1, 8 // width, unit * width // 8)
        packed = torch.zeros_like(lanes[:, :, 0])
        for lane in range(lanes.shape[2]):
            packed |= lanes[:, :, lane] << (lane * width)
        parts.append(packed)
        low += width
    return torch.cat(parts, dim=2).view(n, -1).contiguous()


def unpack_units(packed: Tensor, bits: int, unit: int) -> Tensor:
    """uint8 [N, slots]: the inverse of pack_units."""
    n = packed.shape[0]
    units = packed.view(n, -1, unit * bits // 8)
    codes = torch.zeros(n, units.shape[1], unit, dtype=torch.uint8, device=packed.device)
    start = low = 0
    for width in PLANES[bits]:
        size = unit * width // 8
        held = units[:, :, start : start + size]
        lanes = [(held >> (lane * width)) & ((1 << width) - 1) for lane in range(8 // width)]
        codes |= torch.cat(lanes, dim=2) << low
        start, low = start + size, low + width
    return codes.view(n, -1)
