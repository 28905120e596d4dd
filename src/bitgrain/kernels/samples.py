"""Experts with random weights and random routing, for self-tests, conformance tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.errors import LayoutError
from bitgrain.kernels.base import ExpertsKernel, ExpertsProblem, Join, PreparedExperts
from bitgrain.numerics.gates import parse_gate
from bitgrain.weights import ActivationSpec, Weight
from bitgrain.weights.synthetic import sample_activation, sample_weight

# (gate and up, down, their activations with values, their biases) of one expert
Expert = tuple[Weight, Weight, ActivationSpec, ActivationSpec, Tensor | None, Tensor | None]


def sample_expert(problem: ExpertsProblem, index: int) -> Expert:
    """A random expert that poses `problem`: what ExpertsKernel.prepare() takes.  Experts differ in everything that data may differ in."""
    gate_up = sample_weight(problem.gate_up, 2 * problem.size, problem.hidden, 2 * index)
    down = sample_weight(problem.down, problem.hidden, problem.size, 2 * index + 1)
    dtype, generator = getattr(torch, problem.dtype), torch.Generator().manual_seed(index)
    biases = [torch.randn(n, generator=generator).to(dtype) / 4 if problem.biased else None for n in (2 * problem.size, problem.hidden)]
    return gate_up, down, sample_activation(problem.gate_up_activation), sample_activation(problem.down_activation), biases[0], biases[1]


def join_of(problem: ExpertsProblem) -> Join:
    """The join that the problem names.

    Raises:
        LayoutError: a name that numerics.gates does not have.
    """
    gate = parse_gate(problem.join)
    if gate is None:
        raise LayoutError("experts", f"join {problem.join!r}", "one that numerics.gates describes", "add it there")
    return gate


def sample_experts(kernel: ExpertsKernel, problem: ExpertsProblem) -> PreparedExperts:
    """All experts of a problem, prepared for a kernel."""
    return kernel.assemble([kernel.prepare(*sample_expert(problem, index)) for index in range(problem.count)], join_of(problem))


def sample_routing(rows: int, count: int, per_token: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    """(weights float32 that sum to 1, int64 experts, distinct in each row), each [rows, per_token]."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(rows, count, generator=generator).argsort(1)[:, :per_token]
    return torch.rand(rows, per_token, generator=generator).softmax(-1), chosen
