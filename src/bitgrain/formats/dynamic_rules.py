"""Per-module rules under `dynamic`: an ordered object of pattern to overrides, of which the first that matches decides.

"-:" in front of a pattern leaves the module unquantized; "+:" or nothing overrides settings.  A pattern is a regex that
matches at the start of the whole module name.  Source: GPTQModel 7.7.0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from bitgrain.formats.config_reader import ConfigReader
from bitgrain.formats.matching import compile_rule

# (reader, place for messages, overrides as written) to the checked overrides; problems go to the reader
OverrideReader = Callable[[ConfigReader, str, object], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class DynamicRule:
    """One entry of `dynamic`.

    Args:
        key:       the entry as written.
        pattern:   its regex.
        exclude:   "-:" was in front: the module is not quantized.
        overrides: settings that replace the common ones.
    """

    key: str
    pattern: re.Pattern[str]
    exclude: bool
    overrides: Mapping[str, Any]


def read_dynamic_rules(settings: ConfigReader, read_overrides: OverrideReader) -> tuple[DynamicRule, ...]:
    """The rules, in the order in which they are tried."""
    rules = []
    for key, overrides in settings.section("dynamic", "an object of pattern: overrides").items():
        where = f"dynamic[{key!r}]"
        text = key.removeprefix("-:").removeprefix("+:")
        pattern = settings.collect(partial(compile_rule, text, settings.place(where)))
        if pattern is None:
            continue
        exclude = key.startswith("-:")
        rules.append(DynamicRule(key, pattern, exclude, {} if exclude else read_overrides(settings, where, overrides)))
    return tuple(rules)


def find_dynamic_rule(rules: tuple[DynamicRule, ...], name: str) -> DynamicRule | None:
    """The first rule that matches a module name."""
    return next((rule for rule in rules if rule.pattern.match(name)), None)
