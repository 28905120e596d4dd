"""The metadata of a torchao safetensors file: one JSON text per parameter, naming the tensor subclass that it was.

    "model.layers.0.self_attn.q_proj.weight": {"_type": "Int8Tensor", "_data": {attributes}, "_tensor_data_names": [components]}
    "lm_head.weight":                         {"_type": "Tensor"}                                                a plain tensor
    "tensor_names":                           [every parameter]
Each component is stored as `{module}._{parameter}_{component}`; torchao 0.14 wrote `{module}.{parameter}:{component}`.
Source: formats specification, section 9; torchao 0.18 prototype/safetensors and the classes it names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitgrain.errors import BitgrainError, ConfigError, ConflictingConfigError, DamagedFileError, UnknownFormatError, raise_all
from bitgrain.formats.config_reader import ConfigReader
from bitgrain.formats.torchao.activations import FLOAT8_ELEMENTS, MX_ELEMENTS, NVFP4_BLOCK, plain, read_activation, word
from bitgrain.weights import NO_ACTIVATION, ActivationSpec

NAMES_KEY = "tensor_names"
WRITE_AGAIN = "write the checkpoint again"
INT_DTYPES = {f"int{bits}": f"int{bits}" for bits in range(1, 9)}
# Layouts of one kernel on one kind of hardware: what the bytes mean is not in the file.
KERNEL_PACKED = {
    "Int4TilePackedTo4dTensor": "tiles of the tinygemm kernels",
    "Int4PlainInt32Tensor": "words packed by an operator of the device that wrote them",
    "Int4PreshuffledTensor": "shuffled for one matrix kernel",
    "Int4OpaqueTensor": "packed for one matrix kernel",
    "Int4MarlinSparseTensor": "sparse tiles of one matrix kernel",
    "IntxOpaqueTensor": "packed for one matrix kernel",
    "Float8OpaqueTensor": "packed for one matrix kernel",
    "Float8Sparse2x4_1DData1DMetadataTensor": "sparse data of one matrix kernel",
    "Float8Sparse2x4_2DData2DMetadataTensor": "sparse data of one matrix kernel",
}


@dataclass(frozen=True, slots=True)
class Record:
    """One quantized parameter.

    Args:
        kind:       class name of the tensor subclass.
        components: names of the tensors that it was taken apart into.
        block:      elements that share a scale along each dimension; () for the whole tensor.
        activation: input quantization (static values unknown).
        bits:       of a code of an integer class.
        element:    element type of an MX or NVFP4 class.
        swizzled:   block scales are in the tiled order of the tensor cores.
    """

    kind: str
    components: tuple[str, ...]
    block: tuple[int, ...] = ()
    activation: ActivationSpec = NO_ACTIVATION
    bits: int = 8
    element: str = ""
    swizzled: bool = False


def read_records(metadata: Mapping[str, Mapping[str, str]]) -> dict[str, Record]:
    """The quantized parameters by full name, from the metadata of all files; plain tensors are left out.

    Raises:
        DamagedFileError, ConfigError: metadata that no torchao writes.
        ConflictingConfigError: two files describe one parameter differently.
        UnknownFormatError: a class that is not known, or one that a single kernel can read.
    """
    texts: dict[str, tuple[str, str]] = {}
    problems: list[BitgrainError] = []
    for file, entries in metadata.items():
        names = _names(file, entries, problems)
        for name in names:
            text = entries.get(name)
            if text is None:
                problems.append(ConfigError(f"{file}: metadata", f"{NAMES_KEY} has {name}, but nothing describes it", "an entry for each name", WRITE_AGAIN))
                continue
            first = texts.setdefault(name, (text, file))
            if first[0] != text:
                problems.append(ConflictingConfigError(f"{file}: metadata of {name}", text[:200], f"{first[0][:200]} as in {first[1]}", WRITE_AGAIN))
    records = _parsed(texts, problems)
    raise_all("metadata", problems)
    return records


def describes_subclasses(metadata: Mapping[str, Mapping[str, str]]) -> str | None:
    """A file whose metadata are torchao's and name a tensor subclass; None if there is none."""
    for file, entries in metadata.items():
        names = _names(file, entries, []) if NAMES_KEY in entries else []
        if any('"_tensor_data_names"' in entries.get(name, "") for name in names):
            return file
    return None


def _names(file: str, entries: Mapping[str, str], problems: list[BitgrainError]) -> list[str]:
    if NAMES_KEY not in entries:
        return []
    names = _json(entries[NAMES_KEY])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        problems.append(DamagedFileError(f"{file}: metadata.{NAMES_KEY}", entries[NAMES_KEY][:100], "a JSON list of names", WRITE_AGAIN))
        return []
    return names


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _parsed(texts: Mapping[str, tuple[str, str]], problems: list[BitgrainError]) -> dict[str, Record]:
    # layers repeat a few texts: each is read, and refused, once
    seen: dict[str, Record | None] = {}
    refused: dict[str, list[str]] = {}
    for name, (text, file) in texts.items():
        if text in seen:
            continue
        entry, where = _json(text), f"{file}: metadata of {name}"
        kind = entry.get("_type") if isinstance(entry, Mapping) else None
        if not isinstance(kind, str):
            problems.append(DamagedFileError(where, text[:100], 'a JSON object with "_type"', WRITE_AGAIN))
        elif kind in ("Tensor", "Parameter"):
            seen[text] = None
            continue
        elif kind not in _READERS:
            refused.setdefault(kind, []).append(name)
        else:
            seen[text] = _record(kind, entry, where, problems)
        seen.setdefault(text, None)
    problems += [_refusal(kind, names) for kind, names in refused.items()]
    return {name: record for name, (text, _) in texts.items() if (record := seen[text]) is not None}


def _refusal(kind: str, names: Sequence[str]) -> BitgrainError:
    packed = KERNEL_PACKED.get(kind)
    return UnknownFormatError(
        names[0],
        f"a {kind}" + (f": {packed}" if packed else ""),
        f"a class with a plain layout: {', '.join(_READERS)}",
        "quantize again with a packing format that is plain" if packed else "update bitgrain if the writer is newer",
    )


def _record(kind: str, entry: Mapping[str, Any], where: str, problems: list[BitgrainError]) -> Record | None:
    data, components = entry.get("_data"), entry.get("_tensor_data_names")
    names = components if isinstance(components, list) and all(isinstance(c, str) for c in components) else []
    if not isinstance(data, Mapping) or not {"qdata", "scale"} <= set(names):
        problems.append(ConfigError(where, f"a {kind} with {str(entry)[:150]}", "_data, and _tensor_data_names with qdata and scale", WRITE_AGAIN))
        return None
    reader = ConfigReader(data, where)
    reader.skip(("dtype", "orig_dtype", "kernel_preference", "mm_config", "shape"))
    read, allowed = _READERS[kind]
    record = read(reader, kind, tuple(sorted(names)))
    for extra in sorted(set(names) - {"qdata", *allowed}):
        reader.problem("_tensor_data_names", f"the component {extra!r}", f"qdata, {', '.join(allowed)}", "update bitgrain if the writer is newer")
    try:
        reader.finish()
    except BitgrainError as problem:
        problems.append(problem)
    return record


def _block(reader: ConfigReader) -> tuple[int, ...]:
    _, value = reader.read("block_size")
    sizes = value if isinstance(value, list) else None
    if sizes is None or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes) or len(sizes) not in (0, 2, 3):
        reader.problem("block_size", repr(value)[:100], "a list of two or three sizes above 0", WRITE_AGAIN)
        return ()
    return tuple(sizes)


def _read_int8(reader: ConfigReader, kind: str, parts: tuple[str, ...]) -> Record:
    reader.skip(("reduce_range",))
    return Record(kind, parts, _block(reader), read_activation(reader, "act_quant_scale" in parts))


def _read_intx(reader: ConfigReader, kind: str, parts: tuple[str, ...]) -> Record:
    bits = int(word(reader, "target_dtype", INT_DTYPES).removeprefix("int"))
    _, value = reader.read("activation_quantization")
    activation = NO_ACTIVATION
    if plain(value) in ("int8_asym_per_token", "INT8_ASYM_PER_TOKEN") or reader.flag("apply_int8_act_asym_per_token_quant"):
        activation = ActivationSpec("int8", "token", symmetric=False, reciprocal=True)
    elif value is not None:
        reader.problem("activation_quantization", repr(value)[:100], "int8_asym_per_token, or nothing")
    return Record(kind, parts, _block(reader), activation, bits)


def _read_int4(reader: ConfigReader, kind: str, parts: tuple[str, ...]) -> Record:
    element = word(reader, "activation_dtype", {"bfloat16": "", **FLOAT8_ELEMENTS}, "bfloat16")
    return Record(kind, parts, _block(reader), ActivationSpec(element, "token") if element else NO_ACTIVATION, 4)


def _read_float8(reader: ConfigReader, kind: str, parts: tuple[str, ...]) -> Record:
    block = () if reader.values.get("block_size") == [] else _block(reader)
    reader.skip(("block_size",))
    return Record(kind, parts, block, read_activation(reader, False))


def _read_mx(reader: ConfigReader, kind: str, parts: tuple[str, ...]) -> Record:
    element = word(reader, "elem_dtype", MX_ELEMENTS)
    size = reader.integer("block_size", minimum=1)
    swizzled = reader.flag("is_swizzled_scales") or False
    return Record(kind, parts, (1, size), read_activation(reader, False), element=element, swizzled=swizzled)


def _read_nvfp4(reader: ConfigReader, kind: str, parts: tuple[str, ...]) -> Record:
    reader.skip(("use_triton_kernel",))
    size = reader.integer("block_size", allowed=(NVFP4_BLOCK,))
    swizzled = reader.flag("is_swizzled_scales") or False
    activation = read_activation(reader, "act_per_tensor_scale" in parts)
    return Record(kind, parts, (1, size), activation, element="fp4_e2m1", swizzled=swizzled)


# Class name to its reader and the components that it may have beside qdata.
_READERS = {
    "Int8Tensor": (_read_int8, ("scale", "zero_point", "act_quant_scale", "act_quant_zero_point", "act_pre_scale")),
    "IntxUnpackedToInt8Tensor": (_read_intx, ("scale", "zero_point")),
    "Int4Tensor": (_read_int4, ("scale", "zero_point", "act_pre_scale")),
    "Float8Tensor": (_read_float8, ("scale",)),
    "MXTensor": (_read_mx, ("scale",)),
    "NVFP4Tensor": (_read_nvfp4, ("scale", "per_tensor_scale", "act_per_tensor_scale")),
}
