"""Safetensors containers: a validated header, and tensors mapped one at a time.

Layout: u64 little-endian header length, that many bytes of JSON {name: {dtype, shape, data_offsets}}, then the data.
Source: safetensors format description, 0.8.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitgrain.checkpoint.headers import TORCH_DTYPES, TensorHeader
from bitgrain.errors import BitgrainError, DamagedFileError, raise_all

MAX_HEADER_BYTES = 100_000_000  # the limit that the reference implementation sets


def read_header(path: Path) -> tuple[dict[str, TensorHeader], dict[str, str]]:
    """Tensor headers by name, and the file's metadata.  Reads no data.

    Raises:
        DamagedFileError: the file is too short, the header is not what the format prescribes, or ranges overlap, leave
            gaps, exceed the file, or differ from what dtype and shape need.
    """
    entries, metadata, data_start, size = _read_json(path)
    problems: list[BitgrainError] = []
    headers: dict[str, TensorHeader] = {}
    for name, entry in entries.items():
        try:
            headers[name] = _parse_entry(path.name, name, entry, data_start)
        except BitgrainError as problem:
            problems.append(problem)
    if not problems:
        _check_ranges(path.name, headers, data_start, size, problems)
    raise_all(path.name, problems)
    return headers, metadata


def _read_json(path: Path) -> tuple[dict[str, Any], dict[str, str], int, int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise DamagedFileError(path.name, f"{size} bytes, of which the header claims {length}", "a whole safetensors file", "fetch or write the file again")
        raw = file.read(length)
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise DamagedFileError(path.name, f"the header is not valid JSON ({error})", "a safetensors header", "fetch or write the file again") from None
    if not isinstance(entries, dict):
        raise DamagedFileError(path.name, "the header is not a JSON object", "a safetensors header", "fetch or write the file again")
    metadata = entries.pop("__metadata__", None) or {}
    return entries, metadata, 8 + length, size


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = sorted({k for k, _ in pairs if k in seen or seen.add(k)})  # type: ignore[func-returns-value]
        raise ValueError(f"names occur twice: {', '.join(twice)}")
    return result


def _parse_entry(file: str, name: str, entry: Any, data_start: int) -> TensorHeader:
    where = f"{file}: {name}"
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, stop]
        valid = isinstance(dtype, str) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers)
    except (TypeError, KeyError, ValueError):
        valid = False
    if not valid:
        raise DamagedFileError(where, f"header entry {str(entry)[:120]}", "dtype, shape and data_offsets", "fetch or write the file again")
    if dtype not in TORCH_DTYPES:
        raise DamagedFileError(where, f"dtype {dtype!r}", f"one of {', '.join(sorted(TORCH_DTYPES))}", "write the file with a known dtype")
    needed = prod(shape) * TORCH_DTYPES[dtype].itemsize
    if stop - start != needed:
        raise DamagedFileError(where, f"{stop - start} bytes for {dtype} {shape}", f"{needed} bytes", "the dtype, the shape or the file is wrong; fetch or write it again")
    return TensorHeader(name, dtype, tuple(shape), file, data_start + start, data_start + stop)


def _check_ranges(file: str, headers: Mapping[str, TensorHeader], data_start: int, size: int, problems: list[BitgrainError]) -> None:
    at, before = data_start, "the header"
    for header in sorted(headers.values(), key=lambda h: (h.start, h.stop)):
        if header.start != at:
            kind = "overlaps" if header.start < at else "leaves a gap after"
            problems.append(DamagedFileError(f"{file}: {header.name}", f"its range {kind} that of {before}", "ranges that follow one another", "fetch or write the file again"))
        at, before = max(at, header.stop), header.name
    if at != size:
        word = "truncated: it has" if at > size else "too long: it has"
        problems.append(DamagedFileError(file, f"{word} {size} bytes", f"{at} bytes by its header", "fetch the file again"))


def map_tensor(path: Path, header: TensorHeader) -> Tensor:
    """The stored tensor, private and mapped from the file; its pages are freed with it."""
    dtype, shape = header.storage
    if header.nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    offset = header.start % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < header.stop:
            raise DamagedFileError(f"{path.name}: {header.name}", "the file became shorter since its header was read", f"{header.stop} bytes", "fetch the file again")
        window = mmap.mmap(file.fileno(), header.nbytes + offset, access=mmap.ACCESS_COPY, offset=header.start - offset)
    flat = torch.frombuffer(window, dtype=torch.uint8, count=header.nbytes, offset=offset)
    if offset % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype).view(shape)
