"""Prepared weights in a file, so that a second start neither decodes nor packs: one file per checkpoint and way of running it.

    data      tensors one after another, each at a multiple of 64 bytes
    index     JSON: the checkpoint's files as they were, and per layer its weight, activation, kernel, tensors with checksums
    trailer   24 bytes: magic, offset and length of the index

A file is used only if the checkpoint holds the same bytes (by size and times, else by checksums of all of it) and every tensor
of it is as it was written; anything else is as if it were not there, and it is written again.  It may be deleted at any time.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from bitgrain.errors import RunError
from bitgrain.kernels.base import Kernel, Prepared
from bitgrain.platforms.host_memory import large_pages
from bitgrain.weights import ActivationSpec, WeightSpec

VERSION, MAGIC, ALIGNMENT = 1, b"bgready1", 64
_TRAILER = struct.Struct("<8sQQ")
_SHARE = 1 << 21  # bytes: where shares of a file that is read by several threads may begin
_WORDS = 4096  # eight-byte words whose sum is one line of a checksum


@dataclass(frozen=True, slots=True)
class ReadyLinear:
    """A prepared linear layer as it stands in a file.

    Args:
        weight: of the matrix, which with the activation and the sizes is the problem that its kernel was chosen for.
        kernel, build: name of that kernel, and what its layout depends on besides.
        bias:   [N] of the dtype of activations, or None.
    """

    weight: WeightSpec
    kernel: str
    build: str
    prepared: Prepared
    bias: Tensor | None

    def is_of(self, kernel: Kernel) -> bool:
        """The kernel, as it is built now, is the one that prepared the layer."""
        return (self.kernel, self.build) == (kernel.name, build_of(kernel))


def build_of(kernel: Kernel) -> str:
    """What the layout of a kernel's prepared weights depends on besides its name."""
    return str(getattr(kernel, "build", ""))


class PreparedFile:
    """The layers of one checkpoint, run in one way.

    Args:
        path:    of the file.
        sources: the checkpoint's files by name.
    """

    def __init__(self, path: Path, sources: Mapping[str, Path]) -> None:
        self.path, self.sources = path, sources
        self.layers: dict[str, ReadyLinear] = {}
        self.changed = False
        found = _read(path)
        if found is None:
            return
        index, data = found
        try:
            stamps = index["files"]
            if set(stamps) == set(sources) and all(_is_same(sources[name], stamp) for name, stamp in stamps.items()):
                self.layers = {label: _restored(entry, data) for label, entry in index["layers"].items()}
        except (KeyError, TypeError, ValueError, AttributeError, ImportError, RuntimeError):
            self.layers = {}  # a file that some other program made

    def get(self, label: str) -> ReadyLinear | None:
        """The layer called `label`, or None."""
        return self.layers.get(label)

    def put(self, label: str, layer: ReadyLinear) -> None:
        """Keep a layer for write(); one whose description has no JSON is left out."""
        try:
            json.dumps(_encoded(layer.prepared.meta))
        except TypeError:
            return
        self.layers[label], self.changed = layer, True

    def write(self) -> None:
        """Write the file if put() was called, in one step: readers see the old one or the new one.

        Raises:
            RunError: the folder cannot be written, or is full.
        """
        if not self.changed:
            return
        temporary = self.path.with_suffix(f".{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                self._write_to(file)
            temporary.replace(self.path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise RunError(str(self.path), f"prepared weights cannot be written: {error.strerror}", "a folder with room for them", "choose another folder, or do without") from None
        self.changed = False

    def _write_to(self, file: BinaryIO) -> None:
        layers = {}
        for label, layer in self.layers.items():
            tensors = dict(layer.prepared.tensors) | ({} if layer.bias is None else {"": layer.bias})
            layers[label] = {
                "weight": dataclasses.asdict(layer.weight), "kernel": layer.kernel, "build": layer.build, "shape": list(layer.prepared.shape),
                "activation": dataclasses.asdict(layer.prepared.activation), "meta": _encoded(layer.prepared.meta),
                "tensors": {name: _written(file, tensor.contiguous()) for name, tensor in tensors.items()},
            }  # fmt: skip
        index = {"version": VERSION, "files": {name: _stamp(path) for name, path in self.sources.items()}, "layers": layers}
        text, offset = json.dumps(index).encode(), file.tell()
        file.write(text)
        file.write(_TRAILER.pack(MAGIC, offset, len(text)))


def checksum(data: Tensor) -> int:
    """CRC-32 of the sums of every 4096 eight-byte words: a changed byte changes it, at the speed of memory."""
    whole = data.numel() // 8 * 8
    words = data[:whole].view(torch.int64)
    lines = words.numel() // _WORDS * _WORDS
    sums = torch.cat([words[:lines].view(-1, _WORDS).sum(1), words[lines:].sum()[None]])
    return zlib.crc32(data[whole:].numpy().tobytes(), zlib.crc32(sums.numpy().tobytes()))


def _written(file: BinaryIO, tensor: Tensor) -> list[Any]:
    """[dtype, shape, offset, bytes, checksum] of a tensor that was appended."""
    file.write(b"\0" * (-file.tell() % ALIGNMENT))
    offset, data = file.tell(), tensor.reshape(-1).view(torch.uint8)
    file.write(data.numpy().data)
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), offset, data.numel(), checksum(data)]


def _read(path: Path) -> tuple[dict[str, Any], Tensor] | None:
    """(index, data uint8) of a file that is whole; else None."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _TRAILER.size))
            magic, offset, length = _TRAILER.unpack(file.read(_TRAILER.size))
            if magic != MAGIC or offset + length + _TRAILER.size != size:
                return None
            file.seek(offset)
            index: dict[str, Any] = json.loads(file.read(length))
        data = large_pages(offset)
        if index["version"] != VERSION or _fill_together(path, data) != offset:
            return None
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return None
    try:
        tensors = [entry for layer in index["layers"].values() for entry in layer["tensors"].values()]
        whole = all(start + count <= offset and checksum(data[start : start + count]) == sum_ for _, _, start, count, sum_ in tensors)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return (index, data) if whole else None


def _fill_together(path: Path, data: Tensor) -> int:
    """Read the beginning of a file into `data`, a share of it by each thread; bytes read."""

    def part(first: int, last: int) -> int:
        with path.open("rb") as file:
            file.seek(first)
            return _fill(file, data[first:last])

    threads = torch.get_num_threads()
    share = -(-data.numel() // threads // _SHARE) * _SHARE
    starts = range(0, data.numel(), max(share, 1))
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(part, starts, [min(start + share, data.numel()) for start in starts]))


def _fill(file: BufferedReader, data: Tensor) -> int:
    """Read into `data` until it is full or the file ends; bytes read.  One call reads 2 GB at most on some systems."""
    view, at = data.numpy().data, 0
    while at < len(view) and (count := file.readinto(view[at : at + (1 << 30)])):
        at += count
    return at


def _restored(entry: Mapping[str, Any], data: Tensor) -> ReadyLinear:
    tensors = {
        name: data[start : start + count].view(getattr(torch, dtype)).view(shape) for name, (dtype, shape, start, count, _) in entry["tensors"].items()
    }
    bias = tensors.pop("", None)
    n, k = entry["shape"]
    prepared = Prepared((n, k), tensors, ActivationSpec(**entry["activation"]), _decoded(entry["meta"]))
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in entry["weight"].items()}
    return ReadyLinear(WeightSpec(**fields), entry["kernel"], entry["build"], prepared, bias)


def _encoded(value: Any) -> Any:
    """A kernel's description in JSON: numbers, texts, dtypes, and the frozen classes of kernels.

    Raises:
        TypeError: anything else.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {name: _encoded(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return {"_tuple": [_encoded(inner) for inner in value]}
    if isinstance(value, torch.dtype):
        return {"_dtype": str(value).removeprefix("torch.")}
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and type(value).__module__.startswith("bitgrain."):
        fields = {field.name: _encoded(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"_class": [type(value).__module__, type(value).__name__], "fields": fields}
    raise TypeError(f"{type(value).__name__} has no place in a file")


def _decoded(value: Any) -> Any:
    """Inverse of _encoded()."""
    if not isinstance(value, dict):
        return value
    if "_tuple" in value:
        return tuple(_decoded(inner) for inner in value["_tuple"])
    if "_dtype" in value:
        return getattr(torch, value["_dtype"])
    if "_class" in value:
        module, name = value["_class"]
        found = getattr(import_module(module), name) if module.startswith("bitgrain.") else None
        if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
            raise TypeError(f"{module}.{name} is no description")
        return found(**{field: _decoded(inner) for field, inner in value["fields"].items()})
    return {name: _decoded(inner) for name, inner in value.items()}


def _stamp(path: Path) -> dict[str, int]:
    """What a file is recognized by."""
    stat = path.stat()
    return {"size": stat.st_size, "mtime": stat.st_mtime_ns, "ctime": stat.st_ctime_ns, "checksum": _file_checksum(path)}


def _is_same(path: Path, stamp: Mapping[str, int]) -> bool:
    try:
        stat = path.stat()
        if stat.st_size != stamp["size"]:
            return False
        return (stat.st_mtime_ns, stat.st_ctime_ns) == (stamp["mtime"], stamp["ctime"]) or _file_checksum(path) == stamp["checksum"]
    except (OSError, KeyError, TypeError):
        return False


def _file_checksum(path: Path) -> int:
    """Of all bytes of a file, a piece at a time."""
    total = 0
    for piece in _pieces(path):
        total = zlib.crc32(checksum(piece).to_bytes(4, "little"), total)
    return total


def _pieces(path: Path, size: int = 1 << 26) -> Iterator[Tensor]:
    buffer = torch.empty(size, dtype=torch.uint8)
    with path.open("rb") as file:
        while count := _fill(file, buffer):
            yield buffer[:count]
