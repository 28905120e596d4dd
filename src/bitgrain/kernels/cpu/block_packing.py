"""Panels of the block kernels: 16 out features side by side, 256 in features per record; see native/include/block_kernels.hpp."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.block_layouts import (
    ADDED_MINIMUM,
    CODE_1,
    E8M0_SUB,
    FLOAT_4,
    FLOAT_POINT,
    LEVELS_4,
    NIBBLE_SUB,
    NO_SUB,
    PLANES,
    RECORD,
    SCALED_MINIMUM,
    SIGNED_SUB,
    UNSIGNED_SUB,
    ZERO_POINT,
    BlockLayout,
    BlockParts,
)
from bitgrain.kernels.cpu.native_packing import pack_blocks
from bitgrain.kernels.cpu.panels import PANEL
from bitgrain.numerics.block_scales import decode_block_scale
from bitgrain.numerics.lattice_blocks import LEVELS

UNIT = 32
# minima that are numbers of the scales' dtype
STORED_MINIMA = (ADDED_MINIMUM, SCALED_MINIMUM, FLOAT_POINT)
FLOATS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)


def pack(layout: BlockLayout, parts: BlockParts, k: int) -> Tensor:
    """uint8 [panels, bytes]: every panel of the parts of a weight with k in features, the last filled with zero scales."""
    columns = [(values, step) for values, step in _columns(layout, parts) if values is not None]
    return pack_blocks(parts.codes, parts.bits, k, columns, layout.format(torch.float16 if parts.scale is None else parts.scale.dtype))


def _columns(layout: BlockLayout, parts: BlockParts) -> list[tuple[Tensor | None, int]]:
    """The parts before the codes in their order, each with the columns that one value covers."""
    return [(parts.scale, layout.span), (parts.minima, layout.span), (parts.points, layout.span), (parts.sub, layout.group), (parts.sub_minima, layout.group)]


def unpack_planes(packed: Tensor, code: int) -> Tensor:
    """uint8 [N, K]: codes of units uint8 [panels, units, bytes]."""
    panels, units = packed.shape[:2]
    vectors, at = torch.zeros(panels, units, 8, 64, dtype=torch.uint8), 0
    for width, lowest in PLANES[code]:
        held = 8 // width
        plane = packed[:, :, at : at + 64 * width].view(panels, units, width, 1, 64)
        shifts = (torch.arange(held, dtype=torch.uint8) * width)[:, None]
        fields = (plane >> shifts) & ((1 << width) - 1)
        vectors |= fields.view(panels, units, 8, 64) << lowest
        at += 64 * width
    return vectors.view(panels, units, 8, PANEL, 4).permute(0, 3, 1, 2, 4).reshape(panels * PANEL, units * UNIT)


def unpack(layout: BlockLayout, packed: Tensor, scale_dtype: torch.dtype, factor: Tensor | None, n: int, k: int) -> BlockParts:
    """The parts that pack() was given."""
    fields: list[list[Tensor]] = [[] for _ in range(6)]
    at = 0
    for start in range(0, k, RECORD):
        at = _unpack_record(layout, packed, scale_dtype, at, min(RECORD, k - start), start, fields)
    scale, minima, points, sub, sub_minima = (torch.cat(f, dim=1)[:n] if f else None for f in fields[:5])
    return BlockParts(torch.cat(fields[5], dim=1)[:n], scale, minima, points, sub, sub_minima, factor)


def _unpack_record(layout: BlockLayout, packed: Tensor, scale_dtype: torch.dtype, at: int, size: int, start: int, fields: list[list[Tensor]]) -> int:
    """Append the parts of one record to `fields`, the codes last; returns where the next record begins."""
    present = (layout.span > 0, layout.minimum in STORED_MINIMA, layout.minimum == ZERO_POINT, layout.sub != NO_SUB, layout.minimum == SCALED_MINIMUM and layout.sub != NIBBLE_SUB)
    for i, is_there in enumerate(present):
        if not is_there:
            continue
        step, dtype = (layout.span, scale_dtype if i < 2 else torch.uint8) if i < 3 else (layout.group, torch.uint8)
        count = -(-size // step)
        nbytes = count * PANEL * dtype.itemsize
        values = packed[:, at : at + nbytes].contiguous().view(dtype).view(-1, count, PANEL).permute(0, 2, 1).reshape(-1, count)
        if start % step == 0:  # else a repetition of a scale that earlier records have
            fields[i].append(values)
        at += nbytes
    units = size // UNIT
    nbytes = units * 64 * sum(width for width, _ in PLANES[layout.code])
    fields[5].append(unpack_planes(packed[:, at : at + nbytes].reshape(packed.shape[0], units, -1), layout.code))
    return at + nbytes


def lane_places(layout: BlockLayout, scale_dtype: torch.dtype, k: int) -> Tensor:
    """int64 [16, bytes]: where the bytes of each out feature of a panel stand in it, in the order of the panel."""
    lanes, places, at = torch.arange(PANEL)[:, None, None], [], 0
    for start in range(0, k, RECORD):
        size = min(RECORD, k - start)
        for count, nbytes in _field_sizes(layout, scale_dtype, size):
            places.append((at + (torch.arange(count)[:, None] * PANEL + lanes) * nbytes + torch.arange(nbytes)).flatten(1))
            at += count * PANEL * nbytes
        vectors = size // UNIT * sum(width for width, _ in PLANES[layout.code])
        places.append((at + torch.arange(vectors)[:, None] * 64 + 4 * lanes + torch.arange(4)).flatten(1))
        at += vectors * 64
    return torch.cat(places, dim=1)


def _field_sizes(layout: BlockLayout, scale_dtype: torch.dtype, size: int) -> list[tuple[int, int]]:
    """(values per out feature, bytes of a value) of what stands before the codes of a record of `size` columns."""
    wide, spans, groups = scale_dtype.itemsize, -(-size // layout.span) if layout.span else 0, -(-size // layout.group)
    found = [(spans, wide)] if layout.span else []
    found += [(spans, wide)] if layout.minimum in STORED_MINIMA else []
    found += [(spans, 1)] if layout.minimum == ZERO_POINT else []
    found += [(groups, 1)] if layout.sub != NO_SUB else []
    return found + ([(groups, 1)] if layout.minimum == SCALED_MINIMUM and layout.sub != NIBBLE_SUB else [])


def gather_rows(packed: Tensor, places: Tensor, index: Tensor) -> Tensor:
    """uint8 [panels, bytes]: panels of the out features index [M] of packed panels, in that order; the rest of the last is zero."""
    panel_bytes, order = packed.shape[1], torch.arange(len(index))
    made = packed.new_zeros(-(-len(index) // PANEL), panel_bytes)
    taken = packed.view(-1)[(index // PANEL * panel_bytes)[:, None] + places[index % PANEL]]
    made.view(-1)[(order // PANEL * panel_bytes)[:, None] + places[order % PANEL]] = taken
    return made


def values(layout: BlockLayout, parts: BlockParts) -> Tensor:
    """float32 [N, K]: what the parts mean, in the order of operations of the stored types' definitions."""
    columns = torch.arange(parts.codes.shape[1])
    scale = parts.scale[:, columns // layout.span].float() if parts.scale is not None else torch.ones(1, 1)
    if parts.sub is not None:
        scale = scale * _sub(layout, parts.sub)[:, columns // layout.group]
    if parts.factor is not None:
        scale = scale * parts.factor[:, None]
    result = scale * _numbers(layout, parts.codes)
    if layout.minimum == ADDED_MINIMUM and parts.minima is not None:
        result = result + parts.minima[:, columns // layout.span].float()
    elif layout.minimum == SCALED_MINIMUM and parts.minima is not None and parts.sub is not None:
        bytes_ = parts.sub >> 4 if parts.sub_minima is None else parts.sub_minima
        result = result - parts.minima[:, columns // layout.span].float() * bytes_[:, columns // layout.group].float()
    elif layout.minimum in (ZERO_POINT, FLOAT_POINT):
        points = parts.points if parts.minima is None else parts.minima
        assert points is not None
        result = scale * (parts.codes.float() - points[:, columns // layout.span].float())
    return result


def _numbers(layout: BlockLayout, codes: Tensor) -> Tensor:
    if layout.code == LEVELS_4:
        return torch.tensor(LEVELS)[codes.long()]
    if layout.code == FLOAT_4:
        return torch.tensor([*FLOATS, *(-f for f in FLOATS)])[codes.long()]
    return codes.float() * (2 if layout.code == CODE_1 else 1) - layout.zero


def _sub(layout: BlockLayout, stored: Tensor) -> Tensor:
    if layout.sub == SIGNED_SUB:
        return stored.view(torch.int8).float()
    if layout.sub == UNSIGNED_SUB:
        return stored.float()
    if layout.sub == NIBBLE_SUB:
        return (stored & 15).float()
    return decode_block_scale(stored, "e8m0" if layout.sub == E8M0_SUB else "e4m3")
