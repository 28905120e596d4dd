"""What a container's header says of one tensor."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from bitgrain.numerics.block_types import BLOCK_TYPES

# Element types as safetensors spells them.
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
FLOAT_CODES = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Name, element type, shape and place of one stored tensor.

    Args:
        dtype: as safetensors spells it ("BF16", "F8_E4M3", ...), or the name of a packed block type ("Q4_K", ...).
        shape: in elements, also where they are packed.
        file:  name of the file, relative to the checkpoint.
        start: first byte inside the file, absolute.
        stop:  one past the last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def storage(self) -> tuple[torch.dtype, tuple[int, ...]]:
        """Element type and shape of the tensor as it is read: packed blocks are bytes, [..., bytes of a row]."""
        if self.dtype not in BLOCK_TYPES:
            return TORCH_DTYPES[self.dtype], self.shape
        return torch.uint8, (*self.shape[:-1], BLOCK_TYPES[self.dtype].row_bytes(self.shape[-1]))

    def describe(self) -> str:
        return f"{self.dtype} {list(self.shape)}"
