"""Rows out of the panels of the grouped kernels, the layout of kernels.cpu.panels."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.base import Prepared
from bitgrain.kernels.cpu import panels
from bitgrain.kernels.cpu.panels import PANEL, UNIT
from bitgrain.numerics.small_floats import E4M3FN, E5M2, decode


def decoded_rows(prepared: Prepared, index: Tensor) -> Tensor:
    """float32 [M, K]: rows int64 [M] of a prepared weight, scale * (code - zero) as its dequantize() computes it.

    Fractional zero points have been rounded while they were packed; their rows are not equal to the bit.
    """
    t, meta, (_, k) = prepared.tensors, prepared.meta, prepared.shape
    panel, lane = index // PANEL, index % PANEL
    values = _values(t["codes"], meta["kind"], panel, lane, t.get("table"))
    counts = torch.diff(t["group_ends"].long(), prepend=torch.zeros(1, dtype=torch.int64))
    group = torch.repeat_interleave(torch.arange(len(counts)), counts).repeat_interleave(UNIT)
    zero = t["zero"][panel, :, lane].float()[:, group] if "zero" in t else meta["zero"]
    scale = t["scale"][panel, :, lane].float()
    if "second" in t:
        scale = scale * t["second"][index][:, None]
    if meta["kind"] == panels.E4M3:
        scale = scale / panels.E4M3_FACTOR
    result = (values - zero) * scale[:, group]
    gather = t.get("gather")
    if gather is None:
        return result[:, :k].contiguous()
    restored = result.new_empty(len(index), k)
    real = gather >= 0
    restored[:, gather[real].long()] = result[:, real]
    return restored


def _values(codes: Tensor, kind: int, panel: Tensor, lane: Tensor, table: Tensor | None) -> Tensor:
    """float32 [M, units * 8]: what the codes of those lanes are read as."""
    count, units = codes.shape[:2]
    if kind in (panels.NIBBLE, panels.TABLE4):
        pairs = codes.view(count, units, PANEL, UNIT // 2)[panel, :, lane]
        nibbles = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(1)
        return table[nibbles.long()] if table is not None else nibbles.float() - 8
    if kind == panels.BYTE:
        # signed codes: those of integers have had their top bit flipped
        return codes.view(count, units, 2, PANEL, 4)[panel, :, :, lane].flatten(1).view(torch.int8).float()
    if kind == panels.DENSE_BF16:
        return codes.view(count, units, UNIT // 2, PANEL, 2)[panel, :, :, lane].flatten(1).float()
    columns = codes.view(count, units, UNIT, PANEL)[panel, :, :, lane].flatten(1)
    return decode(columns, E4M3FN if kind == panels.E4M3 else E5M2)
