"""The groups of a compressed-tensors configuration: which targets are quantized how, and stored in which format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitgrain.errors import BitgrainError, ConfigError, raise_all
from bitgrain.formats.compressed_tensors.arguments import QuantizationArgs, check_weight_arguments, parse_arguments
from bitgrain.formats.compressed_tensors.inputs import activation_spec
from bitgrain.formats.compressed_tensors.presets import PRESETS
from bitgrain.formats.compressed_tensors.storage import check_storage, completed, completed_inputs, parse_format
from bitgrain.formats.compressed_tensors.targets import names_cache_projections
from bitgrain.formats.config_reader import ConfigReader
from bitgrain.weights import ActivationSpec


@dataclass(frozen=True, slots=True)
class Group:
    """One entry of config_groups.

    Args:
        weights: None: the targets' weights stay as they are.
        inputs:  None: the targets' inputs stay as they are.
        cache:   output quantization of key and value projections, the old way to quantize the KV cache.
        format:  how the weights are stored: the group's own format, else the configuration's; "" where neither says.
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


def parse_groups(where: str, value: Any, storage: str) -> tuple[Group, ...]:
    """The groups in the order of the configuration.

    Args:
        storage: the format of groups that name none; "" if there is no such.
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
            groups.append(_parse_group(f"{where}.{name}", name, entry, storage))
        except BitgrainError as problem:
            problems.append(problem)
    raise_all(where, problems)
    return tuple(groups)


def _parse_group(where: str, name: str, entry: Any, storage: str) -> Group:
    if isinstance(entry, list):
        preset = ConfigReader({"targets": entry}, where)
        targets = preset.names("targets")
        preset.finish()
        return _preset(where, name, targets, storage)
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
    storage = parse_format(f"{where}.format", entry.get("format")) or storage
    if weights is not None:
        weights = _stored_weights(f"{where}.weights", weights, storage)
    if inputs is not None:
        inputs = completed_inputs(inputs, storage)
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
    if activation.second_scale == "static" and not (weights is not None and weights.block_scaled):
        raise ConfigError(
            f"{where}.input_activations",
            "block scales below a stored input_global_scale, and weights without block scales",
            "block-scaled weights for such inputs",
            "this combination is not supported by this version",
        )
    return Group(name, targets, weights, inputs, activation, outputs, storage)


def _stored_weights(where: str, args: QuantizationArgs, storage: str) -> QuantizationArgs:
    """The arguments with everything that the format says about them, checked."""
    args = completed(args, storage)
    check_weight_arguments(where, args)
    check_storage(where, args, storage)
    return args


def _preset(where: str, name: str, targets: tuple[str, ...], storage: str) -> Group:
    preset = name.upper()
    if preset not in PRESETS:
        raise ConfigError(
            where,
            f"a list of targets under {name!r}",
            f"a preset's name: {', '.join(PRESETS)}",
            "correct the name, or write the group's arguments out",
        )
    weights, inputs = PRESETS[preset]
    if weights is not None:
        weights = _stored_weights(where, weights, storage)
    return Group(name, targets, weights, inputs, activation_spec(where, inputs), None, storage)
