"""Reading a producer's configuration section: every key accounted for, every problem found in one pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from bitgrain.errors import BitgrainError, ConfigError, ConflictingConfigError, raise_all
from bitgrain.formats.matching import nearest_names


class Settings:
    """The keys of one section.  Each reader marks its keys as known; `finish` reports all problems and unknown keys.

    A key whose value is null counts as absent.  When one setting has several spellings, those present must agree.

    Args:
        values: the section.
        where:  what messages call it.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "quantization_config") -> None:
        self.values, self.where = values, where
        self.problems: list[BitgrainError] = []
        self._known: set[str] = set()

    def problem(self, key: str, found: str, needed: str, action: str = "correct the configuration") -> None:
        """Note a ConfigError about one key."""
        self.problems.append(ConfigError(f"{self.where}: {key}", found, needed, action))

    def read(self, *keys: str, same: Callable[[Any], Any] = lambda value: value) -> tuple[str, Any]:
        """(spelling, value) of the first spelling that is present; (first key, None) if none is."""
        self._known.update(keys)
        present = [(k, self.values[k]) for k in keys if self.values.get(k) is not None]
        for key, value in present[1:]:
            if same(value) != same(present[0][1]):
                found = f"{value!r}, but {present[0][0]} = {present[0][1]!r}"
                action = "find out which is right and correct the other"
                self.problems.append(ConflictingConfigError(f"{self.where}: {key}", found, "equal values", action))
        return present[0] if present else (keys[0], None)

    def integer(self, *keys: str, allowed: Collection[int] | None = None, minimum: int | None = None, default: int | None = None) -> int:
        """An integer; without a default its absence is a problem.

        Args:
            allowed: the values that are possible, `minimum` ignored.
        """
        key, value = self.read(*keys)
        needed = "an integer" if allowed is None else f"one of {', '.join(map(str, sorted(allowed)))}"
        if value is None:
            if default is not None:
                return default
            self.problem(key, "absent", needed, "fetch the checkpoint's complete configuration")
            return 0
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or (allowed is not None and value not in allowed) or (allowed is None and minimum is not None and value < minimum):
            self.problem(key, repr(value), needed)
            return default or 0
        return int(value)

    def group_size(self, *keys: str, default: int) -> int:
        """A group size: above 0, or -1 for whole rows."""
        size = self.integer(*keys, default=default)
        if size < 1 and size != -1:
            key = next(k for k in keys if self.values.get(k) is not None)
            self.problem(key, repr(size), "a size above 0, or -1 for one group per row")
            return default
        return size

    def flag(self, *keys: str) -> bool | None:
        """True, False or, when absent, None."""
        key, value = self.read(*keys)
        if value is not None and not isinstance(value, bool):
            self.problem(key, repr(value), "true or false")
            return None
        return value

    def text(self, *keys: str, default: str) -> str:
        """A word, in lower case."""
        key, value = self.read(*keys, same=lambda v: str(v).lower())
        if value is None:
            return default
        if not isinstance(value, str):
            self.problem(key, repr(value), "a text")
            return default
        return value.lower()

    def names(self, *keys: str) -> tuple[str, ...]:
        """A list of names, nested lists flattened; a single text is one name; empty when absent."""
        key, value = self.read(*keys)
        try:
            return tuple(_flat_names(value))
        except TypeError:
            self.problem(key, repr(value)[:200], "a list of names")
            return ()

    def need(self, key: str, accepts: Callable[[Any], bool], needed: str, action: str) -> None:
        """A key that, where present, must have a value that changes nothing here."""
        _, value = self.read(key)
        if value is not None and not accepts(value):
            self.problem(key, repr(value)[:200], needed, action)

    def skip(self, keys: Iterable[str]) -> None:
        """Keys that say how the checkpoint was made or run before, and nothing about its tensors."""
        self._known.update(keys)

    def finish(self) -> None:
        """Raise every problem, with one more for all unknown keys; null and empty values say nothing and pass."""
        unknown = sorted(k for k, v in self.values.items() if k not in self._known and v not in (None, [], {}))
        if unknown:
            shown = []
            for key in unknown:
                near = nearest_names(key, sorted(self._known), 1)
                shown.append(f"{key} (nearest known: {near[0]})" if near else key)
            self.problems.append(
                ConfigError(
                    self.where,
                    f"unknown keys: {', '.join(shown)}",
                    "keys whose meaning is known",
                    "correct the spelling, or remove keys that say nothing about the tensors",
                )
            )
        raise_all(self.where, self.problems)


def _flat_names(value: Any) -> Iterable[str]:
    if value is None:
        return
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            if part is None:
                raise TypeError
            yield from _flat_names(part)
    else:
        raise TypeError
