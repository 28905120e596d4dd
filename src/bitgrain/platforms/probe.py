"""Which platforms exist here: one module per platform beside this file, and the entry points `bitgrain.platforms`.

A platform's module exports PLATFORM, a PlatformProbe; an entry point loads to one.  Nothing else lists platforms.
Probing is lazy: a platform is looked at when something asks for it.

A platform is asked for as KEY[:GENERATION][@host]: `xyz` is what the probe finds, `xyz:gen2` what planning describes of a generation of
devices that is not here, `xyz@host` runs the platform's kernels on the host's tensors (an interpreter, models of operators), for tests.
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module

import bitgrain.platforms
from bitgrain.errors import RequestError, RunError
from bitgrain.platforms.base import Platform, PlatformProbe, ProbeReport
from bitgrain.registry import Registry
from bitgrain.settings import platform_key

_REGISTRY: Registry[PlatformProbe] = Registry("platform", "bitgrain.platforms")
_NOT_PLATFORMS = ("base", "host_memory", "probe")
HOST = "@host"
# of a planned or simulated device: enough of both for every decision that asks
PLANNED_CORES, PLANNED_MEMORY = 64, 64 << 30


@dataclass(frozen=True, slots=True)
class PlatformRequest:
    """What KEY[:GENERATION][@host] asks for."""

    key: str
    generation: str = ""
    on_host: bool = False

    def __str__(self) -> str:
        return self.key + (f":{self.generation}" if self.generation else "") + (HOST if self.on_host else "")


# key to the generation that planning in this process was asked for
_planned: dict[str, PlatformRequest] = {}


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


def parse_request(text: str) -> PlatformRequest:
    """What a user's KEY[:GENERATION][@host] asks for.

    Raises:
        RequestError: no such platform, or no such generation of it.
    """
    on_host = text.endswith(HOST)
    key, _, generation = text.removesuffix(HOST).partition(":")
    profiles = _probes()[key].profiles
    if generation and generation not in profiles:
        raise RequestError(f"platform {text!r}", f"{key} has no generation {generation!r}", f"one of {', '.join(profiles) or 'none'}", "correct it, or leave it out")
    return PlatformRequest(key, generation, on_host)


@cache
def probe(key: str) -> ProbeReport:
    """What the probe of one platform found; asked once."""
    return _probes()[key].probe()


def probe_all() -> list[ProbeReport]:
    """The reports of all known platforms."""
    return [probe(key) for key in known_platforms()]


def described(request: PlatformRequest) -> Platform:
    """A platform as one of its generations is described: planned, or simulated on the host."""
    found = _probes()[request.key]
    generation = request.generation or next(iter(found.profiles), "")
    features = found.profiles.get(generation, frozenset())
    if request.on_host:
        return Platform(request.key, "cpu", features, 1, PLANNED_MEMORY, "simulated")
    return Platform(request.key, found.device_type, features, PLANNED_CORES, PLANNED_MEMORY, "planned")


def plan_for(text: str) -> str:
    """Make KEY[:GENERATION][@host] what kernels of that key count on in this process; the key."""
    request = parse_request(text)
    _planned[request.key] = request
    return request.key


def target(key: str) -> Platform:
    """What kernels of a platform may count on: as it was asked for, else as it was found, else as its first generation is described.

    A key that only kernels know has no features.
    """
    if key not in _probes().names():
        return Platform(key, key, frozenset(), PLANNED_CORES, PLANNED_MEMORY, "planned")
    forced = platform_key()
    asked = _planned.get(key) or (parse_request(forced) if forced else None)
    if asked is not None and asked.key == key and (asked.on_host or asked.generation):
        return described(asked)
    return probe(key).platform or described(PlatformRequest(key))


def present(text: str) -> Platform:
    """The platform KEY[@host], able to run.

    Raises:
        RequestError: no such platform.
        RunError:     it is absent, broken or incompatible here; or a generation was asked for, which is only planned for.
    """
    request = parse_request(text)
    if request.on_host:
        return described(request)
    report = probe(request.key)
    if report.platform is None:
        raise RunError(f"platform {request.key!r}", report.state, "a platform that is present", "choose another device; `bitgrain doctor` lists what is here")
    if request.generation:
        raise RunError(f"platform {text!r}", "a generation to plan for", f"{request.key!r}, the devices that are here", "leave out the generation, or only plan (`bitgrain explain --platform`)")
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
    reports = [probe(p.key) for p in sorted(matching, key=lambda p: -p.default_rank)]
    found = next((r.platform for r in reports if r.platform is not None), None)
    if found is None:
        raise RunError(f"device {device!r}", "; ".join(f"{r.key}: {r.state}" for r in reports), "a platform that is present", "choose another device; `bitgrain doctor` lists what is here")
    return found
