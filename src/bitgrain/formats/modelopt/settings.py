"""What ModelOpt's configuration files say, in their spellings, read into one form.

hf_quant_config.json  {producer, quantization: {quant_algo, kv_cache_quant_algo, group_size, exclude_modules, quantized_layers, ...}}
config.json           quantization_config, flat: {quant_method, producer, quant_algo, ignore, kv_cache_scheme, quantized_layers,
                      config_groups}, or nested as above
Where both are there they must agree.  `config_groups` is not read: it repeats quant_algo in another library's words, and not
exactly.  Source: formats specification, section 6; ModelOpt 0.47 export/convert_hf_config.py and export/quant_utils.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bitgrain.errors import BitgrainError, ConflictingConfigError, raise_all
from bitgrain.formats.config_reader import ConfigReader, words
from bitgrain.formats.evidence import Evidence
from bitgrain.formats.matching import nearest_names
from bitgrain.formats.modelopt.algorithms import ALGORITHMS, CACHES, MIXED, algorithm_name

SIDECAR = "hf_quant_config.json"
SECTION = "config.json: quantization_config"
# How the checkpoint was made, or settings of engines, that say nothing about its tensors; or read elsewhere.
_SKIPPED = words(
    "quant_method producer config_groups lora_rank version provider mamba_ssm_cache_dtype smoothquant_val clamp_val use_meta_recipe"
)
# In the entries of quantized_layers.
_SKIPPED_IN_LAYERS = words("lora_rank awq_block_size")
NONE = "none"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a set of modules is quantized.

    Args:
        algorithm: a key of ALGORITHMS; "" for not at all.
        group:     columns per scale; 0 where the configuration does not say, -1 for whole rows.
    """

    algorithm: str = ""
    group: int = 0


@dataclass(frozen=True, slots=True)
class Settings:
    """One file's statement; None where it does not speak of something.

    Args:
        word:     quant_algo: a key of ALGORITHMS, MIXED, or NONE.
        group:    group_size, 0 if it is not stated.
        excluded: patterns of modules that stay dense.
        layers:   module name to its recipe, of mixed checkpoints.
        cache:    a key of CACHES, or NONE.
    """

    word: str | None = None
    group: int = 0
    excluded: tuple[str, ...] | None = None
    layers: Mapping[str, Recipe] | None = None
    cache: str | None = None


def read_settings(evidence: Evidence) -> Settings:
    """The settings that all files together give.

    Raises:
        ConfigError, ConflictingConfigError: unknown or impossible keys, or files that disagree; all of them at once.
    """
    sources = {SIDECAR: evidence.sidecars.get(SIDECAR), SECTION: evidence.quantization}
    problems: list[BitgrainError] = []
    found = {where: _read_file(where, section, problems) for where, section in sources.items() if section is not None}
    first, *others = found or {"": Settings()}
    joined = found.get(first, Settings())
    for where in others:
        joined = _join(joined, first, found[where], where, problems)
    if joined.word == MIXED and not joined.layers:
        reader = ConfigReader({}, first)
        reader.problem(
            "quantized_layers", "absent", f"the modules of a checkpoint of {MIXED}", "fetch the checkpoint's complete configuration"
        )
        problems += reader.problems
    raise_all("quantization configuration", problems)
    return joined


def _read_file(where: str, section: Mapping[str, Any], problems: list[BitgrainError]) -> Settings:
    """The settings of one file; what cannot be read becomes a problem."""
    outer = ConfigReader(section, where)
    nested = outer.section("quantization", "an object")
    reader = ConfigReader(nested, f"{where}.quantization") if nested else outer
    if nested:
        outer.skip(_SKIPPED)
    reader.skip(_SKIPPED)
    reader.need(
        "has_zero_point", lambda value: value is False, "false", "codes with zero points are not known to be written; update bitgrain"
    )
    reader.need("pre_quant_scale", lambda value: isinstance(value, bool), "true or false", "correct the configuration")
    settings = Settings(
        _algorithm(reader),
        _group(reader),
        _names(reader, "exclude_modules", "ignore"),
        _layers(reader),
        _cache(reader),
    )
    for each in (outer, reader) if nested else (reader,):
        try:
            each.finish()
        except BitgrainError as problem:
            problems.append(problem)
    return settings


def _algorithm(reader: ConfigReader) -> str | None:
    """quant_algo as a key of ALGORITHMS, MIXED, or NONE; None where there is no such key."""
    stated = "quant_algo" in reader.values
    key, value = reader.read("quant_algo")
    if value is None:
        return NONE if stated else None
    return _known(reader, key, value, (*ALGORITHMS, MIXED))


def _known(reader: ConfigReader, key: str, value: Any, names: Iterable[str]) -> str | None:
    known = tuple(names)
    name = algorithm_name(value) if isinstance(value, str) else ""
    if name in known:
        return name
    near = nearest_names(name, known, 1)
    reader.problem(key, repr(value)[:200], f"one of {', '.join(known)}" + (f" (nearest: {near[0]})" if near else ""))
    return None


def _group(reader: ConfigReader) -> int:
    """group_size; 0 where it is absent, null or 0, as for algorithms without groups."""
    size = reader.integer("group_size", default=0)
    if size < -1:
        reader.problem("group_size", repr(size), "a size above 0, or -1 for whole rows")
        return 0
    return size


def _names(reader: ConfigReader, *keys: str) -> tuple[str, ...] | None:
    stated = any(reader.values.get(key) is not None for key in keys)
    names = tuple(dict.fromkeys(reader.names(*keys)))
    return names if stated else None


def _layers(reader: ConfigReader) -> dict[str, Recipe] | None:
    """quantized_layers: module name to recipe."""
    if reader.values.get("quantized_layers") is None:
        reader.skip(("quantized_layers",))
        return None
    entries = reader.section("quantized_layers", "an object: module name to its algorithm")
    layers = {}
    for name, entry in entries.items():
        where = reader.place(f"quantized_layers[{name!r}]")
        own = ConfigReader(entry if isinstance(entry, Mapping) else {"quant_algo": entry}, where)
        own.skip(_SKIPPED_IN_LAYERS)
        own.need(
            "has_zero_point", lambda value: value is False, "false", "codes with zero points are not known to be written; update bitgrain"
        )
        own.need("pre_quant_scale", lambda value: isinstance(value, bool), "true or false", "correct the configuration")
        key, value = own.read("quant_algo")
        algorithm = "" if value is None else _known(own, key, value, ALGORITHMS)
        layers[name] = Recipe(algorithm or "", _group(own))
        reader.collect(own.finish)
    return layers


def _cache(reader: ConfigReader) -> str | None:
    """The KV cache as a key of CACHES, or NONE; None where the file does not speak of it."""
    stated = "kv_cache_quant_algo" in reader.values or "kv_cache_scheme" in reader.values
    key, value = reader.read("kv_cache_quant_algo", "kv_cache_scheme", same=_cache_word)
    if value is None:
        return NONE if stated else None
    word = _cache_word(value)
    if word not in CACHES:
        reader.problem(key, repr(value)[:200], f"one of {', '.join(CACHES)}, or an object with type float and num_bits 8 or 4")
        return None
    return word


def _cache_word(value: Any) -> str:
    """The key of CACHES that a word or an object stands for; "" for none."""
    if isinstance(value, str):
        return value.upper()
    if not isinstance(value, Mapping):
        return ""
    kind, bits, group = value.get("type"), value.get("num_bits"), value.get("group_size")
    if kind == "int":
        return "INT8" if bits == 8 else ""
    if kind != "float" or bits not in (4, 8) or (bits == 4 and group not in (None, 16)):
        return ""
    return "FP8" if bits == 8 else "NVFP4"


def _join(one: Settings, first: str, two: Settings, second: str, problems: list[BitgrainError]) -> Settings:
    """Two files' settings together; a difference becomes a problem.

    The list of excluded modules counts as a set, and the file beside config.json may speak of a KV cache and of groups of
    which config.json does not.
    """

    def agree(key: str, a: Any, b: Any) -> None:
        if a is not None and b is not None and a != b:
            action = "find out which file is right and correct the other"
            problems.append(ConflictingConfigError(f"{second}: {key}", repr(b)[:300], f"{a!r:.300} as in {first}", action))

    agree("quant_algo", one.word, two.word if two.word is not None or one.word != NONE else NONE)
    agree("group_size", one.group or None, two.group or None)
    agree("ignore", *(None if s.excluded is None else sorted(s.excluded) for s in (one, two)))
    agree("quantized_layers", one.layers, two.layers)
    agree("kv_cache_scheme", one.cache, two.cache)
    return Settings(
        one.word if one.word is not None else two.word,
        one.group or two.group,
        one.excluded if one.excluded is not None else two.excluded,
        one.layers if one.layers is not None else two.layers,
        one.cache if one.cache is not None else two.cache,
    )
