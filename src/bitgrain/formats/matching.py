"""How rules of a configuration match checkpoint module names: by whole dotted segments, by anchored regex, by wildcard.

A format chooses the function that its producer's rules mean; nothing here matches an unanchored substring.  Names
repeat a few segments thousands of times, so splitting and compiling are cached, and a list of rules is an index.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches
from fnmatch import translate
from functools import lru_cache
from heapq import nlargest

from bitgrain.errors import ConfigError

# Above this many candidates, difflib sees only those that share most segments with the name.
_CLOSE_LOOKS = 400


@lru_cache(maxsize=1 << 17)
def split_segments(name: str) -> tuple[str, ...]:
    """The dotted segments of a name, empty ones at the ends left out."""
    return tuple(name.strip(".").split("."))


def matches_segments(pattern: str, name: str) -> bool:
    """Whether the segments of `pattern` occur in those of `name`, contiguous and whole.

    "gate" and "mlp.gate" match "model.layers.0.mlp.gate"; neither matches "model.layers.0.mlp.gate_proj".  An empty
    pattern matches nothing.
    """
    # the substring test is the cheap and necessary condition
    core = pattern.strip(".")
    if not core or core not in name:
        return False
    wanted, found = split_segments(core), split_segments(name)
    return any(found[i : i + len(wanted)] == wanted for i in range(len(found) - len(wanted) + 1))


@lru_cache(maxsize=1 << 14)
def _segment_wildcards(pattern: str) -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(translate(segment)) for segment in split_segments(pattern))


def matches_wildcard_segments(pattern: str, name: str) -> bool:
    """As matches_segments, but each segment of `pattern` may hold *, ? and [...], which never cross a dot.

    "layers.*.self_attn" matches "model.layers.12.self_attn.q_proj".
    """
    if not pattern.strip("."):
        return False
    wanted, found = _segment_wildcards(pattern), split_segments(name)
    return any(
        all(w.match(s) for w, s in zip(wanted, found[i : i + len(wanted)], strict=True)) for i in range(len(found) - len(wanted) + 1)
    )


def matches_wildcard(pattern: str, name: str) -> bool:
    """Whether the whole `name` matches a shell pattern whose * crosses dots; case counts."""
    return _whole_wildcard(pattern).match(name) is not None


@lru_cache(maxsize=1 << 14)
def _whole_wildcard(pattern: str) -> re.Pattern[str]:
    return re.compile(translate(pattern))


@lru_cache(maxsize=1 << 14)
def compile_rule(pattern: str, where: str = "configuration") -> re.Pattern[str]:
    """The compiled regex of a rule.

    Args:
        where: the configuration key that holds the rule, for the message.
    Raises:
        ConfigError: the pattern is not a valid regular expression.
    """
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        found = f"{pattern!r} is not a valid regular expression ({error})"
        raise ConfigError(where, found, "a pattern of Python's re", "correct the pattern") from None


def matches_regex(pattern: str, name: str, where: str = "configuration") -> bool:
    """Whether a regex matches at the start of `name` (re.match: anchored at the start, open at the end).

    Raises:
        ConfigError: the pattern is not a valid regular expression.
    """
    return compile_rule(pattern, where).match(name) is not None


class SegmentRules:
    """A list of segment patterns, indexed: a look-up costs the name's length, not the list's.

    Args:
        patterns: as for matches_segments; order is priority.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self.patterns = tuple(patterns)
        self._rank: dict[tuple[str, ...], int] = {}
        for rank, pattern in enumerate(self.patterns):
            if pattern.strip("."):
                self._rank.setdefault(split_segments(pattern), rank)
        self._lengths = sorted({len(key) for key in self._rank})

    def find(self, name: str) -> str | None:
        """The first pattern in list order that matches `name`."""
        found = split_segments(name)
        ranks = [
            rank
            for length in self._lengths
            for i in range(len(found) - length + 1)
            if (rank := self._rank.get(found[i : i + length])) is not None
        ]
        return self.patterns[min(ranks)] if ranks else None


def nearest_names(name: str, candidates: Sequence[str] | Iterable[str], n: int = 3) -> list[str]:
    """Up to `n` candidates that look most like `name`, the nearest first; for messages."""
    pool = list(dict.fromkeys(candidates))
    if len(pool) > _CLOSE_LOOKS:
        segments, size = frozenset(split_segments(name)), len(name)

        def likeness(candidate: str) -> tuple[int, int]:
            return (len(segments.intersection(split_segments(candidate))), -abs(len(candidate) - size))

        pool = nlargest(_CLOSE_LOOKS, pool, key=likeness)
    return get_close_matches(name, pool, n=n)


class NameHints:
    """Nearest names for one report, as long as looking for them is cheap: a file that is wrong everywhere is refused quickly too.

    Args:
        looks: names that are looked at in all, about a microsecond each, and more for the few that look alike.
    """

    def __init__(self, looks: int = 500_000) -> None:
        self.looks = looks

    def nearest(self, name: str, candidates: Collection[str]) -> list[str]:
        """As nearest_names(); nothing once the looks are used up."""
        self.looks -= len(candidates) + 100 * min(len(candidates), _CLOSE_LOOKS)
        return nearest_names(name, candidates) if self.looks > 0 else []
