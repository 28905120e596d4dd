"""One small tile of every operation: what a kernel gives on its device, and what the reference gives on the host.

Tiles run in microseconds and still have ragged edges.  Each function returns pairs (got, wanted) of float32 host tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bitgrain.kernels.base import (
    EmbeddingProblem,
    ExpertsProblem,
    HadamardProblem,
    Kernel,
    LinearProblem,
    PreparedExperts,
    Problem,
    StepProblem,
)
from bitgrain.kernels.reference.attention import ReferenceAttention
from bitgrain.kernels.reference.experts import ReferenceExperts
from bitgrain.kernels.reference.step import ReferenceGate, ReferenceNorm, ReferenceRotary
from bitgrain.kernels.samples import join_of, sample_expert, sample_experts, sample_routing
from bitgrain.numerics.gates import parse_gate
from bitgrain.weights import NO_ACTIVATION, Hadamard
from bitgrain.weights.synthetic import block_of, sample_activation, sample_weight

ROWS, EXPERTS = 3, 4
# Heads of queries and of keys, tokens of the cache, and the sizes of rows where a problem leaves them open.
HEADS, GROUPS, TOKENS, ANY_SIZE = 4, 2, 7, 40

Pairs = list[tuple[Tensor, Tensor]]


def trial(problem: Problem) -> Callable[[Kernel, str], Pairs] | None:
    """What tries a kernel on a device with a tile of the problem; None where nothing here can make one."""
    if isinstance(problem, LinearProblem):
        return lambda kernel, device: _linear(kernel, problem, device)
    if isinstance(problem, ExpertsProblem):
        return (lambda kernel, device: _experts(kernel, problem, device)) if parse_gate(problem.join) else None
    if isinstance(problem, EmbeddingProblem):
        return lambda kernel, device: _embedding(kernel, problem, device)
    if isinstance(problem, HadamardProblem):
        return lambda kernel, device: _hadamard(kernel, problem, device)
    step = _STEPS.get(problem.operation)
    if step is None or not isinstance(problem, StepProblem) or (problem.operation == "gate" and parse_gate(problem.detail) is None):
        return None
    return lambda kernel, device: step(kernel, problem, device)


def tile_of(problem: Problem) -> Problem:
    """The same problem at a size that runs in microseconds and still has a ragged edge."""
    if isinstance(problem, LinearProblem):
        return _linear_tile(problem)
    if isinstance(problem, ExpertsProblem):
        first, second = (_linear_tile(linear) for linear in problem.linears)
        return replace(problem, count=min(problem.count, EXPERTS), hidden=first.k, size=second.k, max_rows=0)
    if isinstance(problem, EmbeddingProblem):
        tile = _linear_tile(LinearProblem(problem.weight, NO_ACTIVATION, problem.n, problem.k, problem.dtype))
        return replace(problem, n=tile.n, k=tile.k)
    return problem


def _linear_tile(problem: LinearProblem) -> LinearProblem:
    step = max(problem.weight.group_size, problem.weight.block[1], 32)
    rows, columns = block_of(problem.weight)
    n, k = -(-80 // rows) * rows, -(-2 * step // columns) * columns
    return replace(problem, n=min(problem.n, n), k=min(problem.k, k), max_rows=0)


def _random(*shape: int, dtype: str, seed: int = 1) -> Tensor:
    x: Tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))
    return x


def _pair(got: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    return got.float().cpu(), wanted.float()


def _linear(kernel: Kernel, problem: LinearProblem, device: str) -> Pairs:
    tile = _linear_tile(problem)
    if kernel.refusal(tile) is not None:
        tile = problem
    weight = sample_weight(tile.weight, tile.n, tile.k)
    activation = sample_activation(tile.activation)
    x = _random(ROWS, tile.k, dtype=tile.dtype)
    prepared = kernel.prepare(weight.map_tensors(lambda t: t.to(device)), activation)
    wanted = torch.nn.functional.linear(activation.fake_quantize(x), weight.dequantize())
    return [_pair(kernel.apply(x.to(device), prepared, None), wanted)]


def _experts(kernel: Kernel, problem: ExpertsProblem, device: str) -> Pairs:
    tile = tile_of(problem)
    assert isinstance(tile, ExpertsProblem)
    if kernel.refusal(tile) is not None:
        tile = replace(problem, count=tile.count, max_rows=0)
    x = _random(ROWS, tile.hidden, dtype=tile.dtype)
    weight, chosen = sample_routing(ROWS, tile.count, min(2, tile.count))
    weight = weight.to(x.dtype)
    floor = ReferenceExperts()
    wanted = floor.apply(x, weight, chosen, sample_experts(floor, tile))
    return [_pair(kernel.apply(x.to(device), weight.to(device), chosen.to(device), _prepared_experts(kernel, tile, device)), wanted)]


def _prepared_experts(kernel: Kernel, tile: ExpertsProblem, device: str) -> PreparedExperts:
    experts = []
    for index in range(tile.count):
        gate_up, down, first, second, *biases = sample_expert(tile, index)
        gate_up, down = (weight.map_tensors(lambda t: t.to(device)) for weight in (gate_up, down))
        experts.append(kernel.prepare(gate_up, down, first, second, *(None if b is None else b.to(device) for b in biases)))
    prepared: PreparedExperts = kernel.assemble(experts, join_of(tile))
    return prepared


def _embedding(kernel: Kernel, problem: EmbeddingProblem, device: str) -> Pairs:
    tile = tile_of(problem)
    assert isinstance(tile, EmbeddingProblem)
    if kernel.refusal(tile) is not None:
        tile = problem
    weight, dtype = sample_weight(tile.weight, tile.n, tile.k), getattr(torch, tile.dtype)
    index = torch.tensor([tile.n - 1, 0, tile.n // 2])
    prepared = kernel.prepare(weight.map_tensors(lambda t: t.to(device)), NO_ACTIVATION)
    return [_pair(kernel.apply(index.to(device), prepared, dtype), weight.gather_rows(index).to(dtype))]


def _hadamard(kernel: Kernel, problem: HadamardProblem, device: str) -> Pairs:
    base = None
    if problem.order > 1:
        base = torch.where(_random(problem.order, problem.order, dtype="float32", seed=2) < 0, -1.0, 1.0)
    x = _random(ROWS, 2 * problem.size, dtype=problem.dtype)
    pairs = []
    for transpose in (False, True):
        transform = Hadamard(problem.size, base, problem.size**-0.5, transpose)
        prepared = kernel.prepare(transform.map_tensors(lambda t: t.to(device)))
        pairs.append(_pair(kernel.apply(x.to(device), prepared), transform.apply(x)))
    return pairs


def _step(kernel: Kernel, floor: Kernel, device: str, *arguments: object) -> tuple[Tensor, Tensor]:
    moved = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
    return _pair(kernel.apply(*moved), floor.apply(*arguments))


def _norm(kernel: Kernel, problem: StepProblem, device: str) -> Pairs:
    size = problem.size or ANY_SIZE
    x, weight, bias = (_random(*shape, dtype=problem.dtype, seed=i) for i, shape in enumerate(((ROWS, size), (size,), (size,))))
    plain = _step(kernel, ReferenceNorm(), device, x, weight, None, 1e-5, False)
    wide = _step(kernel, ReferenceNorm(), device, x, weight.float(), bias, 1e-5, True)
    return [plain, wide]


def _rotary(kernel: Kernel, problem: StepProblem, device: str) -> Pairs:
    size = problem.size or ANY_SIZE
    x = _random(ROWS, HEADS, size, dtype=problem.dtype)
    pairs = []
    for turned, interleaved in ((size, False), (max(2, size // 4 * 2), True)):
        angle = _random(ROWS, 1, turned // 2, dtype="float32", seed=2)
        both = torch.stack((angle, angle), -1).flatten(-2) if interleaved else torch.cat((angle, angle), -1)
        cosine, sine = both.cos().to(x.dtype), both.sin().to(x.dtype)
        pairs.append(_step(kernel, ReferenceRotary(), device, x, cosine, sine, interleaved))
    return pairs


def _gate(kernel: Kernel, problem: StepProblem, device: str) -> Pairs:
    gate, up = (_random(ROWS, problem.size or ANY_SIZE, dtype=problem.dtype, seed=seed) for seed in (1, 2))
    return [_step(kernel, ReferenceGate(), device, parse_gate(problem.detail), gate, up)]


def _attention(kernel: Kernel, problem: StepProblem, device: str) -> Pairs:
    size = problem.size or ANY_SIZE
    q = _random(ROWS, HEADS, size, dtype=problem.dtype)
    keys, values = (_random(TOKENS, GROUPS, size, dtype=problem.dtype, seed=seed) for seed in (2, 3))
    sinks = _random(HEADS, dtype=problem.dtype, seed=4)
    rows: Sequence[tuple[object, ...]] = ((q[-1:], keys, values, None, None, None, None), (q, keys, values, 2, sinks, None, None), (q, keys, values, None, None, 0.5, 4.0))
    return [_step(kernel, ReferenceAttention(), device, *row) for row in rows]


_STEPS: dict[str, Callable[[Kernel, StepProblem, str], Pairs]] = {"norm": _norm, "rotary": _rotary, "gate": _gate, "attention": _attention}
