"""Which modules the configuration excludes, and which recipe it gives a module of a mixed checkpoint.

Patterns are shell wildcards on the whole module name (`lm_head`, `*router*`, `model.layers.0.mlp*`), whose * crosses dots.
Older files name a parent or an inner part without wildcards (`model.layers.0.self_attn`, `router`); such a name matches by
whole dotted segments.  Source: formats specification, section 6; vLLM 0.32 (how engines match older files).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from bitgrain.formats.matching import SegmentRules, matches_wildcard
from bitgrain.formats.modelopt.settings import Recipe

_WILD = frozenset("*?[")


class Exclusions:
    """An indexed list of patterns.

    Args:
        patterns: as written.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self.patterns = tuple(dict.fromkeys(patterns))
        self._plain = SegmentRules(p for p in self.patterns if _WILD.isdisjoint(p))
        self._wild = tuple(p for p in self.patterns if not _WILD.isdisjoint(p))

    def find(self, name: str) -> str | None:
        """A pattern that excludes the module, or None."""
        plain = self._plain.find(name)
        return plain if plain is not None else next((p for p in self._wild if matches_wildcard(p, name)), None)


class LayerRecipes:
    """The recipes of a mixed checkpoint, by module name, by the name of a parent (a layer's experts), or by wildcard."""

    def __init__(self, recipes: Mapping[str, Recipe]) -> None:
        self.recipes = dict(recipes)
        self._wild = tuple(p for p in self.recipes if not _WILD.isdisjoint(p))

    def find(self, name: str) -> tuple[str, Recipe] | None:
        """(rule, recipe) of the module's own name, else of its nearest parent, else of the first wildcard that matches."""
        place = name
        while place:
            if place in self.recipes:
                return place, self.recipes[place]
            place = place.rpartition(".")[0]
        wild = next((p for p in self._wild if matches_wildcard(p, name)), None)
        return None if wild is None else (wild, self.recipes[wild])
