"""What detection looks at, and how strongly a format claims a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bitgrain.checkpoint.headers import TensorHeader

# What Evidence.read_small may read: descriptions, never weights.
SMALL_BYTES = 65_536


def _nothing_to_read(name: str) -> Tensor:
    raise KeyError(name)


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that detection may look at: headers, JSON, and tensors that are descriptions themselves.

    Args:
        config:     config.json (empty if there is none).
        quantization: the quantization section of config.json, wherever it stood; None if there is none.
        sidecars:   file name to contents of the other quantization configuration files.
        tensors:    every tensor header by full name.
        suffixes:   local tensor name to one example of a full name.
        metadata:   file name to the string metadata of its header.
        properties: typed key-value metadata of a container that describes its model itself; empty for any other.
        read_small: full name to a stored tensor of at most SMALL_BYTES: for tensors that describe others (shapes, bits).
    """

    config: Mapping[str, Any]
    quantization: Mapping[str, Any] | None
    sidecars: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, TensorHeader]
    suffixes: Mapping[str, str]
    metadata: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    read_small: Callable[[str], Tensor] = field(default=_nothing_to_read)
    properties: Mapping[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> str | None:
        """`quant_method` in lower case with dashes, from config.json or else from a sidecar."""
        for section in (self.quantization, *self.sidecars.values()):
            value = (section or {}).get("quant_method")
            if isinstance(value, str):
                return value.lower().replace("_", "-")
        return None

    def settings(self) -> dict[str, Any]:
        """The quantization keys of config.json and all sidecars together (they were checked to agree)."""
        merged: dict[str, Any] = {}
        for section in (*self.sidecars.values(), self.quantization or {}):
            merged.update(section)
        return merged


@dataclass(frozen=True, slots=True)
class Detection:
    """How strongly a format claims a checkpoint, and why.

    Args:
        score: 0 (no) to 100; a named quant_method is 100, a sidecar 80, tensor names alone 50, nothing quantized 1.
    """

    score: int
    reasons: tuple[str, ...]
