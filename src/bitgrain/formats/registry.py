"""The table of formats: one folder each beside this file, and the entry points `bitgrain.formats`.

A folder's package exports CONFIG, its QuantConfig class; nothing else lists formats.
"""

from __future__ import annotations

import pkgutil
from functools import lru_cache
from importlib import import_module

import bitgrain.formats
from bitgrain.formats.base import QuantConfig
from bitgrain.registry import Registry

_REGISTRY: Registry[type[QuantConfig]] = Registry("format", "bitgrain.formats")


@lru_cache(maxsize=1)
def formats() -> Registry[type[QuantConfig]]:
    """Every format by its canonical name."""
    for module in pkgutil.iter_modules(bitgrain.formats.__path__):
        if module.ispkg:
            config: type[QuantConfig] = import_module(f"bitgrain.formats.{module.name}").CONFIG
            _REGISTRY.add(config.name, config)
    return _REGISTRY


def canonical_name(asked: str) -> str | None:
    """The canonical name of a format for a user's word, which may be an alias of another engine; None if there is none."""
    wanted = asked.lower().replace("_", "-")
    for name, config in formats().items():
        if wanted in {name, *(alias.lower().replace("_", "-") for alias in config.aliases)}:
            return name
    return None
