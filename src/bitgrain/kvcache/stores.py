"""Stores of keys and values: what is written is what the specification says, what is read is in the compute dtype.

16-bit   code = x
fp8      code = fp8(clamp(x / scale)), rounded to nearest even;   x' = code * scale
int8     scale = max |x| / 127 over one token and head;           x' = code * scale
         with stored scales: code = round(clamp(x / scale + zero, -128, 127)); x' = (code - zero) * scale
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


class ScaledStore(PlainStore):
    """Codes with one stored scale, or one per head.

    Args:
        scale: multipliers; empty: numbers are stored as they are.
    """

    def __init__(self, most: int, scale: tuple[float, ...]) -> None:
        super().__init__(most)
        self._scale = scale

    @staticmethod
    def _per_head(values: tuple[float, ...], like: Tensor) -> Tensor:
        """float32 [1 or heads, 1].

        Raises:
            LayoutError: neither one nor one per head.
        """
        if len(values) not in (1, like.shape[1]):
            raise LayoutError(
                "KV cache", f"{len(values)} scales for {like.shape[1]} heads", "one, or one per head", "correct the checkpoint's cache scales"
            )
        return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


class Float8Store(ScaledStore):
    """Float8 codes."""

    def __init__(self, most: int, element: str, scale: tuple[float, ...]) -> None:
        super().__init__(most, scale)
        self._dtype = _FP8[element]
        self._limit = torch.finfo(self._dtype).max

    def append(self, rows: Tensor) -> None:
        scaled = rows.float() / self._per_head(self._scale, rows) if self._scale else rows.float()
        super().append(scaled.clamp(-self._limit, self._limit).to(self._dtype))

    def read(self, dtype: torch.dtype) -> Tensor:
        codes = self._rows.view()
        return (codes.float() * self._per_head(self._scale, codes)).to(dtype) if self._scale else codes.to(dtype)


class StaticInt8Store(ScaledStore):
    """Int8 codes with stored scales and zero points."""

    def __init__(self, most: int, scale: tuple[float, ...], zero: tuple[float, ...]) -> None:
        super().__init__(most, scale)
        self._zero = zero or (0.0,)

    def append(self, rows: Tensor) -> None:
        moved = rows.float() / self._per_head(self._scale, rows) + self._per_head(self._zero, rows)
        super().append(torch.round(moved.clamp(-128, 127)).to(torch.int8))

    def read(self, dtype: torch.dtype) -> Tensor:
        codes = self._rows.view()
        return ((codes.float() - self._per_head(self._zero, codes)) * self._per_head(self._scale, codes)).to(dtype)


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
    if spec.element == "int8" and spec.source == "checkpoint":
        return StaticInt8Store(most, spec.k_scale, spec.k_zero), StaticInt8Store(most, spec.v_scale, spec.v_zero)
    if spec.element == "int8":
        return Int8Store(most), Int8Store(most)
    return PlainStore(most), PlainStore(most)
