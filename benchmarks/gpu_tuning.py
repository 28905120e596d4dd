"""What benchmarks/gpu.py --tune does: search the tiles of the Triton products of linear modules for the sizes that are to be measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_jobs import CASES, WORKING_SET, Jobs
from torch import Tensor

from bitgrain.errors import RunError
from bitgrain.kernels.base import LinearProblem, Prepared
from bitgrain.kernels.triton import tuning
from bitgrain.weights.synthetic import sample_activation, sample_weight

Seconds = Callable[[Callable[[int], object], int], tuple[float, str]]


def tune(jobs: Jobs, cases: list[str], seconds: Seconds, deadline: float, say: Callable[[str], None]) -> list[str]:
    """The cases that were left when time was up; the fastest tiles of the others are in the user's table.

    Args:
        seconds: of a call on some copies of a weight, as Timer.seconds gives it.
    """
    left = []
    for case in [name for name in cases if name in CASES]:
        spec, stored = CASES[case]
        activation = sample_activation(stored)
        for n, k in jobs.sizes.shapes:
            problem = LinearProblem(spec, activation.without_values(), n, k, "bfloat16")
            kernel = next((one for one in jobs.taking(problem) if one.name == "triton.linear"), None)
            if kernel is None:
                continue
            if time.monotonic() > deadline:
                left.append(f"{case} {n}x{k}")
                continue
            weight = sample_weight(spec, n, k).map_tensors(lambda t: t.to(jobs.device))
            held = [kernel.prepare(weight, activation)]
            held += [kernel.prepare(weight.map_tensors(torch.clone), activation) for _ in range(min(32, WORKING_SET // held[0].nbytes))]
            for rows in sorted(jobs.sizes.rows):  # the fewest rows decide the order of sums for all
                x = torch.randn(rows, k, device=jobs.device).bfloat16()
                try:
                    tiles, best = tuning.tune(_Launch(held, x, seconds, jobs).measure, held[0].meta["layout"], n, k, rows, x.dtype, jobs.platform)
                except RunError as error:
                    say(str(error))
                    continue
                say(f"tuned {case} {n}x{k} rows {rows}: {best * 1e6:.1f} us with {tiles}")
    return left


class _Launch:
    """One product with tiles of the search's choice."""

    def __init__(self, held: list[Prepared], x: Tensor, seconds: Seconds, jobs: Jobs) -> None:
        from bitgrain.kernels.triton.packed import quantized

        self.held, self.seconds, self.cores = held, seconds, jobs.platform.cores
        self.layout: Any = held[0].meta["layout"]
        self.inputs = quantized(self.layout, held[0].activation, x)
        self.out = torch.empty(x.shape[0], held[0].shape[0], dtype=x.dtype, device=x.device)

    def measure(self, tiles: Any) -> float:
        from bitgrain.kernels.triton.linear_kernel import launch

        copies = len(self.held) if self.out.shape[0] <= 64 else 1
        return self.seconds(lambda turn: launch(*self.inputs, self.held[turn].tensors, self.layout, None, self.out, tiles, self.cores), copies)[0]
