"""Which GGUF files make up one model: a single file, or all shards of a split one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitgrain.checkpoint.gguf_header import GgufHeader, read_gguf_header
from bitgrain.checkpoint.headers import TensorHeader
from bitgrain.errors import BitgrainError, DamagedFileError, RequestError, raise_all

SUFFIX = ".gguf"
# NAME-00001-of-00003.gguf, counted from 1
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
MAX_SHARDS = 99_999  # five digits


def read_gguf(path: Path) -> tuple[Mapping[str, TensorHeader], Mapping[str, Any], tuple[str, ...]]:
    """(tensor headers by name, typed metadata, file names) of the model that begins with the file at `path`.

    Raises:
        RequestError: the file is a later shard, or holds something else than a model.
        DamagedFileError: a shard is missing or disagrees with the first one; or as read_gguf_header().
    """
    first = _read(path)
    _require_model(path.name, first.metadata)
    count = _number(path.name, first.metadata, "split.count", 1)
    shard = _number(path.name, first.metadata, "split.no", 0)
    if shard:
        raise RequestError(path.name, f"shard {shard + 1} of {count} of a split model", "the first shard, which describes the whole", f"open {_shard_name(path.name, 0, count)}")
    if count < 2:
        return first.tensors, first.metadata, (path.name,)
    if count > MAX_SHARDS:
        raise DamagedFileError(f"{path.name}: split.count", str(count), f"at most {MAX_SHARDS}", "fetch or write the file again")
    names = _shard_names(path, count)
    tensors = _join(path.parent, first, names)
    declared = _number(path.name, first.metadata, "split.tensors.count", len(tensors))
    if declared != len(tensors):
        raise DamagedFileError(f"{path.name}: split.tensors.count", f"{declared}, but the {count} shards hold {len(tensors)} tensors", "equal numbers", "fetch the shards again")
    return tensors, first.metadata, tuple(names)


def choose_model(folder: Path, names: list[str]) -> tuple[str, tuple[str, ...]]:
    """(the file to open, notes on those left out) among the GGUF files of a folder.

    Raises:
        RequestError: several models, or none.
    """
    starts = [name for name in names if not is_later_shard(name)] or names
    if len(starts) == 1:
        return starts[0], ()
    models, notes = [], []
    for name in starts:
        kind = _read(folder / name).metadata.get("general.type", "model")
        if kind == "model":
            models.append(name)
        else:
            notes.append(f"{name} was left out: it is no model but a {kind!r} file")
    if len(models) != 1:
        shown = ", ".join((models or starts)[:8])
        raise RequestError(folder.name, f"{len(models)} models in {SUFFIX} files: {shown}", "one model", "give the path of the file that you want")
    return models[0], tuple(notes)


def _read(path: Path) -> GgufHeader:
    try:
        return read_gguf_header(path)
    except OSError as error:
        raise DamagedFileError(path.name, f"it cannot be read ({error.strerror or error})", "a readable file", "check the path and its permissions") from None


def _require_model(name: str, metadata: Mapping[str, Any]) -> None:
    kind = metadata.get("general.type", "model")
    if kind != "model":
        known = {"adapter": "a LoRA adapter", "mmproj": "the vision or audio part of a model", "imatrix": "calibration data", "vocab": "a vocabulary"}
        found = f"general.type {str(kind)[:40]!r}: {known.get(kind, 'something else') if isinstance(kind, str) else 'not a text'}"
        raise RequestError(name, found, "a file of the type 'model'", "open the model's own file")


def _number(name: str, metadata: Mapping[str, Any], key: str, absent: int) -> int:
    value = metadata.get(key, absent)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise DamagedFileError(f"{name}: {key}", repr(value)[:80], "a number of at least 0", "fetch or write the file again")
    return value


def is_later_shard(name: str) -> bool:
    """Whether a file's name is that of a shard other than the first."""
    found = _SHARD.fullmatch(name)
    return found is not None and int(found["number"]) != 1


def shards_of(name: str) -> list[str]:
    """The names of all files of the model that begins with the file `name`, itself included, as the name tells."""
    found = _SHARD.fullmatch(name)
    return [name] if found is None else [_shard_name(name, index, int(found["count"])) for index in range(int(found["count"]))]


def _shard_name(name: str, index: int, count: int) -> str:
    found = _SHARD.fullmatch(name)
    stem = found["stem"] if found else name.removesuffix(SUFFIX)
    return f"{stem}-{index + 1:05d}-of-{count:05d}{SUFFIX}"


def _shard_names(path: Path, count: int) -> list[str]:
    """The names of all shards, which must exist.

    Raises:
        DamagedFileError: the first file is not called as a shard, or some are absent.
    """
    names = [_shard_name(path.name, index, count) for index in range(count)]
    if names[0] != path.name:
        raise DamagedFileError(path.name, f"split.count {count}, but the file is not called as a first shard", f"the name {names[0]}", "give the shards their names back")
    absent = [name for name in names if not (path.parent / name).is_file()]
    if absent:
        shown = ", ".join(absent[:4]) + (f" and {len(absent) - 4} more" if len(absent) > 4 else "")
        raise DamagedFileError(path.name, f"{len(absent)} of {count} shards are absent: {shown}", "every shard beside the first", "fetch the missing shards")
    return names


def _join(folder: Path, first: GgufHeader, names: list[str]) -> dict[str, TensorHeader]:
    tensors = dict(first.tensors)
    problems: list[BitgrainError] = []
    for index, name in enumerate(names[1:], 1):
        try:
            shard = _read(folder / name)
            _check_shard(name, shard.metadata, index, len(names))
        except BitgrainError as problem:
            problems.append(problem)
            continue
        for tensor in shard.tensors.keys() & tensors.keys():
            problems.append(DamagedFileError(f"{name}: {tensor}", f"also in {tensors[tensor].file}", "each tensor in one shard", "fetch the shards again"))
        tensors.update(shard.tensors)
    raise_all(names[0], problems)
    return tensors


def _check_shard(name: str, metadata: Mapping[str, Any], index: int, count: int) -> None:
    found = _number(name, metadata, "split.no", 0), _number(name, metadata, "split.count", 0)
    if found != (index, count):
        raise DamagedFileError(name, f"split.no {found[0]}, split.count {found[1]}", f"split.no {index}, split.count {count}", "the shards are of different models, or renamed: fetch them again")
