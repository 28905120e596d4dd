"""Which platforms exist here: one module per platform beside this file, and the entry points `bitgrain.platforms`.

A platform's module exports PLATFORM, a PlatformProbe; an entry point loads to one.  Nothing else lists platforms.
Probing is lazy: a platform is looked at when something asks for it.
"""

from __future__ import annotations

import pkgutil
from functools import cache, lru_cache
from importlib import import_module

import bitgrain.platforms
from bitgrain.errors import RunError
from bitgrain.platforms.base import Platform, PlatformProbe, ProbeReport
from bitgrain.registry import Registry
from bitgrain.settings import platform_key

_REGISTRY: Registry[PlatformProbe] = Registry("platform", "bitgrain.platforms")
_NOT_PLATFORMS = ("base", "host_memory", "probe")


@lru_cache(maxsize=1)
def _probes() -> Registry[PlatformProbe]:
    for module in pkgutil.iter_modules(bitgrain.platforms.__path__):
        if module.name not in _NOT_PLATFORMS:
            probe: PlatformProbe = import_module(f"bitgrain.platforms.{module.name}").PLATFORM
            _REGISTRY.add(probe.key, probe)
    return _REGISTRY


def known_platforms() -> list[str]:
    """Dispatch keys of all platforms that bitgrain or a plug-in can probe."""
    return sorted(_probes().names())


@cache
def probe(key: str) -> ProbeReport:
    """What the probe of one platform found; asked once."""
    return _probes()[key].probe()


def probe_all() -> list[ProbeReport]:
    """The reports of all known platforms."""
    return [probe(key) for key in known_platforms()]


def present(key: str) -> Platform:
    """The platform of that key.

    Raises:
        RequestError: no such platform.
        RunError:     it is absent, broken or incompatible here.
    """
    report = probe(key)
    if report.platform is None:
        raise RunError(f"platform {key!r}", report.state, "a platform that is present", "choose another device; `bitgrain doctor` lists what is here")
    return report.platform


def default_platform() -> Platform:
    """BITGRAIN_PLATFORM's platform, or the present one of the highest rank."""
    forced = platform_key()
    if forced is not None:
        return present(forced)
    ranked = sorted((p for _, p in _probes().items()), key=lambda p: -p.default_rank)
    for candidate in ranked:
        report = probe(candidate.key)
        if report.platform is not None:
            return report.platform
    raise RunError("platforms", "none is present", "at least one", "see `bitgrain doctor`")


def default_device() -> str:
    """torch device type of the default platform."""
    return default_platform().device_type


def platform_of(device: str) -> Platform:
    """The platform that serves a torch device such as "cpu" or "xyz:0".

    Raises:
        RunError: none does, or it is not present.
    """
    forced = platform_key()
    if forced is not None:
        return present(forced)
    kind = device.partition(":")[0]
    matching = [p for _, p in _probes().items() if p.device_type == kind]
    if not matching:
        types = sorted({p.device_type for _, p in _probes().items()})
        raise RunError(f"device {device!r}", "no platform serves it", f"a device of type {' or '.join(types)}", "choose another device, or install the package that brings its platform")
    best = max(matching, key=lambda p: p.default_rank)
    return present(best.key)
