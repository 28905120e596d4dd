"""Which platforms exist here: one module per platform beside this file, and the entry points `bitgrain.platforms`.

A platform's module exports PLATFORM, a PlatformProbe; an entry point loads to one.  Nothing else lists platforms.
Probing is lazy: a platform is looked at when something asks for it.

A platform is asked for as KEY[:GENERATION][@host]: `xyz` is what the probe finds, `xyz:gen2` what planning describes of a generation of
devices that is not here, `xyz@host` runs the platform's kernels on the host's tensors (an interpreter, models of operators), for tests.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

import bitgrain.platforms
from bitgrain.errors import RequestError, RunError
from bitgrain.platforms.base import Platform, PlatformProbe, ProbeReport
from bitgrain.registry import Registry
from bitgrain.settings import platform_key

GROUP = "bitgrain.platforms"
HOST, HOST_TYPE = "@host", "cpu"
# of a planned or simulated device: enough of both for every decision that asks
PLANNED_CORES, PLANNED_MEMORY = 64, 64 << 30
LAST_RANK = -1 << 30


@dataclass(frozen=True, slots=True)
class PlatformRequest:
    """What KEY[:GENERATION][@host] asks for."""

    key: str
    generation: str = ""
    on_host: bool = False

    def __str__(self) -> str:
        return self.key + (f":{self.generation}" if self.generation else "") + (HOST if self.on_host else "")


# key to what kernels count on in the innermost context
_counted_on: dict[str, PlatformRequest] = {}


@lru_cache(maxsize=1)
def _probes() -> Registry[PlatformProbe]:
    # entry points are loaded here, each by itself: one that is broken is a platform that says so
    probes: Registry[PlatformProbe] = Registry("platform", "")
    for module in pkgutil.iter_modules(bitgrain.platforms.__path__):
        found: PlatformProbe | None = getattr(import_module(f"bitgrain.platforms.{module.name}"), "PLATFORM", None)
        if found is not None:
            probes.add(found.key, found)
    for point in sorted(entry_points(group=GROUP), key=lambda p: p.name):
        for plugin in _plugins(point):
            probes.add(plugin.key, plugin)
    return probes


def _plugins(point: EntryPoint) -> list[PlatformProbe]:
    """The probe, or list of probes, that an entry point loads to; or one that says why it does not."""
    try:
        loaded = point.load()
    except Exception as error:  # whatever a broken package raises
        why = f"broken: loading {point.value} failed: {type(error).__name__}: {error}"
    else:
        found = list(loaded) if isinstance(loaded, (list, tuple)) else [loaded]
        if all(isinstance(one, PlatformProbe) for one in found):
            return found
        why = f"broken: {point.value} is {type(loaded).__name__}, not a PlatformProbe or a list of them"
    return [PlatformProbe(point.name, point.name, LAST_RANK, lambda: ProbeReport(point.name, why))]


def known_platforms() -> list[str]:
    """Dispatch keys of all platforms that bitgrain or a plug-in can probe."""
    return sorted(_probes().names())


def generations(key: str) -> list[str]:
    """Generations of a platform's devices that planning knows; the first is what the key alone means where none is present."""
    return list(_probes()[key].profiles)


def parse_request(text: str) -> PlatformRequest:
    """What a user's KEY[:GENERATION][@host] asks for.

    Raises:
        RequestError: not of that form, no such platform, or no such generation of it; names the nearest.
    """
    key, colon, generation = text.removesuffix(HOST).partition(":")
    where = f"platform {text!r}"
    known = known_platforms()
    if key not in known:
        shape = "not KEY[:GENERATION][@host]" if not key or "@" in text.removesuffix(HOST) else "no such platform"
        raise RequestError(where, shape + nearest(key, known), f"one of {', '.join(known)}", "choose one of them, or install the package that brings it")
    profiles = _probes()[key].profiles
    if colon and generation not in profiles:
        found = f"{key} has no generation {generation!r}{nearest(generation, profiles)}"
        raise RequestError(where, found, f"one of {', '.join(profiles) or 'none'}", "correct it, or leave it out; an index of a device belongs to --device")
    if text.endswith(HOST) and _probes()[key].device_type == HOST_TYPE:
        raise RequestError(where, f"{key}'s tensors live on the host already", f"{key!r}", f"leave {HOST} out")
    return PlatformRequest(key, generation, text.endswith(HOST))


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'abc'?" of the known name that is most alike, or ""."""
    found = get_close_matches(name.lower(), list(known), 1)
    return f"; did you mean {found[0]!r}?" if found else ""


@cache
def probe(key: str) -> ProbeReport:
    """What the probe of one platform found; asked once."""
    asked = _probes()[key]
    try:
        return asked.probe()
    except Exception as error:  # a plug-in's probe may raise anything; that is an answer too
        return ProbeReport(key, f"broken: its probe raised {type(error).__name__}: {error}")


def probe_all() -> list[ProbeReport]:
    """The reports of all known platforms."""
    return [probe(key) for key in known_platforms()]


def states() -> str:
    """Every known platform with its state, those that are present first: the reasons why a request cannot be met."""
    reports = sorted(probe_all(), key=lambda r: (r.platform is None, r.key))
    return "\n".join(f"    {r.key}: {r.state}" for r in reports)


def described(request: PlatformRequest) -> Platform:
    """A platform as one of its generations is described: planned, or simulated on the host."""
    found = _probes()[request.key]
    generation = request.generation or next(iter(found.profiles), "")
    features = found.profiles.get(generation, frozenset())
    if request.on_host:
        return Platform(request.key, HOST_TYPE, features, 1, PLANNED_MEMORY, "simulated", generation)
    return Platform(request.key, found.device_type, features, PLANNED_CORES, PLANNED_MEMORY, "planned", generation)


@contextmanager
def counting_on(text: str) -> Iterator[str]:
    """A context in which kernels of a key count on KEY[:GENERATION][@host]; the key.

    Raises:
        RequestError: no such platform, or no such generation of it.
        RunError:     the package that brings the platform does not load.
    """
    request = parse_request(text)
    if _probes()[request.key].default_rank == LAST_RANK:
        raise RunError(f"platform {text!r}", probe(request.key).state, "a package that loads", "mend or uninstall it")
    before = _counted_on.get(request.key)
    _counted_on[request.key] = request
    try:
        yield request.key
    finally:
        if before is None:
            del _counted_on[request.key]
        else:
            _counted_on[request.key] = before


def target(key: str) -> Platform:
    """What kernels of a platform may count on: as it was asked for, else as it was found, else as its first generation is described.

    A key that only kernels know has no features.
    """
    if key not in _probes().names():
        return Platform(key, key, frozenset(), PLANNED_CORES, PLANNED_MEMORY, "planned")
    asked = _counted_on.get(key) or _forced()
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
        raise _absent(f"platform {text!r}", f"{request.key} is {report.state}")
    if request.generation:
        raise RunError(
            f"platform {text!r}", f"a generation to plan for; the devices here are {report.platform.generation or request.key}",
            f"{request.key!r}, the devices that are here", "leave out the generation, or only plan (`bitgrain explain --platform`)",
        )  # fmt: skip
    return report.platform


def _forced() -> PlatformRequest | None:
    """What BITGRAIN_PLATFORM asks for.

    Raises:
        RequestError: it names nothing.
    """
    text = platform_key()
    try:
        return parse_request(text) if text else None
    except RequestError as error:
        raise error.moved_to(f"BITGRAIN_PLATFORM={text}") from None


def _absent(where: str, why: str) -> RunError:
    return RunError(where, f"{why}; the platforms are\n{states()}", "a platform that is present", "choose another device, or mend what the reasons name; `bitgrain doctor` tells more")


def default_platform() -> Platform:
    """BITGRAIN_PLATFORM's platform, or the present one of the highest rank."""
    forced = _forced()
    if forced is not None:
        return present(str(forced))
    ranked = sorted((p for _, p in _probes().items()), key=lambda p: -p.default_rank)
    for candidate in ranked:
        report = probe(candidate.key)
        if report.platform is not None:
            return present(candidate.key)
    raise _absent("platforms", "none is present")


def default_device() -> str:
    """torch device of the default platform: its type, with the index of the first usable device where that is not the first one."""
    platform = default_platform()
    unusable = probe(platform.key).unusable if platform.state == "present" else {}
    first = next((i for i in range(len(platform.devices)) if i not in unusable), 0)
    return f"{platform.device_type}:{first}" if first else platform.device_type


def platform_of(device: str) -> Platform:
    """The platform that serves a torch device such as "cpu" or "xyz:0".

    Raises:
        RunError: none does, it is not present, or the device is not one of its own.
    """
    kind, _, index = device.partition(":")
    forced = _forced()
    if forced is not None:
        platform = present(str(forced))
        if kind != platform.device_type:
            raise RunError(f"device {device!r}", f"BITGRAIN_PLATFORM={forced}", f"a device of type {platform.device_type}, where that platform's tensors live", "leave one of the two out")
        return _checked(device, index, platform)
    matching = [p for _, p in _probes().items() if p.device_type == kind]
    if not matching:
        types = sorted({p.device_type for _, p in _probes().items()})
        raise RunError(
            f"device {device!r}", f"no platform serves it{nearest(kind, types)}; the platforms are\n{states()}", f"a device of type {' or '.join(types)}",
            "choose another device, or install the package that brings its platform",
        )  # fmt: skip
    reports = [probe(p.key) for p in sorted(matching, key=lambda p: -p.default_rank)]
    found = next((r.platform for r in reports if r.platform is not None), None)
    if found is None:
        raise _absent(f"device {device!r}", "; ".join(f"{r.key} is {r.state}" for r in reports))
    return _checked(device, index, present(found.key))


def _checked(device: str, index: str, platform: Platform) -> Platform:
    """The platform, if the device of that index is one of its own and usable; "" is the default one."""
    if not platform.devices or not (index or probe(platform.key).unusable):
        return platform
    place = int(index) if index.isdigit() else 0 if not index else -1
    visible = ", ".join(f"{platform.device_type}:{i} {name}" for i, name in enumerate(platform.devices))
    if not 0 <= place < len(platform.devices):
        raise RunError(f"device {device!r}", f"{len(platform.devices)} visible: {visible}", "the index of one of them", "choose another device")
    why = probe(platform.key).unusable.get(place)
    if why:
        raise RunError(f"device {device!r}", why, "a device that this torch can run on", f"choose another one of {visible}")
    return platform
