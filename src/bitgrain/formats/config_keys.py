"""Configuration sections are read key by key: a key is known, or refused with the nearest known one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from bitgrain.errors import BitgrainError, ConfigError
from bitgrain.formats.matching import nearest_names


def words(text: str) -> frozenset[str]:
    """The set of the words of a text; long lists of names read better as one."""
    return frozenset(text.split())


# Keys that AutoRound adds to every configuration it writes, whatever the format; none changes what the tensors mean.
# extra_config and rotation_config are not among them: they do.
AUTO_ROUND_KEYS = words(
    "act_bits act_data_type act_dynamic act_group_size act_sym amp autoround_version batch_size bits block_name_to_quantize"
    " data_type dataset enable_minmax_tuning enable_norm_bias_tuning enable_quanted_input gradient_accumulate_steps"
    " group_size iters low_gpu_mem_usage lr minmax_lr nsamples packing_format provider quant_block_list regex_config"
    " scale_dtype seqlen static_attention_dtype static_kv_dtype super_bits super_group_size supported_types sym"
    " to_quant_block_names"
)


def unknown_keys(where: str, section: Mapping[str, Any], known: Iterable[str]) -> list[BitgrainError]:
    """One ConfigError per key of `section` that is not known; empty and null values mean nothing and pass."""
    names = sorted(known)
    problems: list[BitgrainError] = []
    for key, value in section.items():
        if key in names or value is None or value == {} or value == []:
            continue
        near = nearest_names(key, names)
        hint = f"a known key (nearest: {', '.join(near)})" if near else f"one of {', '.join(names)}"
        problems.append(
            ConfigError(
                f"{where}.{key}",
                f"an unknown key with the value {value!r}",
                hint,
                "correct the key, or update bitgrain if the writer is newer",
            )
        )
    return problems


def string_list(where: str, value: Any) -> tuple[str, ...]:
    """The strings of a list; null is an empty list and a lone string a list of one.

    Raises:
        ConfigError: something else.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    raise ConfigError(where, repr(value), "a list of strings", "correct the configuration")


def block_of(where: str, value: Any) -> tuple[int, int] | None:
    """(rows, columns) of a block: a list of two positive integers or a text such as "128x128"; None for null.

    Raises:
        ConfigError: something else.
    """
    if value is None:
        return None
    parts = value.lower().split("x") if isinstance(value, str) else value
    try:
        rows, columns = (int(part) for part in parts)
    except (TypeError, ValueError):
        rows = columns = 0
    if rows < 1 or columns < 1 or any(isinstance(part, (bool, float)) for part in parts):
        raise ConfigError(where, repr(value), "two positive integers [rows, columns]", "correct the configuration")
    return rows, columns
