"""What QuIP# and QTIP configurations share: the section `quip_params` of config.json, and rules that skip modules.

A skip rule is "{layer}_{part}", such as "3_down": layer 3's down_proj.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bitgrain.formats.base import ModuleKind, ModuleView
from bitgrain.formats.config_reader import ConfigReader, words
from bitgrain.formats.evidence import Evidence

SECTION = "quip_params"
# Any of these says that the weights are trellis codes.
TRELLIS_KEYS = words("L K V K_v_proj tlut_bits decode_mode td_x td_y split_for_tp")
PARTS = {
    "q": ("q_proj",), "k": ("k_proj",), "v": ("v_proj",), "qkv": ("qkv_proj",), "o": ("o_proj",),
    "up": ("up_proj", "upgate_proj"), "upgate": ("upgate_proj",), "gate": ("gate_proj",), "down": ("down_proj",),
}  # fmt: skip
_RULE = re.compile(r"(\d+)_(\w+)")


def quip_params(evidence: Evidence) -> Mapping[str, Any] | None:
    """The section, or None."""
    found = evidence.config.get(SECTION)
    return found if isinstance(found, Mapping) else None


def speaks_of_trellises(params: Mapping[str, Any]) -> bool:
    """Whether the section is that of trellis codes and not that of lattices."""
    return any(params.get(key) is not None for key in TRELLIS_KEYS)


def read_skip_list(reader: ConfigReader) -> tuple[str, ...]:
    """The skip rules; a problem for each one that is not written as a rule."""
    rules = reader.names("skip_list")
    for rule in rules:
        found = _RULE.fullmatch(rule)
        if found is None or found[2] not in PARTS:
            reader.problem("skip_list", repr(rule), f"LAYER_PART, the part one of {', '.join(PARTS)}")
    return rules


def decision(rules: tuple[str, ...], module: ModuleView, matched: set[str]) -> tuple[bool, str]:
    """(quantized, why) as the configuration alone says; adds the rule that matched to `matched`."""
    rule = skip_rule_of(rules, module.name)
    if rule is not None:
        matched.add(rule)
        return False, f"excluded by skip_list {rule!r}"
    if module.kind is ModuleKind.EMBEDDING:
        return False, "embeddings are not quantized"
    return True, f"config.json has {SECTION}"


def skip_rule_of(rules: tuple[str, ...], module: str) -> str | None:
    """The rule that skips a module of this name."""
    segments = module.split(".")
    for rule in rules:
        layer, _, part = rule.partition("_")
        if segments[-1] in PARTS.get(part, ()) and layer in segments[:-1]:
            return rule
    return None
