"""Rules on module names, as this format's configurations write them: exact names, shell patterns, and "re:" regexes."""

from __future__ import annotations

from collections.abc import Iterable

from bitgrain.formats.matching import compile_rule, matches_regex, matches_wildcard

_WILD = frozenset("*?[")


class NameRules:
    """A list of rules, indexed: exact names cost a look-up, patterns a pass over the patterns alone.

    A rule is a whole name, a shell pattern whose * crosses dots, or "re:" and a regex that matches at the start.
    Source: amd-quark 0.13 export/main_export/quant_config_parser.py (fnmatch); SGLang 0.5 quark_utils.py (exact, re:).

    Args:
        patterns: order is priority.
        where:    the configuration key that holds them, for messages.
    Raises:
        ConfigError: a regex is not valid.
    """

    def __init__(self, patterns: Iterable[str], where: str) -> None:
        self.patterns, self.where = tuple(dict.fromkeys(patterns)), where
        self._rank = {pattern: rank for rank, pattern in enumerate(self.patterns)}
        self._wild = [p for p in self.patterns if p.startswith("re:") or not _WILD.isdisjoint(p)]
        for pattern in self._wild:
            if pattern.startswith("re:"):
                compile_rule(pattern[3:], where)

    def find_all(self, name: str) -> list[str]:
        """Every rule that matches `name`, by priority."""
        found = {p for p in self._wild if self._matches(p, name)}
        if name in self._rank:
            found.add(name)
        return sorted(found, key=self._rank.__getitem__)

    def _matches(self, pattern: str, name: str) -> bool:
        if pattern.startswith("re:"):
            return matches_regex(pattern[3:], name, self.where)
        return matches_wildcard(pattern, name)
