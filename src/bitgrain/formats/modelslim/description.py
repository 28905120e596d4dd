"""The description file: tensor name to type string, beside a few keys about the whole checkpoint.

Names in it are those of the checkpoint; where a tool renamed one and not the other, the spellings of the same module by
other tools are tried: `mlp` and `block_sparse_moe`, with and without `language_model`, gate_proj/up_proj/down_proj and
w1/w3/w2 of an expert.
Source: formats specification, part 2, section 2.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bitgrain.formats.config_reader import ConfigReader, words
from bitgrain.formats.matching import nearest_names
from bitgrain.formats.modelslim.types import OTHER_TYPES, TYPES, type_problem

# Keys that describe the whole checkpoint.  model_quant_type is a label: it leaves out types and marks.
GLOBAL_KEYS = words(
    "version model_quant_type group_size kv_cache_type kv_quant_type fa_quant_type indexer_quant_type reduce_quant_type metadata"
    " optional ignore packed_modules_mapping quant_method"
)
KIND_ENDING = ".quant_type"
_EXPERT_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_EXPERT = re.compile(r"(.*\.experts\.\d+\.)(gate_proj|up_proj|down_proj|w1|w2|w3)(\..*)")


@dataclass(frozen=True, slots=True)
class Description:
    """What a description file says.

    Args:
        types:      tensor name to type string.
        attention:  attention module to how its operands are quantized, such as "INT8".
        rotated:    module to the tensors of its rotation that the metadata announce.
        group_size: of the last group-wise type that was written; 0 if there was none.
        version:    of the layout; "" is that of the older tool.
        ignored:    names of modules that are not quantized.
        cache:      the checkpoint announces an int8 KV cache.
    """

    types: Mapping[str, str]
    attention: Mapping[str, str]
    rotated: Mapping[str, tuple[str, ...]]
    group_size: int
    version: str
    ignored: tuple[str, ...]
    cache: bool

    def type_of(self, name: str) -> tuple[str, str]:
        """(type string, the name that it is described under) of a tensor; ("FLOAT", "") if it is not described."""
        return next(((self.types[other], other) for other in spellings(name) if other in self.types), ("FLOAT", ""))

    def describes(self, name: str) -> bool:
        """Whether the file lists a tensor."""
        return any(other in self.types for other in spellings(name))


def spellings(name: str) -> Iterator[str]:
    """A tensor's name, and how other tools would call it."""
    yield name
    for expert in _expert_spellings(name):
        for layer in _swapped(expert, ".mlp.", ".block_sparse_moe."):
            for other in (layer, layer.replace("language_model.", "", 1), f"language_model.{layer}", layer.replace("model.", "model.language_model.", 1)):
                if other != name:
                    yield other


def _expert_spellings(name: str) -> Iterator[str]:
    yield name
    found = _EXPERT.fullmatch(name)
    if found is not None:
        other = {**_EXPERT_NAMES, **{short: long for long, short in _EXPERT_NAMES.items()}}[found[2]]
        yield f"{found[1]}{other}{found[3]}"


def _swapped(name: str, one: str, other: str) -> Iterator[str]:
    yield name
    if one in name:
        yield name.replace(one, other, 1)
    elif other in name:
        yield name.replace(other, one, 1)


def read_description(settings: Mapping[str, Any], where: str) -> Description:
    """The description that the keys and values of the file(s) make.

    Raises:
        ConfigError: an unknown key or type, or a value that is no type; all of them at once.
    """
    per_tensor = {key: value for key, value in settings.items() if key not in GLOBAL_KEYS and "." in key}
    reader = ConfigReader({key: value for key, value in settings.items() if key not in per_tensor}, where)
    reader.skip(GLOBAL_KEYS)
    attention = {key.removesuffix(KIND_ENDING): value for key, value in per_tensor.items() if key.endswith(KIND_ENDING)}
    types = {key: value for key, value in per_tensor.items() if not key.endswith(KIND_ENDING)}
    _check_types(reader, types)
    for module, kind in attention.items():
        if not isinstance(kind, str):
            reader.problem(f"{module}{KIND_ENDING}", repr(kind)[:200], "a text such as 'INT8'")
    described = Description(
        {name: kind for name, kind in types.items() if isinstance(kind, str)},
        {module: kind for module, kind in attention.items() if isinstance(kind, str)},
        _rotated(reader),
        reader.integer("group_size", minimum=0, default=0),
        reader.text("version", default=""),
        reader.names("ignore"),
        any(reader.choice(key, {"c8": True, "": False}, "") for key in ("kv_cache_type", "kv_quant_type")),
    )
    reader.finish()
    return described


def _check_types(reader: ConfigReader, types: Mapping[str, Any]) -> None:
    """A problem per type that cannot be used, with the first tensor that has it."""
    seen: set[str] = set()
    for name, kind in types.items():
        if not isinstance(kind, str):
            reader.problem(name, repr(kind)[:200], "a type such as 'W8A8_DYNAMIC'")
            continue
        if kind in seen:
            continue
        seen.add(kind)
        wrong = type_problem(kind)
        if wrong is not None:
            near = nearest_names(kind, (*TYPES, *OTHER_TYPES), 1)
            reader.problem(name, f"the type {wrong[0]}", f"one of {', '.join((*TYPES, *OTHER_TYPES))}" + (f" (nearest: {near[0]})" if near else ""), wrong[1])


def _rotated(reader: ConfigReader) -> dict[str, tuple[str, ...]]:
    """See Description.rotated; metadata.quarot has the lists of modules that are rotated while the model runs."""
    metadata = ConfigReader(reader.section("metadata", "an object"), reader.place("metadata"))
    online = ConfigReader(metadata.section("quarot", "an object"), metadata.place("quarot"))
    online.skip(("max_tp_size",))
    rotated: dict[str, tuple[str, ...]] = {}
    for key, tensors in (("heads_rotation", ("heads_rotation",)), ("kronecker_rotation", ("kronecker_rotation_m", "kronecker_rotation_n"))):
        layers = ConfigReader(online.section(key, "an object with `layers`"), online.place(key))
        for module in layers.names("layers"):
            rotated[module] = rotated.get(module, ()) + tensors
        reader.collect(layers.finish)
    reader.collect(online.finish)
    reader.collect(metadata.finish)
    return rotated
