"""How HQQ groups and packs a matrix [N, K].

The flattened matrix becomes a grid: axis 1, [N * K / g, g] with a scale per grid row; axis 0, [g, N * K / g] with a scale per
grid column, so that a group is strided; ungrouped, the matrix itself with one scale for all.  Codes are packed along the first
dimension of the grid in equal parts, the first part in the highest bits:

    8bit_u8   one code per byte (5, 6 and 8 bits)        2bit_u8   four parts of rows per byte
    4bit_u8   two halves of rows per byte                1bit_u8   eight parts of rows per byte
    3bit_32   ten parts of rows per int32, the last one padded

Source: hqq 0.2.8, core/quantize.py and core/bitpack.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, prod

import torch
from torch import Tensor

from bitgrain.errors import BadValueError

# packing: (bits of a field, fields per word, element type of a word)
PACKINGS = {"8bit_u8": (8, 1, "U8"), "4bit_u8": (4, 2, "U8"), "2bit_u8": (2, 4, "U8"), "1bit_u8": (1, 8, "U8"), "3bit_32": (3, 10, "I32")}
WORD_TYPES = {"U8": torch.uint8, "I32": torch.int32}
# nbits as configured: (bits of a code, number of different codes, packing)
WIDTHS = {
    1.0: (1, 2, "1bit_u8"),
    1.58: (2, 3, "2bit_u8"),
    2.0: (2, 4, "2bit_u8"),
    3.0: (3, 8, "3bit_32"),
    4.0: (4, 16, "4bit_u8"),
    5.0: (5, 32, "8bit_u8"),
    6.0: (6, 64, "8bit_u8"),
    8.0: (8, 256, "8bit_u8"),
}


@dataclass(frozen=True, slots=True)
class Layout:
    """Width, grouping and packing of one matrix.

    Args:
        shape:      of the matrix, (N, K); or of the scales, where they are quantized themselves.
        width:      a key of WIDTHS.
        group_size: elements per scale; 0 for one scale for all.
        axis:       dimension of the grid along which a group runs.
    """

    shape: tuple[int, int]
    width: float
    group_size: int
    axis: int

    @property
    def bits(self) -> int:
        return WIDTHS[self.width][0]

    @property
    def packing(self) -> str:
        return WIDTHS[self.width][2]

    @property
    def word_code(self) -> str:
        """Element type of the packed words, as safetensors spells it."""
        return PACKINGS[self.packing][2]

    @property
    def grid(self) -> tuple[int, int]:
        """The shape in which codes are packed."""
        if not self.group_size:
            return self.shape
        groups = prod(self.shape) // self.group_size
        return (groups, self.group_size) if self.axis == 1 else (self.group_size, groups)

    @property
    def packed_shape(self) -> tuple[int, int]:
        """Shape of the packed words."""
        rows, columns = self.grid
        return (-(-rows // PACKINGS[self.packing][1]), columns)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of the scales and zero points; () for one of each."""
        if not self.group_size:
            return ()
        return (self.grid[0], 1) if self.axis == 1 else (1, self.grid[1])

    def codes(self, name: str, stored: Tensor) -> Tensor:
        """uint8 codes in the shape of the grid, from packed words that may be viewed as floats.

        Raises:
            BadValueError: codes beyond the width.
        """
        width, parts, word_code = PACKINGS[self.packing]
        words = stored.contiguous().view(WORD_TYPES[word_code]).view(self.packed_shape)
        if word_code == "I32" and bool((words >> (width * parts)).any()):
            raise _beyond(name, "bits above the codes are set")
        mask = (1 << width) - 1
        fields = [((words >> (width * i)) & mask).to(torch.uint8) for i in reversed(range(parts))]
        codes = torch.cat(fields)[: self.grid[0]]
        levels = WIDTHS[self.width][1]
        if int(codes.max()) >= levels:
            raise _beyond(name, f"a code of {int(codes.max())}, but {self.width:g} bits have {levels} codes")
        return codes

    def spread(self, values: Tensor) -> Tensor:
        """Scales or zero points, one per group, as IntAffineWeight holds them beside `columns_per_group`: [1 or N or rows, G]."""
        n, k = self.shape
        flat = values.reshape(-1)
        if flat.numel() == 1:
            return flat.view(1, 1)
        if self.axis == 1:
            first = torch.arange(0, n * k, self.columns_per_group)
            return flat[torch.div(first, self.group_size, rounding_mode="floor")].view(n, -1).contiguous()
        element = torch.arange(self.period * k).view(self.period, k)
        return flat[element % flat.numel()].contiguous()

    @property
    def columns_per_group(self) -> int:
        """Neighbouring columns of a row that are sure to share a scale."""
        if not self.group_size or self.groups == 1:
            return self.shape[1]
        return gcd(self.shape[1], self.group_size) if self.axis == 1 else 1

    @property
    def groups(self) -> int:
        return prod(self.shape) // self.group_size if self.group_size else 1

    @property
    def period(self) -> int:
        """Rows after which the scales of an axis-0 layout repeat; it divides N."""
        return self.groups // gcd(self.groups, self.shape[1])


def _beyond(name: str, found: str) -> BadValueError:
    return BadValueError(name, found, "codes of the width that nbits says", "the file is damaged, or nbits is wrong; fetch or write it again")
