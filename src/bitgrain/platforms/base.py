"""What a platform is: a dispatch key and a probed set of features, never a version floor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

# Of a feature that is an operator which is registered now: "op:namespace::name".
OPERATOR = "op:"


def told_features(features: Collection[str]) -> list[str]:
    """Features for people, sorted: operators are counted."""
    plain = sorted(f for f in features if not f.startswith(OPERATOR))
    count = sum(f.startswith(OPERATOR) for f in features)
    return [*plain, *([f"{count} operators"] if count else [])]


@dataclass(frozen=True, slots=True)
class Platform:
    """One machine's view of one kind of device.

    Args:
        key:         dispatch key; kernels are registered for it.
        device_type: torch device type that tensors of this platform live on.
        features:    names of what was found: instruction families, dtypes, operators.
        cores:       units that run in parallel, as this process may use them.
        memory:      bytes of memory that the process may use.
        state:       "present": found here; "planned": described for planning, nothing can run;
                     "simulated": its kernels run on the host's tensors (an interpreter, models of operators).
        generation:  what the devices are called among their kind; also a feature.  "" where they are of several, or of none that has a name here.
        devices:     names of the devices by index, where they are told apart.
    """

    key: str
    device_type: str
    features: frozenset[str]
    cores: int
    memory: int
    state: str = "present"
    generation: str = ""
    devices: tuple[str, ...] = ()

    def describe(self) -> str:
        """Its state and what it counts on: "planned for key:generation (feature, …, 9 operators)"."""
        name = self.key + (f":{self.generation}" if self.generation else "")
        said = {"planned": f"planned for {name}", "simulated": f"on {name} simulated on the host"}.get(self.state, f"on {name}")
        return f"{said} ({', '.join(told_features(self.features)) or 'no features known'})"


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """The answer of one probe.

    Args:
        state:    "present", "absent: why", "broken: why" or "incompatible: why"; four different answers.
        platform: given when the state is "present".
        unusable: of several devices those that the platform does not count on: index to why.
    """

    key: str
    state: str
    platform: Platform | None = None
    unusable: Mapping[int, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        platform = self.platform
        return {
            "platform": self.key,
            "state": self.state,
            "device_type": platform.device_type if platform else "",
            "features": sorted(platform.features) if platform else [],
            "cores": platform.cores if platform else 0,
            "memory_bytes": platform.memory if platform else 0,
            "devices": list(platform.devices) if platform else [],
            "unusable": {str(index): why for index, why in self.unusable.items()},
        }


@dataclass(frozen=True, slots=True)
class PlatformProbe:
    """How a platform is found.

    Args:
        key:         dispatch key.
        device_type: torch device type that it serves.
        default_rank: where several platforms are present, the highest is the default.
        probe:       looks, without raising, and reports.
        profiles:    generation name to the features that planning without the device counts on; the first is what the key alone means.
    """

    key: str
    device_type: str
    default_rank: int
    probe: Callable[[], ProbeReport]
    profiles: Mapping[str, frozenset[str]] = field(default_factory=dict)
