"""One open table of named things, filled by decorators and by entry points."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from bitgrain.errors import RequestError

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to values; a second value under one name and an unknown name are errors.

    Args:
        noun:  what the values are, for messages.
        group: entry-point group whose members are added on first look-up.  Loading a member must return the value
               (or an iterable of (name, value) pairs when one distribution brings several).
    """

    def __init__(self, noun: str, group: str) -> None:
        self._noun, self._group = noun, group
        self._values: dict[str, T] = {}
        self._plugins_loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds its argument under `name` and returns it unchanged."""

        def add(value: T) -> T:
            self.add(name, value)
            return value

        return add

    def add(self, name: str, value: T) -> None:
        if self._values.get(name, value) is not value:
            raise RequestError(
                f"registry of {self._noun}s", f"{name!r} is registered twice", "unique names", "rename one of the two"
            )
        self._values[name] = value

    def _load_plugins(self) -> None:
        if self._plugins_loaded:
            return
        self._plugins_loaded = True
        for point in sorted(entry_points(group=self._group), key=lambda p: p.name):
            self._add_plugin(point)

    def _add_plugin(self, point: EntryPoint) -> None:
        loaded = point.load()
        pairs = loaded if isinstance(loaded, (list, tuple)) else [(point.name, loaded)]
        for name, value in pairs:
            self.add(name, value)

    def __getitem__(self, name: str) -> T:
        self._load_plugins()
        if name not in self._values:
            raise RequestError(
                f"{self._noun} {name!r}",
                "no such name",
                f"one of {', '.join(sorted(self._values)) or 'none registered'}",
                f"choose a listed {self._noun}, or install the package that brings it",
            )
        return self._values[name]

    def items(self) -> Iterator[tuple[str, T]]:
        """All (name, value) pairs, plug-ins included, in order of registration."""
        self._load_plugins()
        return iter(list(self._values.items()))

    def names(self) -> list[str]:
        return [name for name, _ in self.items()]
