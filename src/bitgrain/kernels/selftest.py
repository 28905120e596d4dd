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

import torch

from bitgrain import __version__
from bitgrain.kernels.base import Kernel, LinearProblem, Problem, Refusal
from bitgrain.settings import cache_folder, self_test_enabled
from bitgrain.weights.synthetic import sample_activation, sample_weight

# Relative to the largest output of the tile: one rounding of y to its dtype, with room for another order of summation.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
ROWS = 3

_results: dict[str, str] = {}


def self_test(kernel: Kernel, problem: Problem) -> Refusal | None:
    """None if one small tile agrees with the reference, else a refusal with the difference.

    Switched off by BITGRAIN_SELFTEST=0.  Results are kept in the cache folder (BITGRAIN_CACHE, default
    ~/.cache/bitgrain), by kernel, version, machine and problem; delete the file to test again.
    """
    if kernel.rank == 0 or not self_test_enabled() or not isinstance(problem, LinearProblem):
        return None
    key = _key(kernel, problem)
    if key not in _results:
        known = _stored().get(key)
        _results[key] = known if known is not None else _run(kernel, problem)
        if known is None:
            _store(key, _results[key])
    return Refusal(_results[key]) if _results[key] else None


def _key(kernel: Kernel, problem: LinearProblem) -> str:
    features = getattr(kernel, "build", "")
    text = f"{__version__} {torch.__version__} {host.machine()} {kernel.name} {features} {_tile(problem)}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _tile(problem: LinearProblem) -> LinearProblem:
    """The same problem at a size that runs in microseconds and still has a ragged edge."""
    step = max(problem.weight.group_size, problem.weight.block[1], 32)
    return replace(problem, n=min(problem.n, 80), k=min(problem.k, 2 * step), max_rows=0)


def _run(kernel: Kernel, problem: LinearProblem) -> str:
    tile = _tile(problem)
    if kernel.refusal(tile) is not None:
        tile = problem
    weight = sample_weight(tile.weight, tile.n, tile.k)
    activation = sample_activation(tile.activation)
    dtype = getattr(torch, tile.dtype)
    x = torch.randn(ROWS, tile.k, generator=torch.Generator().manual_seed(1)).to(dtype)
    try:
        got = kernel.apply(x, kernel.prepare(weight, activation), None).float()
    except RuntimeError as error:
        return f"its self-test raised {type(error).__name__}: {error}"
    want = torch.nn.functional.linear(activation.fake_quantize(x), weight.dequantize())
    worst = float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))
    if worst <= TOLERANCE[tile.dtype]:
        return ""
    return f"its self-test differs from the reference by {worst:.2g} of the largest output (allowed {TOLERANCE[tile.dtype]:g})"


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


