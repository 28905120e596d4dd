"""The header of one GGUF file: typed metadata and tensor descriptions, validated before anything large is allocated.

    magic "GGUF", u32 version, u64 tensor count, u64 entry count, entries, tensor descriptions, padding, data
    entry:  string key, u32 type, value         tensor: string name, u32 dims, u64 size[dims], u32 type, u64 offset
Everything is little-endian, a string is a u64 length and that many bytes, the first size is the contiguous one, and
offsets count from the data, which starts at a multiple of the alignment.  Source: ggml's GGUF description, version 3.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from bitgrain.checkpoint.headers import TORCH_DTYPES, TensorHeader
from bitgrain.errors import BitgrainError, DamagedFileError, ShapeMismatchError, raise_all
from bitgrain.numerics.block_types import BLOCK_TYPES

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
# Limits far above any real file (a vocabulary has about a million entries), so that a hostile one costs little.
MAX_ELEMENTS = 1 << 24
MAX_METADATA_BYTES = 1 << 28
MAX_DEPTH = 4
MAX_DIMENSIONS = 4
MAX_TENSORS = 1 << 20
FETCH = "fetch or write the file again"

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
BOOL, STRING, ARRAY = 7, 8, 9
# fewest bytes that an array's element of a type takes
SMALLEST = {**{kind: struct.calcsize(code) for kind, code in NUMBERS.items()}, BOOL: 1, STRING: 8, ARRAY: 12}
ENTRY_BYTES, TENSOR_BYTES = 8 + 4 + 1, 8 + 4 + 4 + 8

TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16",
    26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0", 42: "Q2_0",
}  # fmt: skip
REMOVED_TYPES = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}
ACTIVATION_TYPES = {9: "Q8_1", 15: "Q8_K"}


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What one file says.

    Args:
        metadata: key to a number, a text, a truth value or a list of such; bytes that are no UTF-8 are kept as surrogates.
        tensors:  by name; shapes in the order of [N, K], the contiguous size last.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorHeader]


def read_gguf_header(path: Path) -> GgufHeader:
    """The validated header of a file; reads no tensor data.

    Raises:
        DamagedFileError: not such a file, another version or byte order, counts or lengths beyond the file, names that occur
            twice, tensors of unknown or removed types, misaligned, overlapping or past the end.
        ShapeMismatchError: rows that are no whole number of blocks.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        reader = _Reader(file, path.name, size)
        _check_start(reader)
        tensors, entries = reader.number("Q"), reader.number("Q")
        reader.check_count("tensor_count", tensors, TENSOR_BYTES)
        reader.check_count("kv_count", entries, ENTRY_BYTES)
        metadata = _read_metadata(reader, entries)
        alignment = _alignment(path.name, metadata)
        found = [_read_tensor(reader) for _ in range(tensors)]
        return GgufHeader(metadata, _place(path.name, found, reader.at, alignment, size))


class _Reader:
    """Sequential reads of a file, each checked against its size first."""

    def __init__(self, file: Any, name: str, size: int) -> None:
        self.file, self.name, self.size, self.at, self.elements = file, name, size, 0, 0

    def fail(self, what: str, found: str, needed: str, action: str = FETCH) -> DamagedFileError:
        return DamagedFileError(f"{self.name}: {what}", found, needed, action)

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            raise self.fail(what, f"a length of {count} bytes at byte {self.at} of {self.size}", "a length within the file")
        self.at += count
        data: bytes = self.file.read(count)
        if len(data) != count:
            raise self.fail(what, "the file became shorter while it was read", f"{self.size} bytes")
        return data

    def number(self, code: str, what: str = "header") -> int:
        value: int = struct.unpack(f"<{code}", self.take(struct.calcsize(code), what))[0]
        return value

    def check_count(self, what: str, count: int, smallest: int) -> None:
        """Raise unless `count` items of at least `smallest` bytes each fit into the rest of the file."""
        if count * smallest > self.size - self.at or (what == "tensor_count" and count > MAX_TENSORS):
            raise self.fail(what, f"{count}, at least {count * smallest} bytes, with {self.size - self.at} left in the file", "a count that fits the file")

    def text(self, what: str) -> str:
        """A name, which must be UTF-8."""
        raw = self.take(self.number("Q", f"{what} length"), f"{what} length")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(what, f"{raw[:60]!r}, which is not UTF-8", "UTF-8") from None

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind in NUMBERS:
            return struct.unpack(f"<{NUMBERS[kind]}", self.take(SMALLEST[kind], key))[0]
        if kind == BOOL:
            return self._flags(self.take(1, key), key)[0]
        if kind == STRING:
            raw = self.take(self.number("Q", f"metadata {key} length"), f"metadata {key}: string length")
            return raw.decode("utf-8", errors="surrogateescape")
        if kind == ARRAY:
            return self._array(key, depth)
        raise self.fail(f"metadata {key}", f"value type {kind}", f"one of {', '.join(map(str, sorted(SMALLEST)))}")

    def _flags(self, raw: bytes, key: str) -> list[bool]:
        if not set(raw) <= {0, 1}:
            raise self.fail(f"metadata {key}", "a truth value other than 0 and 1", "0 or 1")
        return [byte == 1 for byte in raw]

    def _array(self, key: str, depth: int) -> list[Any]:
        kind, count = self.number("I", key), self.number("Q", key)
        if kind not in SMALLEST:
            raise self.fail(f"metadata {key}", f"elements of type {kind}", f"one of {', '.join(map(str, sorted(SMALLEST)))}")
        if depth >= MAX_DEPTH:
            raise self.fail(f"metadata {key}", f"arrays nested more than {MAX_DEPTH} deep", "fewer levels")
        self.check_count(f"metadata {key}: array count", count, SMALLEST[kind])
        self.elements += count
        if self.elements > MAX_ELEMENTS:
            raise self.fail(f"metadata {key}: array count", f"{self.elements} array elements in all", f"at most {MAX_ELEMENTS}")
        if kind in NUMBERS:
            return list(struct.unpack(f"<{count}{NUMBERS[kind]}", self.take(count * SMALLEST[kind], key)))
        if kind == BOOL:
            return self._flags(self.take(count, key), key)
        return [self.value(kind, key, depth + 1) for _ in range(count)]


def _check_start(reader: _Reader) -> None:
    if reader.size < 24 or reader.take(4, "magic") != MAGIC:
        raise reader.fail("magic", "the file does not begin with GGUF, or is shorter than a header", "a whole GGUF file")
    version = reader.number("I", "version")
    if version & 0xFFFF == 0 and version:
        raise reader.fail("version", f"{version:#x}: the file is big-endian, made for a machine of the other byte order", "a little-endian file", "convert it to little-endian, or fetch the usual file")
    if version not in VERSIONS:
        raise reader.fail("version", str(version), f"version {' or '.join(map(str, VERSIONS))}", "write the file again with a current converter")


def _read_metadata(reader: _Reader, entries: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    start = reader.at
    for _ in range(entries):
        key = reader.text("metadata key")
        if key in metadata:
            raise reader.fail(f"metadata key {key!r}", "it occurs twice", "each key once")
        metadata[key] = reader.value(reader.number("I", key), key)
        if reader.at - start > MAX_METADATA_BYTES:
            raise reader.fail(f"metadata key {key!r}", f"more than {MAX_METADATA_BYTES} bytes of metadata", "less")
    return metadata


def _alignment(file: str, metadata: Mapping[str, Any]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or value & (value - 1) or value > 1 << 30:
        raise DamagedFileError(f"{file}: general.alignment", repr(value)[:80], "a power of two", FETCH)
    return value


@dataclass(frozen=True, slots=True)
class _Description:
    name: str
    sizes: tuple[int, ...]
    kind: int
    offset: int


def _read_tensor(reader: _Reader) -> _Description:
    name = reader.text("tensor name")
    count = reader.number("I", name)
    if count > MAX_DIMENSIONS:
        raise reader.fail(name, f"{count} dimensions", f"at most {MAX_DIMENSIONS}")
    sizes = struct.unpack(f"<{count}Q", reader.take(8 * count, name))
    return _Description(name, tuple(reversed(sizes)), reader.number("I", name), reader.number("Q", name))


def _place(file: str, found: list[_Description], header_end: int, alignment: int, size: int) -> dict[str, TensorHeader]:
    """Headers with absolute positions."""
    start = -(-header_end // alignment) * alignment
    tensors: dict[str, TensorHeader] = {}
    problems: list[BitgrainError] = []
    for entry in found:
        try:
            header = _header(file, entry, start, alignment, size)
            if entry.name in tensors:
                raise DamagedFileError(f"{file}: {entry.name}", "the name occurs twice", "each tensor once", FETCH)
            tensors[entry.name] = header
        except BitgrainError as problem:
            problems.append(problem)
    if not problems:
        problems = _misplaced(file, tensors, start, alignment, size)
    raise_all(file, problems)
    return tensors


def _header(file: str, entry: _Description, start: int, alignment: int, size: int) -> TensorHeader:
    where = f"{file}: {entry.name}"
    kind = _type_name(where, entry.kind)
    if any(n < 1 for n in entry.sizes):
        raise DamagedFileError(where, f"shape {list(entry.sizes)}", "sizes of at least 1", FETCH)
    nbytes = _stored_bytes(where, kind, entry.sizes)
    if entry.offset % alignment:
        raise DamagedFileError(where, f"offset {entry.offset}", f"a multiple of the alignment, {alignment}", FETCH)
    if start + entry.offset + nbytes > size:
        found = f"its {nbytes} bytes end at byte {start + entry.offset + nbytes}, the file at {size}"
        raise DamagedFileError(where, found, "a whole file: this one is truncated, or its header lies", "fetch the file again")
    return TensorHeader(entry.name, kind, entry.sizes, file, start + entry.offset, start + entry.offset + nbytes)


def _type_name(where: str, kind: int) -> str:
    if kind in TYPE_NAMES:
        return TYPE_NAMES[kind]
    if kind in REMOVED_TYPES:
        raise DamagedFileError(where, f"type {kind} ({REMOVED_TYPES[kind]}), which was removed", "a current type", "quantize it again from its source; repacking is now done while a model loads")
    if kind in ACTIVATION_TYPES:
        raise DamagedFileError(where, f"type {kind} ({ACTIVATION_TYPES[kind]}), which only activations have", "a type of weights", FETCH)
    raise DamagedFileError(where, f"unknown type {kind}", f"one of {', '.join(TYPE_NAMES.values())}", "update bitgrain if the writer is newer, or fetch the file again")


def _stored_bytes(where: str, kind: str, sizes: tuple[int, ...]) -> int:
    if kind not in BLOCK_TYPES:
        return prod(sizes) * TORCH_DTYPES[kind].itemsize
    layout = BLOCK_TYPES[kind]
    width = sizes[-1] if sizes else 1
    if width % layout.elements:
        raise ShapeMismatchError(where, f"{kind} rows of {width} elements", f"a multiple of its block of {layout.elements}", FETCH)
    return prod(sizes[:-1]) * layout.row_bytes(width)


def _misplaced(file: str, tensors: Mapping[str, TensorHeader], start: int, alignment: int, size: int) -> list[BitgrainError]:
    """Tensors that do not follow one another, each from the first multiple of the alignment on; and what follows the last."""
    problems: list[BitgrainError] = []
    at, before = start, "the header"
    for header in sorted(tensors.values(), key=lambda h: (h.start, h.stop)):
        expected = -(-at // alignment) * alignment
        if header.start != expected:
            kind = "overlaps" if header.start < expected else "leaves a gap after"
            problems.append(DamagedFileError(f"{file}: {header.name}", f"its range {kind} that of {before}", "tensors that follow one another", FETCH))
        at, before = max(at, header.stop), header.name
    # a later shard of a file with an alignment of its own may not say so: its tensors then end too early
    if tensors and not problems and size > -(-at // alignment) * alignment:
        found = f"{size - at} bytes after {before}, the last tensor"
        problems.append(DamagedFileError(file, found, f"at most padding to the alignment, {alignment}", "the header, general.alignment or the file is wrong; fetch or write it again"))
    return problems
