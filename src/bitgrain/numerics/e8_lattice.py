"""Codebooks of eight entries per code, points of the E8 lattice.

    e8p   16-bit codes, 2 bits per entry.  High byte: one of 256 rows of magnitudes; low byte: signs and a shift.
          With s the low byte and p the parity of its bits: s' = s xor p (only bit 0 can change);
          entry j of the stored order is negated where bit j of s' is set; then 1/4 is subtracted if p, else added.
          Stored order: entry j of a row is coordinate E8P_ORDER[j]; the last one is negative where the row's sum is odd.
    ball  8-bit codes, 1 bit per entry: the 241 points of E8 with norm^2 <= 2 and 15 of norm^2 4.
Source: formats specification, section 4.2; QuIP# (commit 1d8f873) lib/codebook/latticee8_padded12*.py.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

DIMENSION = 8  # entries per code
E8P_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# The 29 rows of norm^2 12: bit 7 - j of a byte is set where coordinate j is 3/2, else it is 1/2.
NORM_12 = bytes.fromhex("8f 4f 2f 1f ec ea e6 e9 e5 e3 dc da d6 d9 d5 d3 bc ba b6 b9 b5 73 7c 7a 76 79 75 37 ce")


def e8p_magnitudes() -> Tensor:
    """float32 [256, 8]: 227 rows of half-integers with norm^2 <= 10 in lexicographic order, then those of norm^2 12."""
    halves = torch.cartesian_prod(*[torch.tensor([0.5, 1.5, 2.5])] * DIMENSION)
    inner = halves[(halves * halves).sum(1) <= 10]
    bits = torch.tensor([[byte >> (7 - j) & 1 for j in range(DIMENSION)] for byte in NORM_12])
    return torch.cat([inner, bits + 0.5])


@lru_cache(maxsize=1)
def e8p_codebook() -> Tensor:
    """float32 [65536, 8]: the eight entries of every 16-bit code."""
    rows = e8p_magnitudes()
    stored = rows[:, list(E8P_ORDER)]
    stored[:, 7] *= 1 - 2 * (rows.sum(1) % 2)
    low = torch.arange(256)
    bits = low[:, None] >> torch.arange(DIMENSION) & 1
    parity = bits.sum(1) % 2
    bits[:, 0] ^= parity
    signs = 1.0 - 2.0 * bits
    values = stored[:, None, :] * signs[None] + (0.25 - 0.5 * parity)[None, :, None]
    place = [E8P_ORDER.index(i) for i in range(DIMENSION)]
    return values.reshape(1 << 16, DIMENSION)[:, place].contiguous()


@lru_cache(maxsize=1)
def e8_ball() -> Tensor:
    """float32 [256, 8]: integer points, then half-integer points, each in lexicographic order, then +-2 along one axis, -2 e_8 left out."""
    integers = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * DIMENSION)
    halves = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5])] * DIMENSION)
    points = torch.cat([integers, halves])
    inside = ((points * points).sum(1) <= 2) & (points.sum(1) % 2 == 0)
    axes = 2 * torch.eye(DIMENSION)
    return torch.cat([points[inside], axes, -axes[:-1]])
