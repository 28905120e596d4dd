"""First use tests itself: one small tile of a kernel against the reference, remembered per machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform as host
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from bitgrain import __version__
from bitgrain.kernels.base import ExpertsProblem, Fidelity, Kernel, LinearProblem, Problem, Refusal
from bitgrain.kernels.reference.experts import ReferenceExperts
from bitgrain.kernels.samples import sample_experts, sample_routing
from bitgrain.numerics.gates import parse_gate
from bitgrain.settings import cache_folder, self_test_enabled
from bitgrain.weights.synthetic import block_of, sample_activation, sample_weight

# Relative to the largest output of the tile: one rounding of y to its dtype, with room for another order of summation.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
# What kernels that round x to int8 may differ by: its rounding is 1/254 of the largest of 32 neighbours.
APPROXIMATE_TOLERANCE = 5e-2
ROWS, EXPERTS = 3, 4

_results: dict[str, str] = {}


def _testable(problem: Problem) -> TypeGuard[LinearProblem | ExpertsProblem]:
    return isinstance(problem, LinearProblem) or (isinstance(problem, ExpertsProblem) and parse_gate(problem.join) is not None)


def self_test(kernel: Kernel, problem: Problem) -> Refusal | None:
    """None if one small tile agrees with the reference, else a refusal with the difference.

    Switched off by BITGRAIN_SELFTEST=0.  Results are kept in the cache folder (BITGRAIN_CACHE, default
    ~/.cache/bitgrain), by kernel, version, machine and problem; delete the file to test again.
    """
    if kernel.rank == 0 or not self_test_enabled() or not _testable(problem):
        return None
    key = _key(kernel, problem)
    if key not in _results:
        known = _stored().get(key)
        _results[key] = known if known is not None else _run(kernel, problem)
        if known is None:
            _store(key, _results[key])
    return Refusal(_results[key]) if _results[key] else None


def experts_factor(problem: ExpertsProblem) -> int:
    """How much more than one product experts may differ: two products and a join; where the values between them are quantized
    coarsely, one that is rounded the other way counts."""
    return 3 if problem.down_activation.is_none or problem.down_activation.bits >= 8 else 10


def _key(kernel: Kernel, problem: LinearProblem | ExpertsProblem) -> str:
    features = getattr(kernel, "build", "")
    tile = _tile(problem) if isinstance(problem, LinearProblem) else _experts_tile(problem)
    text = f"{__version__} {torch.__version__} {host.machine()} {kernel.name} {features} {tile}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _tile(problem: LinearProblem) -> LinearProblem:
    """The same problem at a size that runs in microseconds and still has a ragged edge."""
    step = max(problem.weight.group_size, problem.weight.block[1], 32)
    rows, columns = block_of(problem.weight)
    n, k = -(-80 // rows) * rows, -(-2 * step // columns) * columns
    return replace(problem, n=min(problem.n, n), k=min(problem.k, k), max_rows=0)


def _experts_tile(problem: ExpertsProblem) -> ExpertsProblem:
    """A few small experts with ragged edges."""
    linears = [_tile(linear) for linear in problem.linears]
    return replace(problem, count=min(problem.count, EXPERTS), hidden=linears[0].k, size=linears[1].k, max_rows=0)


def _run(kernel: Kernel, problem: LinearProblem | ExpertsProblem) -> str:
    try:
        got, want = _linear_outputs(kernel, problem) if isinstance(problem, LinearProblem) else _experts_outputs(kernel, problem)
    except RuntimeError as error:
        return f"its self-test raised {type(error).__name__}: {error}"
    allowed = TOLERANCE[problem.dtype] * (1 if isinstance(problem, LinearProblem) else experts_factor(problem))
    if kernel.fidelity(problem) is Fidelity.APPROXIMATE:
        allowed = max(allowed, APPROXIMATE_TOLERANCE)
    worst = float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))
    if worst <= allowed:
        return ""
    return f"its self-test differs from the reference by {worst:.2g} of the largest output (allowed {allowed:g})"


def _linear_outputs(kernel: Kernel, problem: LinearProblem) -> tuple[Tensor, Tensor]:
    """(the kernel's, the reference's) of one tile, float32."""
    tile = _tile(problem)
    if kernel.refusal(tile) is not None:
        tile = problem
    weight = sample_weight(tile.weight, tile.n, tile.k)
    activation = sample_activation(tile.activation)
    x = _input(tile.k, tile.dtype)
    got = kernel.apply(x, kernel.prepare(weight, activation), None).float()
    return got, torch.nn.functional.linear(activation.fake_quantize(x), weight.dequantize())


def _experts_outputs(kernel: Kernel, problem: ExpertsProblem) -> tuple[Tensor, Tensor]:
    tile = _experts_tile(problem)
    if kernel.refusal(tile) is not None:
        tile = replace(problem, count=tile.count, max_rows=0)
    x = _input(tile.hidden, tile.dtype)
    weight, chosen = sample_routing(ROWS, tile.count, min(2, tile.count))
    outputs = [one.apply(x, weight.to(x.dtype), chosen, sample_experts(one, tile)).float() for one in (kernel, ReferenceExperts())]
    return outputs[0], outputs[1]


def _input(k: int, dtype: str) -> Tensor:
    x: Tensor = torch.randn(ROWS, k, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
    return x


def _file() -> Path:
    return cache_folder() / "selftest.json"


@lru_cache(maxsize=1)
def _stored() -> dict[str, str]:
    try:
        value = json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _store(key: str, result: str) -> None:
    # a cache that cannot be written only costs the test again
    with suppress(OSError):
        _file().parent.mkdir(parents=True, exist_ok=True)
        merged = {**_stored(), **_results, key: result}
        temporary = _file().with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(merged))
        temporary.replace(_file())


