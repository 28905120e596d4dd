"""The one place where operators are looked up, by name: torch_npu's on a device, the models of their contracts elsewhere."""

from __future__ import annotations

from typing import Any

from bitgrain.kernels.npu import contracts
from bitgrain.platforms.probe import probe, target

# Said wherever these kernels' results are shown; a record of a run on a device replaces it in the support matrix.
PROOF = "contract-tested; not run on hardware"
# a generation whose products take no scale per token and no groups
OLD = "310p"


def operators(platform: str) -> Any:
    """What has the operators as attributes: the package where a device is present, else bitgrain.kernels.npu.contracts.

    What runs without a device runs on the host's tensors: a simulated platform, or the test of a kernel that is only planned with.
    """
    if target(platform).state != "present":
        return contracts
    import torch_npu  # type: ignore[import-not-found,unused-ignore]

    return torch_npu


def features(platform: str) -> frozenset[str]:
    """What the device has, by name."""
    return target(platform).features


def missing(platform: str, *names: str) -> str:
    """Why operators cannot be called; empty when all are registered (or have a model, where the device is simulated)."""
    found = target(platform)
    if found.state == "simulated":
        absent = [name for name in names if name not in contracts.__all__]
        return f"there is no model of {', '.join(absent)}" if absent else ""
    absent = [name for name in names if f"op:npu::{name}" not in found.features]
    return f"operators that are not registered: {', '.join(absent)}" if absent else ""


def state(platform: str, *names: str) -> str:
    """ "available (how it was tested)", or why not."""
    if target(platform).state == "planned":
        return f"the device is {probe(platform).state}"
    return missing(platform, *names) or f"available ({PROOF})"


class NpuKernel:
    """What every kernel here says of itself; one instance serves one platform.

    needs: names of the operators that it calls.
    """

    rank = 60
    proof = PROOF
    needs: tuple[str, ...] = ()

    def __init__(self, platform: str) -> None:
        self.platform = platform

    def state(self) -> str:
        """ "available (how it was tested)", or why not."""
        return self._lacking() or state(self.platform, *self.needs)

    def _lacking(self) -> str:
        """What the device itself lacks; empty where there is nothing."""
        return ""
