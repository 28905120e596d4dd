"""Settings of a configuration under which the stored tensors alone would give wrong numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitgrain.checkpoint.headers import FLOAT_CODES
from bitgrain.errors import BitgrainError, ConfigError
from bitgrain.formats.compressed_tensors.names import QUANTIZED_NAMES, WHERE
from bitgrain.formats.evidence import Evidence

STATUSES = ("initialized", "calibration", "frozen", "compressed", "decompressed")


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
