"""The groups of a compressed-tensors configuration: which targets are quantized how, and stored in which format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitgrain.errors import BitgrainError, ConfigError, UnknownFormatError, raise_all
from bitgrain.formats.compressed_tensors.arguments import (
    LATER,
    LATER_PRESETS,
    PRESETS,
    QuantizationArgs,
    activation_spec,
    check_weight_arguments,
    parse_arguments,
)
from bitgrain.formats.compressed_tensors.targets import names_cache_projections
from bitgrain.formats.config_reader import ConfigReader
from bitgrain.weights import ActivationSpec

# Formats that store one value per element in `weight`; the names differ by history, the tensors do not.
PLAIN_FORMATS = ("int-quantized", "float-quantized", "naive-quantized")
FORMATS = ("dense", *PLAIN_FORMATS, "pack-quantized", "mixed-precision")
LATER_FORMATS = (
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp6-pack-quantized",
    "mxfp8-quantized",
    "sparse-bitmask",
    "sparse-24-bitmask",
    "marlin-24",
)


@dataclass(frozen=True, slots=True)
class Group:
    """One entry of config_groups.

    Args:
        weights: None: the targets' weights stay as they are.
        inputs:  None: the targets' inputs stay as they are.
        cache:   output quantization of key and value projections, the old way to quantize the KV cache.
        format:  "" where only the configuration's global format speaks.
    """

    name: str
    targets: tuple[str, ...]
    weights: QuantizationArgs | None
    inputs: QuantizationArgs | None
    activation: ActivationSpec
    cache: QuantizationArgs | None
    format: str

    @property
    def for_cache_only(self) -> bool:
        return self.cache is not None and self.weights is None and self.inputs is None

    def same_meaning(self, other: Group) -> bool:
        return (self.weights, self.inputs, self.format) == (other.weights, other.inputs, other.format)


def parse_format(where: str, value: Any) -> str:
    """A storage format's name; "" for null.

    Raises:
        UnknownFormatError: one that this version does not read.
    """
    name = "" if value is None else str(value).lower()
    if name in LATER_FORMATS:
        raise UnknownFormatError(where, repr(value), f"one of {', '.join(FORMATS)}", LATER)
    if name and name not in FORMATS:
        raise UnknownFormatError(
            where, repr(value), f"one of {', '.join(FORMATS)}", "correct the configuration, or update bitgrain if the writer is newer"
        )
    return name


def parse_groups(where: str, value: Any) -> tuple[Group, ...]:
    """The groups in the order of the configuration.

    Raises:
        ConfigError, UnknownFormatError: everything that is wrong with them, together.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(
            where, repr(value), "an object of groups", "fetch the whole configuration; without it bits and groups are not known"
        )
    groups: list[Group] = []
    problems: list[BitgrainError] = []
    for name, entry in value.items():
        try:
            groups.append(_parse_group(f"{where}.{name}", name, entry))
        except BitgrainError as problem:
            problems.append(problem)
    raise_all(where, problems)
    return tuple(groups)


def _parse_group(where: str, name: str, entry: Any) -> Group:
    if isinstance(entry, list):
        preset = ConfigReader({"targets": entry}, where)
        targets = preset.names("targets")
        preset.finish()
        return _preset(where, name, targets)
    if not isinstance(entry, Mapping):
        raise ConfigError(where, repr(entry), "an object, or a list of targets under a preset's name", "correct the configuration")
    reader = ConfigReader(entry, where)
    reader.skip(("weights", "input_activations", "output_activations", "format"))
    targets = reader.names("targets")
    if not targets and not reader.problems:
        reader.problem("targets", repr(entry.get("targets")), "a list of at least one target")
    reader.finish()

    def read(key: str) -> QuantizationArgs | None:
        return None if entry.get(key) is None else parse_arguments(f"{where}.{key}", entry[key])

    weights, inputs, outputs = read("weights"), read("input_activations"), read("output_activations")
    if weights is not None:
        check_weight_arguments(f"{where}.weights", weights)
    if outputs is not None and not names_cache_projections(targets):
        raise ConfigError(
            f"{where}.output_activations",
            f"quantized outputs of {', '.join(targets)}",
            "null, or targets that are key and value projections only",
            "quantized outputs are not supported by this version; only the KV cache's are",
        )
    # inputs of attention modules have other granularities and never become a linear module's
    attention_only = weights is None and inputs is not None and inputs.strategy == "attn_head"
    activation = activation_spec(f"{where}.input_activations", None if attention_only else inputs)
    return Group(name, targets, weights, inputs, activation, outputs, parse_format(f"{where}.format", entry.get("format")))


def _preset(where: str, name: str, targets: tuple[str, ...]) -> Group:
    preset = name.upper()
    if preset in LATER_PRESETS:
        raise UnknownFormatError(where, f"the preset {name!r}", f"one of {', '.join(PRESETS)}", LATER)
    if preset not in PRESETS:
        raise ConfigError(
            where,
            f"a list of targets under {name!r}",
            f"a preset's name: {', '.join(PRESETS)}",
            "correct the name, or write the group's arguments out",
        )
    weights, inputs = PRESETS[preset]
    return Group(name, targets, weights, inputs, activation_spec(where, inputs), None, "")
