"""What a platform is: a dispatch key and a probed set of features, never a version floor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


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
    """

    key: str
    device_type: str
    features: frozenset[str]
    cores: int
    memory: int
    state: str = "present"


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """The answer of one probe.

    Args:
        state:    "present", "absent", "broken: why" or "incompatible: why"; four different answers.
        platform: given when the state is "present".
    """

    key: str
    state: str
    platform: Platform | None = None

    def as_dict(self) -> dict[str, Any]:
        platform = self.platform
        return {
            "platform": self.key,
            "state": self.state,
            "device_type": platform.device_type if platform else "",
            "features": sorted(platform.features) if platform else [],
            "cores": platform.cores if platform else 0,
            "memory_bytes": platform.memory if platform else 0,
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
