"""What the probes of accelerators share: asking a device module of torch, and several devices as one platform.

torch is imported when something asks; a vendor's package never before that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from bitgrain.platforms.base import OPERATOR, Platform, ProbeReport


@dataclass(frozen=True, slots=True)
class Device:
    """One device, as its driver describes it.

    Args:
        generation: one of the platform's profiles, or the name that follows their pattern; "" where nothing tells it.
        memory:     bytes.
    """

    name: str
    generation: str
    features: frozenset[str]
    cores: int
    memory: int


@dataclass(frozen=True, slots=True)
class Asking:
    """How the devices of one platform are asked for.

    Args:
        module:       name of torch's module for them, for messages.
        functions:    of the module; all that `look` calls.
        look:         the device at an index, or why this torch cannot run on it.
        dispatch_key: under which torch's dispatcher holds their operators.
        operators:    "namespace::name" of every operator that kernels may ask for.
    """

    key: str
    device_type: str
    module: str
    functions: tuple[str, ...]
    look: Callable[[Any, int], Device | str]
    dispatch_key: str
    operators: tuple[str, ...]


def operator_features(names: Iterable[str]) -> frozenset[str]:
    """Feature names of operators "namespace::name"."""
    return frozenset(OPERATOR + name for name in names)


def registered(names: Iterable[str], dispatch_key: str) -> frozenset[str]:
    """Those of `names` that torch's dispatcher has a kernel for under the device's own key now.

    What it composes of other operators for every device does not count: it says nothing of the device.
    """
    import torch

    has = torch._C._dispatch_has_kernel_for_dispatch_key
    known = set(torch._C._dispatch_get_all_op_names())  # asking for a name without a schema raises
    return frozenset(name for name in names if name in known and has(name, dispatch_key))


def importable(package: str) -> bool:
    """Whether a package is installed; it is not imported."""
    return sys.modules.get(package) is not None or find_spec(package) is not None


def told(error: Exception) -> str:
    """An error in one line: vendors' libraries tell the rest in many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def ask(module: Any, asking: Asking) -> ProbeReport:
    """The report on the devices that a module of torch knows.

    Features are those of every usable device, so that a kernel that counts on one runs on any of them.
    """
    lacking = [name for name in asking.functions if not hasattr(module, name)]
    if lacking:
        return ProbeReport(asking.key, f"incompatible: {asking.module} of this torch has no {', '.join(lacking)}")
    try:
        count = module.device_count() if module.is_available() else 0
        found = [asking.look(module, index) for index in range(count)]
    except Exception as error:  # whatever a driver raises
        return ProbeReport(asking.key, f"broken: asking {asking.module} for devices raised {told(error)}")
    if not found:
        return ProbeReport(asking.key, "absent: no device is visible")
    unusable = {index: device for index, device in enumerate(found) if isinstance(device, str)}
    usable = [device for device in found if isinstance(device, Device)]
    if not usable:
        return ProbeReport(asking.key, f"incompatible: {'; '.join(dict.fromkeys(unusable.values()))}", unusable=unusable)
    names = tuple(device.name if isinstance(device, Device) else "unusable" for device in found)
    platform = joined(asking, usable, names, registered(asking.operators, asking.dispatch_key))
    return ProbeReport(asking.key, "present", platform, unusable)


def joined(asking: Asking, devices: Sequence[Device], names: tuple[str, ...], operators: Iterable[str]) -> Platform:
    """One platform of several devices: what all of them have."""
    features = frozenset.intersection(*(device.features for device in devices)) | operator_features(operators)
    generations = {device.generation for device in devices}
    generation = generations.pop() if len(generations) == 1 else ""
    cores, memory = min(device.cores for device in devices), min(device.memory for device in devices)
    return Platform(asking.key, asking.device_type, features, cores, memory, generation=generation, devices=names)


def profiles(generations: dict[str, str], operators: dict[str, tuple[str, ...]] | tuple[str, ...]) -> dict[str, frozenset[str]]:
    """Generation to its features, for planning.

    Args:
        generations: name to its features, separated by spaces; the name itself is one.
        operators:   that torch, or the vendor's package, registers: for each generation, or for all.
    """
    of = operators if isinstance(operators, dict) else dict.fromkeys(generations, operators)
    return {name: frozenset({name, *words.split()}) | operator_features(of[name]) for name, words in generations.items()}
