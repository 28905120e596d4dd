"""Stores of keys and values: what is written is what the specification says, what is read is in the compute dtype.

16-bit   code = x
fp8      code = fp8(clamp(x / scale)), rounded to nearest even;   x' = code * scale
int8     scale = max |x| / 127 over one token and head;           x' = code * scale
int8 and int4 with stored scales: code = round(clamp(x / scale + zero)); x' = (code - zero) * scale
int4 with computed scales and nvfp4: see packed_stores
With a bias b, x - b is stored and b is added to what is read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from bitgrain.errors import LayoutError, RequestError

FIRST_CAPACITY = 64  # tokens; buffers double from here
FP8 = {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


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
        self.reserve(rows[:0], stop)
        assert self._buffer is not None
        self._buffer[self.length : stop] = rows
        self.length = stop

    def reserve(self, like: Tensor, rows: int) -> Tensor:
        """The buffer, grown where it has room for fewer rows; a new one is as `like`, which is [0, ...]."""
        if self._buffer is None or rows > self._buffer.shape[0]:
            self._buffer = self._grown(like, rows)
        return self._buffer

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

    def reserve(self, like: Tensor, rows: int) -> Tensor:
        """The buffer [capacity, heads, D], capacity >= rows; a new one is as `like` [0, heads, D]."""
        return self._rows.reserve(like, rows)

    def advance(self) -> None:
        """Count a row that was written into the buffer."""
        self._rows.length += 1

    def truncate(self, length: int) -> None:
        self._rows.length = min(length, self._rows.length)


def expanded(values: tuple[float, ...], rows: Tensor, channel: bool = False) -> Tensor:
    """float32 [1 or heads, 1 or D] that stands for each row of [t, heads, D].

    Args:
        values:  one, one per head, or, where `channel`, one per head and column, head after head.
    Raises:
        LayoutError: another number of them.
    """
    heads, columns = rows.shape[1], rows.shape[2]
    needed = (heads * columns,) if channel else (1, heads)
    if len(values) not in needed:
        wanted = f"{heads * columns}, one per head and column" if channel else "one, or one per head"
        raise LayoutError(
            "KV cache", f"{len(values)} scales for {heads} heads of {columns}", wanted, "correct the checkpoint's cache scales"
        )
    flat = torch.tensor(values, dtype=torch.float32, device=rows.device)
    return flat.view(heads, columns) if channel else flat[:, None]


class Float8Store(PlainStore):
    """Float8 codes with one stored scale, or one per head or channel.

    Args:
        scale:   multipliers; empty: numbers are stored as they are.
        channel: see KVCacheSpec.
    """

    def __init__(self, most: int, element: str, scale: tuple[float, ...], channel: bool = False) -> None:
        super().__init__(most)
        self._dtype, self._scale, self._channel = FP8[element], scale, channel
        self._limit = torch.finfo(self._dtype).max

    def append(self, rows: Tensor) -> None:
        scaled = rows.float() / expanded(self._scale, rows, self._channel) if self._scale else rows.float()
        super().append(scaled.clamp(-self._limit, self._limit).to(self._dtype))

    def read(self, dtype: torch.dtype) -> Tensor:
        codes = self._rows.view()
        return (codes.float() * expanded(self._scale, codes, self._channel)).to(dtype) if self._scale else codes.to(dtype)


class StaticInt8Store(PlainStore):
    """Int8 codes with stored scales and zero points, each one, one per head, or one per channel."""

    def __init__(self, most: int, scale: tuple[float, ...], zero: tuple[float, ...], channel: bool = False) -> None:
        super().__init__(most)
        self._scale, self._zero, self._channel = scale, zero or (0.0,) * len(scale), channel

    def append(self, rows: Tensor) -> None:
        moved = rows.float() / expanded(self._scale, rows, self._channel) + expanded(self._zero, rows, self._channel)
        super().append(torch.round(moved.clamp(-128, 127)).to(torch.int8))

    def read(self, dtype: torch.dtype) -> Tensor:
        codes = self._rows.view()
        moved = codes.float() - expanded(self._zero, codes, self._channel)
        return (moved * expanded(self._scale, codes, self._channel)).to(dtype)


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


class BiasedStore(Store):
    """Another store of x - bias; the bias is added to what is read, in float32.

    Args:
        bias: one number, one per head, one per column of a head, or one per head and column; of equal counts the first fits.
    """

    def __init__(self, inner: Store, bias: tuple[float, ...]) -> None:
        self._inner, self._bias = inner, bias

    @property
    def length(self) -> int:
        return self._inner.length

    @property
    def nbytes(self) -> int:
        return self._inner.nbytes

    def _shaped(self, rows: Tensor) -> Tensor:
        """float32 [1 or heads, 1 or D].

        Raises:
            LayoutError: no such count.
        """
        heads, columns = rows.shape[1], rows.shape[2]
        shapes = {heads * columns: (heads, columns), columns: (1, columns), heads: (heads, 1), 1: (1, 1)}
        if len(self._bias) not in shapes:
            raise LayoutError(
                "KV cache",
                f"{len(self._bias)} biases for {heads} heads of {columns}",
                f"one of {sorted(shapes)}",
                "correct the checkpoint's cache biases",
            )
        return torch.tensor(self._bias, dtype=torch.float32, device=rows.device).view(shapes[len(self._bias)])

    def append(self, rows: Tensor) -> None:
        self._inner.append(rows.float() - self._shaped(rows))

    def read(self, dtype: torch.dtype) -> Tensor:
        rows = self._inner.read(torch.float32)
        return (rows + self._shaped(rows)).to(dtype)

    def truncate(self, length: int) -> None:
        self._inner.truncate(length)
