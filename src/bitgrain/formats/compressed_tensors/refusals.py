"""Settings of a configuration under which the stored tensors alone would give wrong numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitgrain.checkpoint.headers import FLOAT_CODES
from bitgrain.errors import BitgrainError, ConfigError
from bitgrain.formats.compressed_tensors.names import QUANTIZED_NAMES, WHERE
from bitgrain.formats.evidence import Evidence

STATUSES = ("initialized", "calibration", "frozen", "compressed", "decompressed")
# Transforms at these places are already part of the stored weights.
OFFLINE_LOCATIONS = ("weight_input", "weight_output")


def transform_problems(settings: Mapping[str, Any]) -> list[BitgrainError]:
    """Online transforms: reading on without them would give wrong numbers."""
    problems: list[BitgrainError] = []
    transforms = settings.get("transform_config") or {}
    groups = transforms.get("config_groups") or {} if isinstance(transforms, Mapping) else None
    if not isinstance(groups, Mapping):
        return [ConfigError(f"{WHERE}.transform_config", repr(transforms), "an object of groups", "correct the configuration")]
    for name, group in groups.items():
        places = _online_places(group)
        if places:
            problems.append(
                ConfigError(
                    f"{WHERE}.transform_config.config_groups.{name}",
                    f"a transform at run time ({', '.join(places)}): {group!r}",
                    f"transforms that are part of the stored weights ({', '.join(OFFLINE_LOCATIONS)})",
                    "online transforms are not supported by this version",
                )
            )
    return problems


def _online_places(group: Any) -> list[str]:
    """Where a transform works on activations; what cannot be read counts as such a place."""
    applied = group.get("apply") if isinstance(group, Mapping) else None
    if not isinstance(applied, list) or not all(isinstance(a, Mapping) for a in applied):
        return ["unreadable"]
    return sorted({str(a.get("location")) for a in applied} - set(OFFLINE_LOCATIONS))


def status_problems(settings: Mapping[str, Any], evidence: Evidence) -> list[BitgrainError]:
    """A checkpoint that was not compressed holds float weights; scales beside them mean rounding at run time.

    Early releases wrote "frozen" into compressed checkpoints too, so there only float weights beside scales tell.
    """
    status = settings.get("quantization_status")
    if status is not None and status not in STATUSES:
        return [ConfigError(f"{WHERE}.quantization_status", repr(status), f"one of {', '.join(STATUSES)}", "correct the configuration")]
    if status in (None, "compressed"):
        return []
    named = (name for name in evidence.tensors if name.rpartition(".")[2] in QUANTIZED_NAMES)
    if status == "frozen":
        named = (name for name in named if _weight_is_float(evidence, name))
    found = min(named, default=None)
    if found is None:
        return []
    return [
        ConfigError(
            f"{WHERE}.quantization_status",
            f"{status!r}, and quantization tensors such as {found}",
            "'compressed', or dense weights without quantization tensors",
            "save the model compressed; weights that are rounded at run time are not supported by this version",
        )
    ]


def _weight_is_float(evidence: Evidence, name: str) -> bool:
    """Whether the module of a quantization tensor stores its weight as 16- or 32-bit floats."""
    weight = evidence.tensors.get(f"{name.rpartition('.')[0]}.weight")
    return weight is not None and weight.dtype in FLOAT_CODES
