"""Stores of keys and values: what is written is what the specification says, what is read is in the compute dtype.

16-bit   code = x
fp8      code = fp8(clamp(x / scale)), rounded to nearest even;   x' = code * scale
int8     scale = max |x| / 127 over one token and head;           x' = code * scale
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from bitgrain.errors import LayoutError, RequestError
from bitgrain.kvcache.spec import KVCacheSpec

FIRST_CAPACITY = 64  # tokens; buffers double from here
_FP8 = {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


class Store(ABC):
    """Keys or values of one attention module, for one sequence; rows are tokens."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens that are stored."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that are allocated, scales included."""

    @abstractmethod
    def append(self, rows: Tensor) -> None:
        """Store [t, heads, D] after what is there."""

    @abstractmethod
    def read(self, dtype: torch.dtype) -> Tensor:
        """[length, heads, D] of `dtype`; may be a view, which the next append may change."""

    @abstractmethod
    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on."""


class Rows:
    """A tensor that grows along its first dimension by doubling, up to `most` rows."""

    def __init__(self, most: int) -> None:
        self.most, self.length = most, 0
        self._buffer: Tensor | None = None

    def append(self, rows: Tensor) -> None:
        stop = self.length + rows.shape[0]
        if stop > self.most:
            raise RequestError(
                "KV cache", f"{stop} tokens", f"at most {self.most}, which it was made for", "make the cache for the whole sequence"
            )
        if self._buffer is None or stop > self._buffer.shape[0]:
            self._buffer = self._grown(rows, stop)
        self._buffer[self.length : stop] = rows
        self.length = stop

    def _grown(self, like: Tensor, needed: int) -> Tensor:
        capacity = FIRST_CAPACITY if self._buffer is None else 2 * self._buffer.shape[0]
        grown = like.new_empty(min(max(capacity, needed), self.most), *like.shape[1:])
        if self._buffer is not None:
            grown[: self.length] = self._buffer[: self.length]
        return grown

    def view(self) -> Tensor:
        if self._buffer is None:
            raise RequestError("KV cache", "nothing is stored", "at least one token", "append before reading")
        return self._buffer[: self.length]

    @property
    def nbytes(self) -> int:
        return 0 if self._buffer is None else self._buffer.numel() * self._buffer.element_size()


class PlainStore(Store):
    """Numbers as they come."""

    def __init__(self, most: int) -> None:
        self._rows = Rows(most)

    @property
    def length(self) -> int:
        return self._rows.length

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes

    def append(self, rows: Tensor) -> None:
        self._rows.append(rows)

    def read(self, dtype: torch.dtype) -> Tensor:
        return self._rows.view().to(dtype)

    def truncate(self, length: int) -> None:
        self._rows.length = min(length, self._rows.length)


class Float8Store(PlainStore):
    """Float8 codes with one scale, one scale per head, or none.

    Args:
        scale: multipliers; empty: numbers are stored as they are.
    """

    def __init__(self, most: int, element: str, scale: tuple[float, ...]) -> None:
        super().__init__(most)
        self._dtype, self._scale = _FP8[element], scale
        self._limit = torch.finfo(self._dtype).max

    def _scales(self, like: Tensor) -> Tensor | None:
        if not self._scale:
            return None
        if len(self._scale) not in (1, like.shape[1]):
            raise LayoutError(
                "KV cache",
                f"{len(self._scale)} scales for {like.shape[1]} heads",
                "one, or one per head",
                "correct the checkpoint's cache scales",
            )
        return torch.tensor(self._scale, dtype=torch.float32, device=like.device)[:, None]

    def append(self, rows: Tensor) -> None:
        scale = self._scales(rows)
        scaled = rows.float() if scale is None else rows.float() / scale
        super().append(scaled.clamp(-self._limit, self._limit).to(self._dtype))

    def read(self, dtype: torch.dtype) -> Tensor:
        codes = self._rows.view()
        scale = self._scales(codes)
        return codes.to(dtype) if scale is None else (codes.float() * scale).to(dtype)


class Int8Store(PlainStore):
    """Int8 codes with a float32 scale per token and head, computed when they are written."""

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self._scales = Rows(most)

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes + self._scales.nbytes

    def append(self, rows: Tensor) -> None:
        wide = rows.float()
        scale = wide.abs().amax(dim=-1, keepdim=True) / 127.0
        codes = torch.where(scale > 0, wide / scale, torch.zeros_like(wide))  # a row of zeros has scale 0
        super().append(torch.round(codes).clamp(-127, 127).to(torch.int8))
        self._scales.append(scale)

    def read(self, dtype: torch.dtype) -> Tensor:
        return (self._rows.view().float() * self._scales.view()).to(dtype)

    def truncate(self, length: int) -> None:
        super().truncate(length)
        self._scales.length = self._rows.length


def make_stores(spec: KVCacheSpec, most: int) -> tuple[Store, Store]:
    """(keys, values) stores of one attention module for sequences of up to `most` tokens."""
    if spec.element in _FP8:
        return Float8Store(most, spec.element, spec.k_scale), Float8Store(most, spec.element, spec.v_scale)
    if spec.element == "int8":
        return Int8Store(most), Int8Store(most)
    return PlainStore(most), PlainStore(most)
