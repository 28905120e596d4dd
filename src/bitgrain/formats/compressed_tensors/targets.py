"""How targets and ignore lists of compressed-tensors name modules.

    re:PATTERN    re.match on the full module name: anchored at the start, open at the end
    a.module.name the module itself, exactly
    Linear        a class of the unfused Hugging Face model

Specificity is exact, then regex, then class.  Source: compressed-tensors 0.17 utils/match.py; formats specification, section 4.
"""

from __future__ import annotations

from collections.abc import Iterable

from bitgrain.formats.base import ModuleKind, ModuleView
from bitgrain.formats.matching import matches_regex

REGEX = "re:"
CLASSES = {
    "Linear": frozenset({ModuleKind.LINEAR, ModuleKind.EXPERT, ModuleKind.LM_HEAD}),
    "Embedding": frozenset({ModuleKind.EMBEDDING}),
}


class TargetRules:
    """An indexed list of targets.

    Args:
        rules: as written.
        where: the configuration key that holds them, for messages.
    Raises:
        ConfigError: on the first use of a pattern that is no regular expression.
    """

    def __init__(self, rules: Iterable[str], where: str) -> None:
        self.rules, self.where = tuple(dict.fromkeys(rules)), where
        self._exact = frozenset(r for r in self.rules if not r.startswith(REGEX))
        self._regexes = tuple(r for r in self.rules if r.startswith(REGEX))
        self._attention = tuple(r for r in self._exact if r.endswith("Attention") and "." not in r)

    def matches(self, module: ModuleView) -> list[str]:
        """Every rule that names the module, the most specific first."""
        found = [module.name] if module.name in self._exact else []
        found += [r for r in self._regexes if matches_regex(r.removeprefix(REGEX), module.name, self.where)]
        found += [name for name, kinds in CLASSES.items() if name in self._exact and module.kind in kinds]
        if module.kind is ModuleKind.ATTENTION:
            found += self._attention
        return found


def specificity(rule: str) -> int:
    """0 for an exact name, 1 for a regex, 2 for a class."""
    if rule.startswith(REGEX):
        return 1
    return 2 if rule in CLASSES or (rule.endswith("Attention") and "." not in rule) else 0


def names_cache_projections(targets: Iterable[str]) -> bool:
    """Whether targets name the key and value projections only, whose outputs are what the KV cache holds."""
    ends = [t.removesuffix("$").rpartition(".")[2].rpartition("*")[2].strip("()\\") for t in targets]
    return bool(ends) and all(end in ("k_proj", "v_proj") for end in ends)
