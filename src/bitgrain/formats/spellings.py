"""The two spellings of a multimodal checkpoint's text model, where a quantizer's rules use one and its tensors the other.

    language_model.model.layers.0...    in the files that programs write
    model.language_model.layers.0...    in the memory of newer programs, whose names some quantizers note
Rules are read in the spelling of the tensors.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

SPELLINGS = ("language_model.model", "model.language_model")


def missing_spelling(names: Collection[str]) -> tuple[str, str] | None:
    """(the spelling that no tensor has, the one that tensors have); None where tensors have both or neither."""
    there = [any(name.startswith(f"{spelling}.") for name in names) for spelling in SPELLINGS]
    if there[0] == there[1]:
        return None
    return SPELLINGS[there[0]], SPELLINGS[not there[0]]


def respelled(value: Any, names: Collection[str]) -> Any:
    """Part of a configuration with its names, as values, as keys and inside patterns, in the spelling of the tensors.

    Args:
        value: what JSON holds; it is not changed.
        names: of all tensors.
    """
    pair = missing_spelling(names)
    return value if pair is None else _replaced(value, *pair)


def _replaced(value: Any, old: str, new: str) -> Any:
    if isinstance(value, str):
        # dots that a regular expression escapes stay escaped
        return value.replace(old, new).replace(old.replace(".", "\\."), new.replace(".", "\\."))
    if isinstance(value, dict):
        return {_replaced(key, old, new): _replaced(entry, old, new) for key, entry in value.items()}
    return [_replaced(entry, old, new) for entry in value] if isinstance(value, list) else value
