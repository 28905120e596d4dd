"""One case of one kernel: how far its result is from the definition, over how far it may be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from bitgrain.conformance import definitions
from bitgrain.conformance.cases import MANY_ROWS, Case
from bitgrain.conformance.tolerances import HADAMARD, STEP, STEP_FACTORS, allowed, allowed_of_experts
from bitgrain.kernels.base import EmbeddingProblem, ExpertsProblem, HadamardProblem, Kernel, LinearProblem, StepProblem
from bitgrain.kernels.samples import join_of, sample_expert, sample_routing
from bitgrain.numerics.gates import parse_gate
from bitgrain.platforms.probe import HOST_TYPE
from bitgrain.weights import Hadamard, Weight, WeightSpec
from bitgrain.weights.synthetic import sample_weight


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one case gave.

    Args:
        error:   the largest difference from the definition, over the one that is allowed: at most 1 where the kernel conforms.
        problem: what is wrong, in one line; empty where nothing is.
    """

    error: float
    problem: str = ""


class _Nonconformance(Exception):
    """What is wrong with a result, besides its distance."""


def check(kernel: Kernel, case: Case, device: str) -> Outcome:
    """Run one case on a torch device and compare with the definition, which runs on the host.

    Whatever the kernel raises is an outcome.
    """
    try:
        ratio = _CHECKS[case.problem.operation](kernel, case, torch.device(device))
    except _Nonconformance as wrong:
        return Outcome(math.inf, str(wrong))
    except Exception as error:  # a kernel under test may raise anything, and the others are to be tested still
        return Outcome(math.inf, f"raised {type(error).__name__}: {error}")
    return Outcome(ratio, "" if ratio <= 1 else f"differs from the definition by {ratio:.3g} times what is allowed")


def _random(case: Case, *shape: int, place: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random values of a case; each of its tensors has a place."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(case.seed + 1000 * place)).to(dtype)


def _moved(device: torch.device, *tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.to(device) for t in tensors]


def _result(got: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """float64, on the host."""
    if got.device.type != device.type or got.dtype != dtype or tuple(got.shape) != shape:
        wanted = f"{str(dtype).removeprefix('torch.')} {list(shape)} on {device.type}"
        raise _Nonconformance(f"gave {str(got.dtype).removeprefix('torch.')} {list(got.shape)} on {got.device.type}, not {wanted}")
    return got.to(HOST_TYPE).double()


def _worst(difference: Tensor) -> float:
    """The largest of a tensor; infinite where one is no number, 0 of none."""
    return 0.0 if difference.numel() == 0 else float(difference.nan_to_num(nan=math.inf, posinf=math.inf).max())


def _rows_apart(got: Tensor, want: Tensor) -> Tensor:
    """[M]: the largest difference of a row, relative to the largest entry of its definition."""
    if want.numel() == 0:
        return want.new_zeros(0)
    return (got - want).abs().amax(-1) / want.abs().amax(-1).clamp(min=1e-30)


def _same_again(run: Callable[[], Tensor], first: Tensor) -> None:
    if not torch.equal(run().to(HOST_TYPE), first.to(HOST_TYPE)):
        raise _Nonconformance("gave other bits when it ran the same again")


@lru_cache(maxsize=8)
def _sampled(spec: WeightSpec, n: int, k: int) -> tuple[Weight, Tensor]:
    """A random weight and its values, float64; cases of one weight follow each other."""
    weight = sample_weight(spec, n, k)
    return weight, weight.dequantize().double()


def _linear(kernel: Kernel, case: Case, device: torch.device) -> float:
    """options: bias; with MANY_ROWS the same input must give the same bits twice."""
    problem = case.problem
    assert isinstance(problem, LinearProblem)
    (weight, values), dtype = _sampled(problem.weight, problem.n, problem.k), getattr(torch, problem.dtype)
    x = _random(case, case.rows, problem.k, dtype=dtype)
    bias = _random(case, problem.n, place=1, dtype=dtype) if case.options.get("bias") else None
    there = _moved(device, x, bias)
    prepared = kernel.prepare(weight.map_tensors(lambda tensor: tensor.to(device)), case.activation)
    result = kernel.apply(there[0], prepared, there[1])
    got = _result(result, dtype, (case.rows, problem.n), device)
    if case.rows == MANY_ROWS:
        _same_again(lambda: kernel.apply(there[0], prepared, there[1]), result)
    want = definitions.linear(x, values, case.activation, bias)
    return _worst(_rows_apart(got, want)) / allowed(problem.dtype, kernel.fidelity(problem).value)


def _embedding(kernel: Kernel, case: Case, device: torch.device) -> float:
    """Rows must equal the definition."""
    problem = case.problem
    assert isinstance(problem, EmbeddingProblem)
    (weight, values), dtype = _sampled(problem.weight, problem.n, problem.k), getattr(torch, problem.dtype)
    index = (torch.tensor([3, 0, problem.n - 1, 3]) if case.rows else torch.zeros(0)).long()
    prepared = kernel.prepare(weight.map_tensors(lambda tensor: tensor.to(device)), case.activation)
    got = _result(kernel.apply(index.to(device), prepared, dtype), dtype, (len(index), problem.k), device)
    want = values[index].to(dtype).double()
    return 0.0 if torch.equal(got, want) else 1 + _worst((got - want).abs())


def _experts(kernel: Kernel, case: Case, device: torch.device) -> float:
    """options: per token; places without an expert; alone (a row gives the same bits without the others, and again)."""
    problem = case.problem
    assert isinstance(problem, ExpertsProblem)
    dtype, per_token = getattr(torch, problem.dtype), case.options["per token"]
    x = _random(case, case.rows, problem.hidden, dtype=dtype)
    weight, chosen = sample_routing(case.rows, problem.count, per_token)
    weight = weight.to(dtype)
    if case.options.get("places without an expert"):
        chosen[1, 0], chosen[2] = -1, -1
    prepared = _prepared_experts(kernel, problem, device)
    run = partial(_run_experts, kernel, prepared, _moved(device, x, weight, chosen))
    result = run(slice(None))
    got = _result(result, dtype, (case.rows, problem.hidden), device)
    if case.options.get("alone") and kernel.rank > 0:  # torch's own sums, which the floor has, depend on the number of rows
        _same_again(lambda: run(slice(None)), result)
        for row in (0, case.rows // 2, case.rows - 1):
            _rows_alone(run, row, result)
    if case.rows == 0:
        return 0.0
    want, size = definitions.experts(problem, x, weight, chosen)
    apart = ((got - want).abs() / size.clamp(min=1e-30)).amax(1).nan_to_num(nan=math.inf)
    own, flipped = allowed_of_experts(problem, kernel.fidelity(problem).value)
    # a value between the products that lies near the border of two codes may fall on the other side, in few rows
    strict = 1.0 if flipped == own else 0.75 if problem.dtype == "float32" and case.rows > 1 else 0.0
    enough = math.ceil(strict * len(apart))
    typical = float(apart.sort().values[enough - 1]) / own if enough else 0.0
    return max(_worst(apart) / flipped, typical)


def _prepared_experts(kernel: Kernel, problem: ExpertsProblem, device: torch.device) -> Any:
    prepared = []
    for index in range(problem.count):
        gate_up, down, first, second, bias, down_bias = sample_expert(problem, index)
        gate_up, down = (w.map_tensors(lambda tensor: tensor.to(device)) for w in (gate_up, down))
        prepared.append(kernel.prepare(gate_up, down, first, second, *_moved(device, bias, down_bias)))
    return kernel.assemble(prepared, join_of(problem))


def _run_experts(kernel: Kernel, prepared: Any, inputs: list[Tensor], rows: slice) -> Tensor:
    x, weight, chosen = inputs
    y: Tensor = kernel.apply(x[rows], weight[rows], chosen[rows], prepared)
    return y


def _rows_alone(run: Callable[[slice], Tensor], row: int, whole: Tensor) -> None:
    if not torch.equal(run(slice(row, row + 1)).to(HOST_TYPE), whole[row : row + 1].to(HOST_TYPE)):
        raise _Nonconformance(f"row {row} has other bits when it is alone")


def _hadamard(kernel: Kernel, case: Case, device: torch.device) -> float:
    """options: blocks of a row; transpose."""
    problem = case.problem
    assert isinstance(problem, HadamardProblem)
    order, dtype = problem.order, getattr(torch, problem.dtype)
    base = None if order == 1 else torch.randint(0, 2, (order, order), generator=torch.Generator().manual_seed(case.seed)).float() * 2 - 1
    transform = Hadamard(problem.size, base, problem.size**-0.5, case.options["transpose"])
    x = _random(case, case.rows, problem.size * case.options["blocks"], dtype=dtype)
    prepared = kernel.prepare(transform.map_tensors(lambda tensor: tensor.to(device)))
    got = _result(kernel.apply(x.to(device), prepared), dtype, tuple(x.shape), device)
    return _worst(_rows_apart(got, transform.apply(x.double()))) / HADAMARD[problem.dtype]


def _step(kernel: Kernel, case: Case, device: torch.device) -> float:
    problem = case.problem
    assert isinstance(problem, StepProblem)
    dtype = getattr(torch, problem.dtype)
    inputs, want = _STEPS[problem.operation](case, dtype)
    there = [v.to(device) if isinstance(v, Tensor) else v for v in inputs]
    got = _result(kernel.apply(*there), dtype, tuple(want.shape), device)
    if want.numel() == 0:
        return 0.0
    size = 1 + (want.abs().amax(-1, keepdim=True) if problem.operation == "rotary" else want.abs())
    return _worst((got - want).abs() / size) / (STEP[problem.dtype] * STEP_FACTORS[problem.operation])


def _norm(case: Case, dtype: torch.dtype) -> tuple[tuple[Any, ...], Tensor]:
    """options: wide, float32 weight, bias."""
    size = case.problem.size  # type: ignore[union-attr]
    weight = _random(case, size, place=1, dtype=torch.float32 if case.options["float32 weight"] else dtype)
    bias = _random(case, size, place=2, dtype=dtype) if case.options["bias"] else None
    inputs = (3 * _random(case, case.rows, size, dtype=dtype), weight, bias, 1e-5, case.options["wide"])
    return inputs, definitions.norm(*inputs)


def _rotary(case: Case, dtype: torch.dtype) -> tuple[tuple[Any, ...], Tensor]:
    """options: heads, turned, interleaved; x is a part of wider rows, as queries are of a joint product."""
    heads, turned, size = case.options["heads"], case.options["turned"], case.problem.size  # type: ignore[union-attr]
    x = _random(case, case.rows, heads * size + 24, dtype=dtype)[:, 8 : 8 + heads * size].unflatten(1, (heads, size))
    angles = _random(case, case.rows, 1, turned, place=1) * 3
    inputs = (x, angles.cos().to(dtype), angles.sin().to(dtype), case.options["interleaved"])
    return inputs, definitions.rotary(*inputs)


def _gate(case: Case, dtype: torch.dtype) -> tuple[tuple[Any, ...], Tensor]:
    """options: columns; gate and up are halves of one product."""
    join = parse_gate(case.problem.detail)  # type: ignore[union-attr]
    assert join is not None
    gate, up = (3 * _random(case, case.rows, 2 * case.options["columns"], dtype=dtype)).chunk(2, dim=-1)
    return (join, gate, up), join(gate.double(), up.double())


def _attention(case: Case, dtype: torch.dtype) -> tuple[tuple[Any, ...], Tensor]:
    """options: tokens in the cache, heads, groups, entries of a head and of a value, window, sinks, cap."""
    o = case.options
    q, sinks = _random(case, case.rows, o["heads"], o["head"], dtype=dtype), _random(case, o["heads"], place=3, dtype=dtype) if o["sinks"] else None
    keys, values = (_random(case, o["tokens"], o["groups"], o[size], place=place, dtype=dtype) for place, size in ((1, "head"), (2, "value")))
    inputs = (q, keys, values, o["window"], sinks, None, o["cap"])
    return inputs, definitions.attention(*inputs)


_STEPS: dict[str, Callable[[Case, torch.dtype], tuple[tuple[Any, ...], Tensor]]] = {"norm": _norm, "rotary": _rotary, "gate": _gate, "attention": _attention}
_CHECKS: dict[str, Callable[[Kernel, Case, torch.device], float]] = {
    "linear": _linear, "embedding": _embedding, "experts": _experts, "hadamard": _hadamard, **dict.fromkeys(_STEPS, _step),
}  # fmt: skip
