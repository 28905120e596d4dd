"""Which modules the configuration quantizes, and with which settings: blocks, `extra_config`, lists of dense modules.

An entry of extra_config applies to the module of exactly its name; else to modules whose name ends with it, by whole
segments; else, if it has a character of regular expressions, to those in whose name it is found (re.search), the first in the
order of the file.  Source: auto-round 0.16.1 inference/convert_model.py; vLLM 0.32, its reader of the same files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from bitgrain.formats.autoround.settings import ModuleSettings, read_entry
from bitgrain.formats.config_reader import ConfigReader
from bitgrain.formats.matching import compile_rule

_REGEX_CHARACTERS = frozenset(r"*+?^$()[]{}|\\")


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of extra_config.

    Args:
        pattern: its regex; None if it is a plain name.
    """

    key: str
    settings: ModuleSettings
    pattern: re.Pattern[str] | None


class ExtraConfig:
    """The entries of extra_config, in the order in which they are tried."""

    def __init__(self, entries: Sequence[Entry] = ()) -> None:
        self.entries = tuple(entries)
        self._named = {entry.key: entry for entry in self.entries if entry.pattern is None}
        self._patterns = tuple(entry for entry in self.entries if entry.pattern is not None)

    def find(self, name: str) -> Entry | None:
        """The entry that decides about a module."""
        # whole segments from the left: the exact name first, then ever shorter endings
        segments = name.split(".")
        for start in range(len(segments)):
            named = self._named.get(".".join(segments[start:]))
            if named is not None:
                return named
        return next((entry for entry in self._patterns if entry.pattern is not None and entry.pattern.search(name)), None)

    def keys_for(self, name: str) -> list[str]:
        """The keys of all entries that fit a module, also of those that another one overrides."""
        return [
            entry.key
            for entry in self.entries
            if (entry.pattern.search(name) if entry.pattern is not None else f".{name}".endswith(f".{entry.key}"))
        ]


def read_extra_config(settings: ConfigReader, base: ModuleSettings) -> ExtraConfig:
    """The entries over the settings at the top; problems go to `settings`."""
    entries = []
    for key, stated in settings.section("extra_config", "an object of name or pattern: settings").items():
        place = f"extra_config[{key!r}]"
        read = read_entry(settings, place, stated, base)
        pattern = None
        if not _REGEX_CHARACTERS.isdisjoint(key):
            pattern = settings.collect(partial(compile_rule, key, settings.place(place)))
            if pattern is None:
                continue
        if read is not None:
            entries.append(Entry(key, read, pattern))
    return ExtraConfig(entries)


def read_blocks(settings: ConfigReader) -> tuple[str, ...]:
    """Beginnings of the names of the modules that are quantized; empty if the configuration does not say.

    A list inside a list names blocks one by one and stands for the beginning that they have in common.
    """
    for key in ("block_name_to_quantize", "to_quant_block_names", "quant_block_list"):
        value = settings.values.get(key)
        settings.skip({key})
        if not value:
            continue
        parts: list[Any] = value.split(",") if isinstance(value, str) else list(value) if isinstance(value, (list, tuple)) else [value]
        prefixes = [_shared_beginning(part) if _is_list_of_texts(part) else part for part in parts]
        if all(isinstance(prefix, str) and prefix.strip() for prefix in prefixes):
            return tuple(prefix.strip() for prefix in prefixes)
        settings.problem(key, repr(value)[:200], "names of blocks, as a text with commas or a list")
    return ()


def _is_list_of_texts(part: object) -> bool:
    return isinstance(part, (list, tuple)) and bool(part) and all(isinstance(name, str) for name in part)


def _shared_beginning(names: Sequence[str]) -> str:
    """The longest text with which all names begin, without a dot at its end."""
    shortest, last = min(names), max(names)
    while not last.startswith(shortest):
        shortest = shortest[:-1]
    return shortest.rstrip(".")
