"""Rotary settings of config.json, in the old spelling (rope_theta, rope_scaling) and the new one (rope_parameters)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bitgrain.errors import ConfigError, ConflictingConfigError
from bitgrain.formats.config_reader import words
from bitgrain.layers.rotary import DividedRope, DynamicRope, LinearRope, Llama3Rope, LongRope, Rope, YarnRope
from bitgrain.models.config_keys import ConfigKeys
from bitgrain.models.windows import LAYER_TYPES

DEFAULT_THETA = 10000.0
# "divided" is this project's own: the divisors that some containers store in place of a scaling's settings
KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "divided")
# what earlier configurations call them
OLDER_KINDS = {"su": "longrope"}
# Keys that are read, per kind; every kind also reads rope_type, type, rope_theta and partial_rotary_factor.
_ACCEPTED = {
    "default": words(""),
    "linear": words("factor"),
    "dynamic": words("factor original_max_position_embeddings"),
    "llama3": words("factor low_freq_factor high_freq_factor original_max_position_embeddings"),
    "yarn": words(
        "factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim truncate"
        " finetuned attn_factor extrapolation_factor"
    ),
    "longrope": words("factor short_factor long_factor original_max_position_embeddings attention_factor"),
    "divided": words("frequency_divisors"),
}
_SHARED = words("rope_type type rope_theta partial_rotary_factor")


@dataclass(frozen=True, slots=True)
class RopeTraits:
    """What config.json leaves to the architecture.

    Args:
        theta:       where no key states it.
        share:       the same for partial_rotary_factor, the share of each head that is rotated; None: all of it, always.
        local_theta: layers with a window have a rotary embedding of their own, with this theta; 0: they do not.
        keys:        further keys of the section that the architecture reads, or that no formula reads.
    """

    theta: float = DEFAULT_THETA
    share: float | None = None
    local_theta: float = 0.0
    keys: frozenset[str] = frozenset()


def read_rope(top: ConfigKeys, head_dim: int, max_position: int, traits: RopeTraits = RopeTraits()) -> Rope:
    """The rotary embedding of a configuration; what is wrong with it is added to `top.problems`."""
    keys = ConfigKeys(merged_section(top), f"{top.where}: rope_parameters")
    kind = OLDER_KINDS.get(kind := keys.text("rope_type", "type", default="default"), kind)
    if kind not in KINDS:
        keys.problem(
            "rope_type",
            repr(kind),
            f"one of {', '.join(KINDS)}",
            "the scaling is not implemented; run this checkpoint with another program",
        )
        kind = "default"
    else:
        _refuse_unknown(keys, kind, traits.keys)
    size = _rotated_size(keys, head_dim, traits.share)
    theta = keys.number("rope_theta", default=traits.theta, minimum=1.0)
    rope = _READERS[kind](keys, theta, size, max_position)
    top.problems += keys.problems
    return rope


def read_local_rope(top: ConfigKeys, head_dim: int, max_position: int, traits: RopeTraits) -> tuple[Rope, Rope]:
    """The rotary embeddings of layers without and with a window; each has a section, or keys of its own at the top."""
    stated = top.values.get("rope_parameters")
    section = stated if isinstance(stated, Mapping) else {}
    if stated is not None and not (section and set(section) <= set(LAYER_TYPES)):
        top.problem("rope_parameters", repr(stated)[:200], f"an object with {' and '.join(LAYER_TYPES)}", "this architecture has two rotary embeddings")
    ropes = []
    for kind, theta, outer in (
        (LAYER_TYPES[0], traits.theta, {"rope_theta": "rope_theta", "rope_scaling": "rope_scaling"}),
        (LAYER_TYPES[1], traits.local_theta, {"rope_theta": "rope_local_base_freq"}),
    ):
        outer["partial_rotary_factor"] = "partial_rotary_factor"
        values = {"rope_parameters": section.get(kind), **{key: top.values.get(name) for key, name in outer.items()}}
        keys = ConfigKeys(values, f"{top.where}: {kind}")
        ropes.append(read_rope(keys, head_dim, max_position, replace(traits, theta=theta)))
        top.problems += keys.problems
    return ropes[0], ropes[1]


def _rotated_size(keys: ConfigKeys, head_dim: int, share: float | None) -> int:
    """How many entries of a head are rotated."""
    if share is None:
        needed = "rotating only a part of each head is not implemented for this architecture"
        keys.need("partial_rotary_factor", lambda v: v == 1, "1, or absent", needed)
        return head_dim
    size = int(head_dim * keys.number("partial_rotary_factor", default=share))
    if not 2 <= size <= head_dim or size % 2:
        keys.problem("partial_rotary_factor", f"{size} of {head_dim} entries of a head", "an even number of them, at least 2", "correct the key")
        size = 2
    return size


def merged_section(top: ConfigKeys) -> dict[str, Any]:
    """One section of both spellings and of the keys that stand outside of them; those present must agree."""
    merged: dict[str, Any] = {}
    outer = {k: top.values.get(k) for k in ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor")}
    for name, section in (
        ("rope_parameters", top.values.get("rope_parameters")),
        ("rope_scaling", top.values.get("rope_scaling")),
        ("", outer),
    ):
        if section is not None and not isinstance(section, Mapping):
            top.problem(name, repr(section)[:200], "an object or null")
            continue
        for key, value in (section or {}).items():
            if value is None:
                continue
            if merged.setdefault(key, value) != value:
                where = f"{top.where}: {name + '.' if name else ''}{key}"
                top.problems.append(
                    ConflictingConfigError(
                        where, f"{value!r}, but {merged[key]!r} elsewhere", "equal values", "find out which is right and correct the other"
                    )
                )
    if merged.get("rope_type", merged.get("type")) in (None, "default", "linear"):
        merged.pop("original_max_position_embeddings", None)  # says where the model comes from; no formula of these reads it
    return merged


def _refuse_unknown(keys: ConfigKeys, kind: str, more: frozenset[str]) -> None:
    accepted = _SHARED | _ACCEPTED[kind] | more
    unknown = sorted(k for k in keys.values if k not in accepted)
    if unknown:
        known = ", ".join(sorted(accepted))
        keys.problems.append(
            ConfigError(
                keys.where,
                f"unknown keys for {kind!r}: {', '.join(unknown)}",
                f"only {known}",
                "they may change the numbers: correct them, or update bitgrain",
            )
        )


def _read_default(keys: ConfigKeys, theta: float, head_dim: int, max_position: int) -> Rope:
    return Rope(theta, head_dim)


def _read_linear(keys: ConfigKeys, theta: float, head_dim: int, max_position: int) -> Rope:
    return LinearRope(theta, head_dim, keys.number("factor"))


def _read_dynamic(keys: ConfigKeys, theta: float, head_dim: int, max_position: int) -> Rope:
    keys.need(
        "original_max_position_embeddings", lambda v: v == max_position, f"max_position_embeddings ({max_position}), or absent",
        "programs disagree on which of the two counts for dynamic scaling: make them equal",
    )  # fmt: skip
    return DynamicRope(theta, head_dim, keys.number("factor"), max_position)


def _read_llama3(keys: ConfigKeys, theta: float, head_dim: int, max_position: int) -> Rope:
    low, high = keys.number("low_freq_factor"), keys.number("high_freq_factor")
    if not high > low:
        keys.problem("high_freq_factor", repr(high), f"more than low_freq_factor ({low!r})")
        high = low + 1.0
    return Llama3Rope(theta, head_dim, keys.number("factor"), low, high, keys.size("original_max_position_embeddings"))


def _read_yarn(keys: ConfigKeys, theta: float, head_dim: int, max_position: int) -> Rope:
    original = keys.size("original_max_position_embeddings", default=max_position)
    for key in ("attn_factor", "extrapolation_factor"):
        keys.need(key, lambda v: v == 1, "1, or absent", "programs disagree on this key: remove it, or state attention_factor")
    truncate = keys.flag("truncate")
    return YarnRope(
        theta, head_dim,
        factor=keys.number("factor", default=max_position / original),
        original=original,
        scale=keys.optional_number("attention_factor"),
        beta_fast=keys.number("beta_fast", default=32.0),
        beta_slow=keys.number("beta_slow", default=1.0),
        mscale=keys.number("mscale", default=0.0, strict=False),
        mscale_all_dim=keys.number("mscale_all_dim", default=0.0, strict=False),
        truncate=truncate is not False,
    )  # fmt: skip


def _read_longrope(keys: ConfigKeys, theta: float, head_dim: int, max_position: int) -> Rope:
    original = keys.size("original_max_position_embeddings")
    if original < 2:
        keys.problem("original_max_position_embeddings", str(original), "at least 2")
        original = 2
    short, long = keys.numbers("short_factor", head_dim // 2), keys.numbers("long_factor", head_dim // 2)
    factor = keys.number("factor", default=max_position / original)
    return LongRope(theta, head_dim, short, long, original, factor, keys.optional_number("attention_factor"))


def _read_divided(keys: ConfigKeys, theta: float, head_dim: int, max_position: int) -> Rope:
    return DividedRope(theta, head_dim, keys.numbers("frequency_divisors", head_dim // 2))


_READERS = {
    "default": _read_default,
    "linear": _read_linear,
    "dynamic": _read_dynamic,
    "llama3": _read_llama3,
    "yarn": _read_yarn,
    "longrope": _read_longrope,
    "divided": _read_divided,
}
