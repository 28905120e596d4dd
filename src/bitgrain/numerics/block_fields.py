"""Fields of packed blocks: 16-bit scales, bit fields, nibbles in halves."""

from __future__ import annotations

import torch
from torch import Tensor


def halves_at(blocks: Tensor, start: int) -> Tensor:
    """float32 [B, 1]: the float16 at byte `start` of each block uint8 [B, bytes]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def words_at(blocks: Tensor, start: int, count: int, nbytes: int) -> Tensor:
    """int32 or (for 4 bytes) int64 [B, count]: unsigned little-endian words of 2 or 4 bytes from byte `start` on."""
    stored = blocks[:, start : start + count * nbytes].reshape(blocks.shape[0], count, nbytes)
    wide = stored.to(torch.int32 if nbytes == 2 else torch.int64)
    word = wide[..., 0]
    for byte in range(1, nbytes):
        word = word | wide[..., byte] << (8 * byte)
    return word


def bit_fields(values: Tensor, shifts: tuple[int, ...], bits: int) -> Tensor:
    """[..., S, n] for values [..., n]: the field of `bits` bits at each shift; all elements of a shift together."""
    fields = torch.stack([values >> shift for shift in shifts], dim=-2)
    return fields & ((1 << bits) - 1)


def fields_in_turn(values: Tensor, shifts: tuple[int, ...], bits: int) -> Tensor:
    """[..., n * S] for values [..., n]: every field of the first value, then those of the second."""
    fields = torch.stack([values >> shift for shift in shifts], dim=-1) & ((1 << bits) - 1)
    return fields.flatten(-2)


def nibble_halves(stored: Tensor) -> Tensor:
    """uint8 [..., 2 n] for bytes [..., n]: all low nibbles, then all high ones."""
    return bit_fields(stored, (0, 4), 4).flatten(-2)


def plane_groups(stored: Tensor, width: int, shifts: tuple[int, ...], bits: int) -> Tensor:
    """uint8 [B, elements] for bytes [B, n]: per run of `width` bytes, all fields of the first shift, then of the next."""
    runs = stored.reshape(stored.shape[0], -1, width)
    return bit_fields(runs, shifts, bits).reshape(stored.shape[0], -1)
