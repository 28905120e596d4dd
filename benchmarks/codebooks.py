"""Codebook weights and Hadamard transforms: native kernels against the reference in the same run, medians of alternating calls.

    python benchmarks/codebooks.py [--n 4096 --k 4096 --rows 1 --threads 2 --only 1x16 --json]

GB/s is the size of the prepared weight by the time of a product; one weight is used again and again, as large as a layer's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from bitgrain.kernels.base import LinearProblem
from bitgrain.kernels.cpu import library
from bitgrain.kernels.reference.linear import ReferenceLinear
from bitgrain.kernels.selection import Policy, select
from bitgrain.numerics.hadamard import hadamard_transform
from bitgrain.weights import NO_ACTIVATION, WeightSpec
from bitgrain.weights.additive import additive_spec
from bitgrain.weights.codebook import codebook_spec
from bitgrain.weights.lattice import lattice_spec
from bitgrain.weights.synthetic import sample_weight
from bitgrain.weights.trellis import trellis_spec
from bitgrain.weights.vector_codebook import VectorSizes, vector_spec

CASES = {
    "sums 1x16": additive_spec(1, 16, (1, 8), "float16"),
    "sums 2x8": additive_spec(2, 8, (1, 8), "float16"),
    "sums 4x8, two rows": additive_spec(4, 8, (2, 8), "float16"),
    "E8P 2 bit": lattice_spec(2),
    "E8P + E8 3 bit": lattice_spec(3),
    "E8P + E8P 4 bit": lattice_spec(4),
    "trellis lut 2 bit": trellis_spec(2, "lut", 16, 2, 16),
    "trellis hyb 2 bit": trellis_spec(2, "quantlut_sym", 16, 2, 9, "fragments"),
    "trellis hyb 4 bit": trellis_spec(4, "quantlut_sym", 16, 2, 9, "fragments"),
    "trellis 1mad 2 bit": trellis_spec(2, "1mad", 16, 1),
    "trellis 2mad 3 bit": trellis_spec(3, "2mad", 16, 1),
    "trellis 3inst 4 bit": trellis_spec(4, "3inst", 16, 1),
    "vectors 8, 65536": vector_spec(VectorSizes(8, 65536), "float16", zero=True),
    "vectors 8, 65536 + 256": vector_spec(VectorSizes(8, 65536, 256), "float16", zero=True),
    "vectors 8, 256, outliers": vector_spec(VectorSizes(8, 256, 0, 1, 4, 4096), "float16", zero=True),
    "vectors 6, 4096": vector_spec(VectorSizes(6, 4096), "float16"),
    "lookup 4 bit g64": codebook_spec(4, 64),
    "lookup 3 bit row": codebook_spec(3, 0, "float16"),
}
# length of x and order of the base: powers of two, 2^9 28, 2^6 172, 2^9 28 as 28 512
TRANSFORMS = ((4096, 1), (14336, 28), (11008, 172), (8192, 1), (5120, 20))


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _alternating(ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int, most: float = 4.0) -> tuple[float, float]:
    """Median seconds of both, called in turn; ours runs five times for each of theirs."""
    ours(), theirs()
    mine: list[float] = []
    other: list[float] = []
    while len(other) < repeats and (len(other) < 3 or sum(other) < most):
        mine += [_seconds(ours) for _ in range(5)]
        other.append(_seconds(theirs))
    return statistics.median(mine), statistics.median(other)


def measure(name: str, spec: WeightSpec, n: int, k: int, rows: int, repeats: int) -> dict[str, float | str]:
    """The chosen kernel and the reference on one weight."""
    reference, weight = ReferenceLinear(), sample_weight(spec, n, k)
    kernel = select(LinearProblem(spec, NO_ACTIVATION, n, k, "bfloat16"), "cpu", Policy(self_test=False)).kernel
    ours, theirs = kernel.prepare(weight, NO_ACTIVATION), reference.prepare(weight, NO_ACTIVATION)
    x = torch.randn(rows, k).bfloat16()
    mine, other = _alternating(lambda: kernel.apply(x, ours, None), lambda: reference.apply(x, theirs, None), repeats)
    return {
        "case": name, "kernel": kernel.name, "rows": rows, "ms": round(mine * 1e3, 3), "reference_ms": round(other * 1e3, 2), "ratio": round(other / mine, 1),
        "GB_per_s": round(ours.nbytes / mine / 1e9, 2), "GFLOP_per_s": round(2 * rows * n * k / mine / 1e9, 1),
    }  # fmt: skip


def measure_transform(size: int, order: int, rows: int, repeats: int) -> dict[str, float | str]:
    """The native transform and the reference on bfloat16 rows; the base is any matrix of +-1: the time does not depend on it."""
    from bitgrain.kernels.cpu.codebook_operators import hadamard

    base = None if order == 1 else torch.randint(0, 2, (order, order)).float() * 2 - 1
    x, factor = torch.randn(rows, size).bfloat16(), size**-0.5
    mine, other = _alternating(lambda: hadamard(x, base, size, factor), lambda: (hadamard_transform(x.float(), base) * factor).to(x.dtype), repeats)
    return {"case": f"Hadamard {size}, base {order}", "kernel": "cpu.hadamard", "rows": rows, "ms": round(mine * 1e3, 4), "reference_ms": round(other * 1e3, 3), "ratio": round(other / mine, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--transform-rows", type=int, nargs="*", default=[1, 64])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]
    record = {"instruction_set": library.instruction_set(), "threads": args.threads, "load_before": load, "n": args.n, "k": args.k}
    if not args.json:
        print(record)
    results = []
    for rows in args.rows:
        results += [_shown(measure(name, spec, args.n, args.k, rows, args.repeats), args.json) for name, spec in CASES.items() if args.only in name]
    if not args.only:
        results += [_shown(measure_transform(size, order, rows, args.repeats), args.json) for size, order in TRANSFORMS for rows in args.transform_rows]
    if args.json:
        print(json.dumps({**record, "results": results}))


def _shown(row: dict[str, float | str], silent: bool) -> dict[str, float | str]:
    if not silent:
        speed = f"{row['GB_per_s']:6.2f} GB/s {row['GFLOP_per_s']:7.1f} GFLOP/s" if "GB_per_s" in row else ""
        print(f"{row['case']:26s} {row['kernel']:15s} rows {row['rows']:4d} {row['ms']:9.4g} ms  reference {row['reference_ms']:9.4g} ms  x{row['ratio']:7.1f}  {speed}", flush=True)
    return row


if __name__ == "__main__":
    main()
