"""The Plan: a frozen, serializable table of what every checkpoint module means, made from headers alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from bitgrain.checkpoint.parts import Step
from bitgrain.formats.attention_schemes import KVCacheScheme
from bitgrain.formats.base import ModuleKind, Scheme


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """One row of the plan.

    Args:
        name:      checkpoint module name.
        kind:      what the module is.
        scheme:    what its tensors mean; None for vectors and attention modules.
        kv_cache:  for attention modules: what the checkpoint says of the cache.
        shape:     (N, K), or the shape of a vector.
        tensors:   full names of the tensors that belong to it.
        locals:    their local names, in the same order.
        files:     files that hold them.
        nbytes:    stored bytes of all of them.
        why:       the rule or evidence that chose the scheme.
        tied_to:   module whose weight this one shares; it has no tensors of its own then.
        has_bias:  a bias is stored.
        sources:   stored tensors that `tensors` are parts of, in the same order; empty where each is one of its own.
        steps:     how each part is taken from its source; empty for all of it.
    """

    name: str
    kind: ModuleKind
    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    locals: tuple[str, ...]
    files: tuple[str, ...]
    nbytes: int
    why: str
    scheme: Scheme | None = None
    kv_cache: KVCacheScheme | None = None
    tied_to: str | None = None
    has_bias: bool = False
    sources: tuple[str, ...] = ()
    steps: tuple[tuple[Step, ...], ...] = ()

    @property
    def label(self) -> str:
        """The scheme in words."""
        if self.tied_to is not None:
            return f"tied to {self.tied_to}"
        if self.scheme is not None:
            return self.scheme.label
        if self.kv_cache is not None:
            return f"KV cache {self.kv_cache.describe()}"
        return "as stored"

    @property
    def elements(self) -> int:
        """Number of weights (a bias not counted)."""
        count = 1
        for size in self.shape:
            count *= size
        return 0 if self.kind is ModuleKind.ATTENTION or self.tied_to else count

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element, scales and zero points included."""
        return 8.0 * self.nbytes / self.elements if self.elements else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind.value,
            "scheme": self.label,
            "shape": list(self.shape),
            "tensors": list(self.tensors),
            "files": list(self.files),
            "bytes": self.nbytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "why": self.why,
            "tied_to": self.tied_to,
            **({"parts_of": sorted(set(self.sources))} if any(self.steps) else {}),
            **({"shares": sorted(set(self.sources) - set(self.tensors))} if self.sources and not any(self.steps) else {}),
        }


@dataclass(frozen=True, slots=True)
class Fusion:
    """Modules with one input, and whether they may become one matrix.

    Args:
        joint:  the module that stands for all of them where the checkpoint stores them as one; "" where it does not.
        places: where each of them stands in it.
        heights: N of each part of it, in stored order.
    """

    modules: tuple[str, ...]
    fused: bool
    why: str
    joint: str = ""
    places: tuple[int, ...] = ()
    heights: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        stored = {"stored_as": self.joint} if self.joint else {}
        return {"modules": list(self.modules), "fused": self.fused, "why": self.why, **stored}


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before data is read.

    Args:
        format:   canonical name of the format that claimed the checkpoint.
        evidence: why.
        modules:  checkpoint module name to its row, in checkpoint order.
        fusions:  groups of modules that share an input.
        ignored:  tensor name to the rule under which it is left out.
        notes:    decisions that a reader should know: rules that matched nothing, files left out.
    """

    format: str
    evidence: tuple[str, ...]
    modules: Mapping[str, ModulePlan]
    fusions: tuple[Fusion, ...] = ()
    ignored: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @cached_property
    def totals(self) -> dict[str, Any]:
        """Modules, parameters, stored bytes and bits per weight; and the same per scheme."""
        by_scheme: dict[str, dict[str, int]] = {}
        for module in self.modules.values():
            row = by_scheme.setdefault(module.label, {"modules": 0, "parameters": 0, "bytes": 0})
            row["modules"] += 1
            row["parameters"] += module.elements
            row["bytes"] += module.nbytes
        parameters = sum(r["parameters"] for r in by_scheme.values())
        nbytes = sum(r["bytes"] for r in by_scheme.values())
        return {
            "modules": len(self.modules),
            "parameters": parameters,
            "bytes": nbytes,
            "bits_per_weight": round(8 * nbytes / parameters, 4) if parameters else 0.0,
            "schemes": by_scheme,
        }

    def as_dict(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "evidence": list(self.evidence),
            "modules": {name: module.as_dict() for name, module in self.modules.items()},
            "fusions": [fusion.as_dict() for fusion in self.fusions],
            "ignored": dict(self.ignored),
            "notes": list(self.notes),
            "totals": self.totals,
        }

    def to_json(self, indent: int | None = None) -> str:
        """The whole table; the same checkpoint gives the same text on every machine."""
        return json.dumps(self.as_dict(), indent=indent, sort_keys=indent is None)

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of the JSON without spaces: names what was decided, for records."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()
