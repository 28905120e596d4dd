"""The Plan: a frozen, serializable table of what every checkpoint module means, made from headers alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from bitgrain.checkpoint.parts import Step
from bitgrain.formats.attention_schemes import KVCacheScheme
from bitgrain.formats.base import ModuleKind, Scheme
from bitgrain.grouping import ranges


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
        use:       how the architecture runs it, see formats.slots.ModuleSlot.
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
    use: str = ""

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
            **({"use": self.use} if self.use else {}),
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


@dataclass(frozen=True, slots=True)
class ExpertGroup:
    """Experts of one layer that are alike in everything that a kernel of experts asks.

    Args:
        layer:    name of the layer's experts, such as "model.layers.0.mlp.experts".
        members:  their indices, ascending.
        parts:    last segments of an expert's modules: gate, up, down.
        together: a kernel of experts may run them; else each of their modules runs by itself.
        why:      the reason.
        joint:    the module that holds gate and up of each where they are stored as one; "" where they are not.
    """

    layer: str
    members: tuple[int, ...]
    parts: tuple[str, str, str]
    together: bool
    why: str
    joint: str = ""

    def module(self, expert: int, part: str) -> str:
        return f"{self.layer}.{expert}.{part}"

    @property
    def gate_up(self) -> tuple[str, ...]:
        """Last segments of the modules that hold gate and up."""
        return (self.joint,) if self.joint else self.parts[:2]

    def as_dict(self) -> dict[str, Any]:
        return {"experts": f"{self.layer}.{ranges(self.members)}", "together": self.together, "why": self.why}


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
        modelling: whose modelling code runs the model: "bitgrain", "transformers 5.19.0", or "none: " and why.
        join:     how experts join gate and up, as kernels.base.Join describes it; "" where there are none.
    """

    format: str
    evidence: tuple[str, ...]
    modules: Mapping[str, ModulePlan]
    fusions: tuple[Fusion, ...] = ()
    ignored: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    join: str = ""
    modelling: str = ""

    @cached_property
    def expert_groups(self) -> Mapping[str, tuple[ExpertGroup, ...]]:
        """Layer of experts to its groups, by their first members; decided after fusion."""
        return group_experts(self.modules, self.fusions)

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
            **({"modelling": self.modelling} if self.modelling else {}),
            "modules": {name: module.as_dict() for name, module in self.modules.items()},
            "fusions": [fusion.as_dict() for fusion in self.fusions],
            **({"experts": [g.as_dict() for groups in self.expert_groups.values() for g in groups], "join": self.join} if self.expert_groups else {}),
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


def group_experts(modules: Mapping[str, ModulePlan], fusions: Sequence[Fusion]) -> dict[str, tuple[ExpertGroup, ...]]:
    """The groups of every layer of experts, of those whose gate and up share an input by `fusions`."""
    downs: dict[str, list[str]] = {}
    for row in modules.values():
        if row.kind is ModuleKind.EXPERT:
            downs.setdefault(row.name.rpartition(".")[0], []).append(row.name)
    layers: dict[str, dict[tuple[object, ...], list[int]]] = {}
    for fusion in fusions:
        stored = (fusion.joint,) if fusion.joint else fusion.modules
        prefix = stored[0].rpartition(".")[0]
        layer, _, index = prefix.rpartition(".")
        others = [name for name in downs.get(prefix, ()) if name not in stored]
        if len(fusion.modules) == 2 and len(others) == 1 and index.isdecimal():
            key = _expert_key([modules[name] for name in stored], modules[others[0]], fusion)
            layers.setdefault(layer, {}).setdefault(key, []).append(int(index))
    return {layer: _groups_of(layer, found) for layer, found in layers.items()}


def _expert_key(gate_up: list[ModulePlan], down: ModulePlan, fusion: Fusion) -> tuple[object, ...]:
    """(parts, joint module, why an expert's modules run by themselves or "", all that a kernel asks); experts with equal keys are alike."""
    gate, up = (name.rpartition(".")[2] for name in fusion.modules)
    parts, joint = (gate, up, down.name.rpartition(".")[2]), fusion.joint.rpartition(".")[2]
    first, last = gate_up[0].scheme, down.scheme
    why = "" if fusion.fused else f"gate and up are not one matrix: {fusion.why}"
    if not why and (first is None or first.transforms_input):
        why = "gate and up transform their input"
    if not why and (last is None or last.transforms_input):
        why = "down transforms its input"
    if not why and fusion.places not in ((), (0, 1)):
        why = "up is stored before gate"
    if why or first is None or last is None:
        return parts, joint, why
    specs = (first.weight_spec, last.weight_spec, first.activation.without_values(), last.activation.without_values())
    return parts, joint, why, *specs, gate_up[0].shape, down.shape, gate_up[0].has_bias, down.has_bias


def _groups_of(layer: str, found: Mapping[tuple[Any, ...], list[int]]) -> tuple[ExpertGroup, ...]:
    together = [members for key, members in found.items() if not key[2]]
    alike = "all are alike" if len(together) == 1 == len(found) else "alike, and not like the other experts of the layer"
    return tuple(ExpertGroup(layer, tuple(sorted(members)), key[0], not key[2], key[2] or alike, key[1]) for key, members in found.items())
