"""Experts that the library stacks, run by the layer of experts that models of ours have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from bitgrain.errors import RunError
from bitgrain.hosts.transformers.library import library_module
from bitgrain.layers.activation import ACTIVATIONS, Gate, Gated
from bitgrain.layers.builder import ModelBuilder
from bitgrain.layers.experts import Experts

_NEEDED = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "gate_up_proj", "down_proj", "_apply_gate")


@dataclass(frozen=True, slots=True)
class StackedExperts:
    """How a module of the library stacks its experts.

    Args:
        count, hidden, size: experts, K of gate and up, N of gate and up.
        transposed:   matrices lie [in, out].
        interleaved:  gate and up alternate.
        biased:       every projection has a bias.
    """

    count: int
    hidden: int
    size: int
    transposed: bool
    interleaved: bool
    biased: bool


def stacked_experts(module: Any) -> StackedExperts | None:
    """The layout of a module whose class follows the library's interface of experts; None for any other module."""
    if not all(hasattr(module, name) for name in _NEEDED) or not module.has_gate:
        return None
    own = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    expected = {"gate_up_proj", "down_proj"} | ({"gate_up_proj_bias", "down_proj_bias"} if module.has_bias else set())
    if set(own) != expected or any(len(own[name]) != 3 for name in ("gate_up_proj", "down_proj")) or len(list(module.children())) > 1:
        return None
    count, rows, columns = own["gate_up_proj"]
    if module.is_transposed:
        rows, columns = columns, rows
    down = (count, rows // 2, columns) if module.is_transposed else (count, columns, rows // 2)
    if rows % 2 or own["down_proj"] != down:
        return None
    return StackedExperts(count, columns, rows // 2, module.is_transposed, not module.is_concatenated, module.has_bias)


class HostedGate:
    """How a module of the library joins gate and up, by its own function."""

    def __init__(self, module: Any) -> None:
        self.function, self.interleaved = module._apply_gate, not module.is_concatenated
        self.name = f"{type(module).__name__}, by its own function"

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        joined = torch.stack((gate, up), -1).flatten(-2) if self.interleaved else torch.cat((gate, up), -1)
        result: Tensor = self.function(joined)
        return result

    def describe(self) -> str:
        return self.name


def gate_of(module: Any) -> Gate | HostedGate:
    """The join of a module's experts: one that kernels know where the library's is that one, else the module's own function."""
    default = library_module("integrations.moe")._default_apply_gate
    known = library_module("activations").ACT2FN
    for name in ACTIVATIONS:
        if type(module)._apply_gate is default and name in known and _same_function(module.act_fn, known[name]):
            return Gated(name)
    return HostedGate(module)


def _same_function(one: Any, other: Any) -> bool:
    return type(one) is type(other) and getattr(one, "__dict__", None) is not None and one.extra_repr() == other.extra_repr()


class HostedExperts(nn.Module):
    """y[m] = sum over places p of weight[m, p] * expert_{chosen[m, p]}(x[m]): a class that stands before the library's own."""

    experts: Experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[M, K] for x [M, K], expert indices and weights [M, places]."""
        if top_k_index.numel() and int(top_k_index.max()) >= self.experts.count:
            raise RunError("experts", f"the router chose expert {int(top_k_index.max())}", f"indices below {self.experts.count}", "run this checkpoint with another program")
        out: Tensor = self.experts(hidden_states, top_k_weights, top_k_index)
        return out


def host_experts(module: Any, builder: ModelBuilder, name: str) -> None:
    """Turn a module of stacked experts into one that runs those that the plan has under `name`."""
    count, join = module.down_proj.shape[0], cast(Gate, gate_of(module))
    for local in list(module._parameters):
        module._parameters.pop(local)
    module.__class__ = type(f"Hosted{type(module).__name__}", (HostedExperts, type(module)), {})
    module.experts = Experts(builder, name, count, join)
