"""A checkpoint on disk: which files it has, what their headers say, and its tensors one at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bitgrain.checkpoint.gguf_files import SUFFIX as GGUF
from bitgrain.checkpoint.gguf_files import choose_model, read_gguf
from bitgrain.checkpoint.headers import TensorHeader
from bitgrain.checkpoint.hub import fetch, is_hub_id
from bitgrain.checkpoint.safetensors_file import map_tensor, read_header
from bitgrain.errors import (
    BitgrainError,
    DamagedFileError,
    MissingTensorError,
    RequestError,
    UnexpectedTensorError,
    UnsafeFileError,
    raise_all,
)

# Files beside config.json in which producers repeat or keep their quantization configuration.
SIDECARS = (
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
    "hf_quant_config.json",
    "quant_model_description.json",
    "quantization_map.json",
)
# ... and patterns of further ones, whose names end in what was written.
SIDECAR_PATTERNS = ("quant_model_description_*.json", "*_qmap.json")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """Headers and JSON files of one checkpoint.

    Args:
        root:     the folder.
        label:    what messages call the checkpoint.
        config:   config.json, empty if there is none.  A container that describes its model itself has `properties`
                  instead, which formats make a configuration of (formats.detect.described).
        sidecars: file name to contents of each further quantization configuration.
        tensors:  header by full tensor name.
        metadata: file name to its string metadata.
        notes:    files that were left out, and under which rule.
        properties: typed key-value metadata of such a container: numbers, texts, truth values and lists of them.
        config_name: what messages call the source of `config`.
    """

    root: Path
    label: str
    config: Mapping[str, Any]
    sidecars: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, TensorHeader]
    metadata: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    properties: Mapping[str, Any] = field(default_factory=dict)
    config_name: str = "config.json"

    def read(self, name: str) -> Tensor:
        """The stored tensor `name`, mapped; drop it to free its pages."""
        header = self.tensors[name]
        return map_tensor(self.root / header.file, header)


def open_files(path: str | Path) -> CheckpointFiles:
    """Read the headers of the checkpoint at `path`: a folder, a .safetensors or .gguf file, or a hub id (extra `hub`).

    Raises:
        RequestError: nothing is there.
        DamagedFileError, MissingTensorError, UnexpectedTensorError: files, index and headers disagree.
        UnsafeFileError: only files that execute code when read.
    """
    place = _locate(path)
    if place.is_dir():
        return _open_folder(place)
    if place.suffix == GGUF:
        return _open_gguf(place)
    if place.suffix != ".safetensors":
        _refuse_file(place)
    headers, metadata = read_header(place)
    return CheckpointFiles(
        place.parent, place.name, _read_json(place.parent / "config.json"), _read_sidecars(place.parent), headers, {place.name: metadata}
    )


def _locate(path: str | Path) -> Path:
    place = Path(path).expanduser()
    if place.exists():
        return place
    text = str(path)
    if is_hub_id(text):
        return fetch(text)
    raise RequestError(text, "no such file or folder", "a checkpoint folder, a .safetensors or .gguf file, or a hub id", "check the path")


def _refuse_file(place: Path) -> None:
    if place.suffix in PICKLE_SUFFIXES:
        raise UnsafeFileError(place.name, "a pickle, which executes code when it is read", "safetensors", "convert it to safetensors where you trust it")
    raise RequestError(str(place), f"a {place.suffix or 'nameless'} file", "a folder, a .safetensors or a .gguf file", "this version reads no other container")


def _open_gguf(place: Path, notes: tuple[str, ...] = ()) -> CheckpointFiles:
    """The model of a GGUF file; everything about it is in the file itself, so JSON files beside it are not read."""
    tensors, properties, names = read_gguf(place)
    return CheckpointFiles(place.parent, place.name, {}, {}, tensors, {name: {} for name in names}, notes, properties, f"{place.name}: metadata")


def _open_folder(root: Path) -> CheckpointFiles:
    indices = sorted(root.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise DamagedFileError(root.name, f"several indices: {', '.join(i.name for i in indices)}", "one index", "keep the one that belongs to this checkpoint")
    present = sorted(p.name for p in root.glob("*.safetensors"))
    packed = sorted(p.name for p in root.glob(f"*{GGUF}"))
    if packed and not present and not indices:
        name, others = choose_model(root, packed)
        return _open_gguf(root / name, others)
    if indices:
        tensors, metadata = _read_indexed(root, indices[0])
        notes = tuple(f"{name} is not in {indices[0].name} and was left out" for name in present if name not in metadata)
    else:
        if not present:
            _refuse_folder(root)
        chosen = ["model.safetensors"] if "model.safetensors" in present else present
        notes = tuple(f"{name} was left out: model.safetensors holds the checkpoint" for name in present if name not in chosen)
        tensors, metadata = _read_all(root, chosen)
    notes += tuple(f"{name} was left out: safetensors files hold the checkpoint" for name in packed)
    return CheckpointFiles(root, root.name, _read_json(root / "config.json"), _read_sidecars(root), tensors, metadata, notes)


def _refuse_folder(root: Path) -> None:
    pickles = sorted(p.name for p in root.iterdir() if p.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise UnsafeFileError(root.name, f"only pickles: {', '.join(pickles[:5])}", "safetensors files", "convert them to safetensors where you trust them")
    other = sorted(p.name for p in root.iterdir())[:8]
    raise RequestError(str(root), f"no .safetensors or .gguf file (there are: {', '.join(other) or 'no files'})", "a checkpoint", "check the path")


def _read_all(root: Path, names: list[str]) -> tuple[dict[str, TensorHeader], dict[str, dict[str, str]]]:
    tensors: dict[str, TensorHeader] = {}
    metadata: dict[str, dict[str, str]] = {}
    problems: list[BitgrainError] = []
    for name in names:
        try:
            headers, metadata[name] = read_header(root / name)
        except BitgrainError as problem:
            problems.append(problem)
            continue
        for tensor in headers.keys() & tensors.keys():
            problems.append(DamagedFileError(f"{name}: {tensor}", f"also in {tensors[tensor].file}", "each tensor in one file", "remove one of the two, or add an index"))
        tensors.update(headers)
    raise_all(root.name, problems)
    return tensors, metadata


def _read_indexed(root: Path, index: Path) -> tuple[dict[str, TensorHeader], dict[str, dict[str, str]]]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) and f == Path(f).name for f in weight_map.values()):
        raise DamagedFileError(index.name, "no weight_map of tensor names to file names", "an index", "fetch or write it again")
    names = sorted(set(weight_map.values()))
    missing = [n for n in names if not (root / n).is_file()]
    raise_all(root.name, [DamagedFileError(n, f"absent, but {index.name} names it", "every shard", "fetch the missing shard") for n in missing])
    tensors, metadata = _read_all(root, names)
    problems: list[BitgrainError] = []
    for tensor, file in weight_map.items():
        header = tensors.get(tensor)
        if header is None or header.file != file:
            there = f"it is in {header.file}" if header else "no shard has it"
            problems.append(MissingTensorError(f"{file}: {tensor}", f"absent ({there})", f"the tensor, by {index.name}", "write the index again, or fetch the shard again"))
    for tensor in tensors.keys() - weight_map.keys():
        problems.append(UnexpectedTensorError(f"{tensors[tensor].file}: {tensor}", f"not in {index.name}", "an index that names every tensor", "write the index again"))
    raise_all(root.name, problems)
    return tensors, metadata


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise DamagedFileError(path.name, f"not valid JSON ({error})", "a JSON object", "fetch or write the file again") from None
    if not isinstance(value, dict):
        raise DamagedFileError(path.name, f"a JSON {type(value).__name__}", "a JSON object", "fetch or write the file again")
    return value


def _read_sidecars(root: Path) -> dict[str, dict[str, Any]]:
    patterned = sorted(place.name for pattern in SIDECAR_PATTERNS for place in root.glob(pattern))
    return {name: _read_json(root / name) for name in (*SIDECARS, *patterned) if (root / name).is_file()}
