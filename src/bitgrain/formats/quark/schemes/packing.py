"""How integer codes lie in memory, for weights and for zero points; rows are packed one by one.

    int8 uint8  one byte per code
    int4 uint4  eight codes per 32-bit word; "reorder": nibble i holds column 8c + [0, 2, 4, 6, 1, 3, 5, 7][i],
                "order": column 8c + i; the last word of a row is padded with zeros
    int3        eight codes in three bytes, low bits first
    uint2       four codes per byte, high bits first
    int2        one 32-bit word per code
Signed codes are two's complement; everything here is in the unsigned domain, code + 2^(bits-1), once it is unpacked.
Source: formats specification, part 2, section 3.2; amd-quark 0.13 torch/utils/pack.py (layouts, written anew).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.errors import BadValueError
from bitgrain.formats.quark.specs import INTEGERS
from bitgrain.numerics.bitpack import unpack_dense, words_as_bytes
from bitgrain.numerics.interleave import deinterleave_even_odd

# dtype to (element types in the file, codes per element of a packed row)
_STORED = {
    "int8": (("I8",), 1),
    "uint8": (("U8",), 1),
    "int4": (("I32",), 8),
    "uint4": (("I32",), 8),
    "uint2": (("U8",), 4),
    "int2": (("I32", "I8"), 1),
}


@dataclass(frozen=True, slots=True)
class IntPacking:
    """The packing of one integer type.

    Args:
        dtype:   a key of specs.INTEGERS.
        reorder: four-bit codes are in even-odd order inside each word.
    """

    dtype: str
    reorder: bool = True

    @property
    def bits(self) -> int:
        return INTEGERS[self.dtype]

    @property
    def signed(self) -> bool:
        return not self.dtype.startswith("u")

    @property
    def middle(self) -> int:
        """The unsigned code that stands for a stored 0."""
        return 1 << (self.bits - 1) if self.signed else 0

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Element types in the file."""
        return ("U8",) if self.dtype == "int3" else _STORED[self.dtype][0]

    @property
    def multiple(self) -> int:
        """Row lengths that the producer can pack are multiples of it."""
        return {"int3": 8, "uint2": 4}.get(self.dtype, 1)

    def elements(self, count: int) -> int:
        """Elements of a packed row of `count` codes."""
        if self.dtype == "int3":
            return -(-count // 8) * 3
        return -(-count // _STORED[self.dtype][1])

    def codes_in(self, elements: int) -> int:
        """Codes that a packed row of so many elements can hold."""
        return elements * 8 // 3 if self.dtype == "int3" else elements * _STORED[self.dtype][1]

    def unpack(self, name: str, stored: Tensor, count: int) -> Tensor:
        """Unsigned codes of packed rows.

        Args:
            name:   local name of the tensor, for errors.
            stored: [R, elements(count)].
        Returns:
            uint8 [R, count].
        Raises:
            BadValueError: an unpacked code is outside the type's range.
        """
        if self.dtype == "int3":
            return unpack_dense(stored.contiguous(), 3, count) ^ 4
        if self.dtype == "uint2":
            shifts = torch.tensor([6, 4, 2, 0], dtype=torch.uint8)
            return ((stored.unsqueeze(-1) >> shifts) & 3).flatten(1)[:, :count].contiguous()
        if self.bits == 4:
            codes = unpack_dense(words_as_bytes(stored), 4, 8 * stored.shape[1])
            codes = deinterleave_even_odd(codes) if self.reorder else codes
            codes = codes[:, :count].contiguous()
            return codes ^ 8 if self.signed else codes
        low, high = -self.middle, (1 << self.bits) - 1 - self.middle
        if self.bits == 2 and bool(((stored < low) | (stored > high)).any()):
            found = f"values from {int(stored.min())} to {int(stored.max())}"
            raise BadValueError(name, found, f"{self.dtype} codes in [{low}, {high}]", "the file is damaged; fetch or write it again")
        if self.bits == 8:
            return stored.contiguous().view(torch.uint8) ^ (0x80 if self.signed else 0)
        return (stored + self.middle).to(torch.uint8)
