"""The table of kernels: one folder per backend beside this file, and the entry points `bitgrain.kernels`.

A backend's package exports KERNELS, a list of (operation, platform key, kernel); the floor's key is ANY_PLATFORM.
A kernel may stand there for several platforms; one that asks for a platform's features (platforms.probe.target) has an instance for each.
An entry point loads to such a list.  Nothing else lists kernels.
"""

from __future__ import annotations

import pkgutil
from functools import lru_cache
from importlib import import_module
from importlib.metadata import entry_points

import bitgrain.kernels
from bitgrain.errors import RequestError
from bitgrain.kernels.base import Kernel

ANY_PLATFORM, GROUP = "any", "bitgrain.kernels"

Entry = tuple[str, str, Kernel]


@lru_cache(maxsize=1)
def _plugins() -> dict[str, list[Entry] | str]:
    """Name of each entry point to its kernels, or to why they cannot be loaded."""
    found: dict[str, list[Entry] | str] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda p: p.name):
        try:
            found[point.name] = list(point.load())
        except Exception as error:  # a package that is broken must not take the others with it
            found[point.name] = f"broken: loading {point.value} failed: {type(error).__name__}: {error}"
    return found


def broken_packages() -> dict[str, str]:
    """Entry points whose kernels cannot be loaded, each with why."""
    return {name: found for name, found in _plugins().items() if isinstance(found, str)}


@lru_cache(maxsize=1)
def kernel_entries() -> tuple[Entry, ...]:
    """Every (operation, platform key, kernel), in-tree and out-of-tree alike."""
    entries: list[Entry] = []
    for module in pkgutil.iter_modules(bitgrain.kernels.__path__):
        if module.ispkg:
            entries += import_module(f"bitgrain.kernels.{module.name}").KERNELS
    for found in _plugins().values():
        entries += found if isinstance(found, list) else []
    places = [(operation, platform, kernel.name) for operation, platform, kernel in entries]
    owners: dict[tuple[str, str], set[type]] = {}
    for operation, _, kernel in entries:
        owners.setdefault((operation, kernel.name), set()).add(type(kernel))
    # one kernel may serve several platforms, with an instance for each; a name is never that of two
    twice = sorted({f"{o}={n}" for o, p, n in places if places.count((o, p, n)) > 1 or len(owners[o, n]) > 1})
    if twice:
        raise RequestError("registry of kernels", f"registered twice: {', '.join(twice)}", "unique names", "rename or uninstall one of them")
    return tuple(entries)


def candidates(operation: str, platform: str) -> list[Kernel]:
    """Kernels of one operation that are registered for a platform or for any, best rank first."""
    found = [k for o, p, k in kernel_entries() if o == operation and p in (platform, ANY_PLATFORM)]
    return sorted(found, key=lambda k: (-k.rank, k.name))


def kernel_names(operation: str) -> list[str]:
    """Names of all kernels of one operation, whatever their platform."""
    return sorted({k.name for o, _, k in kernel_entries() if o == operation})


def operations() -> list[str]:
    """Operations that have at least one kernel."""
    return sorted({o for o, _, _ in kernel_entries()})
