"""Linear kernels against torch's bf16 product in the same run: medians of alternating calls, and shares of measured limits.

    python benchmarks/kernels.py [--n 4096 --k 4096 --rows 1 8 64 512 --json] [--cases q4_k q6_k --fidelity exact fast]

"of read" is the share of this machine's measured read rate at which the prepared weight was streamed (rows = 1);
weights rotate through a working set larger than the caches, so that they come from memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

import torch

from bitgrain.kernels.base import LinearProblem
from bitgrain.kernels.cpu import library
from bitgrain.kernels.selection import Policy, select
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, WeightSpec
from bitgrain.weights.super_block import super_block_spec
from bitgrain.weights.synthetic import sample_weight

CASES = {
    "W4A16 g128": (WeightSpec("int_affine", "uint4", 4, "group", 128, zero="constant", scale_dtype="bfloat16"), NO_ACTIVATION),
    "W4A16 g128 asym": (WeightSpec("int_affine", "uint4", 4, "group", 128, zero="integer", scale_dtype="bfloat16"), NO_ACTIVATION),
    "W8A16 channel": (WeightSpec("int_affine", "uint8", 8, "channel", zero="constant", scale_dtype="bfloat16"), NO_ACTIVATION),
    "W8A8 int8 token": (WeightSpec("int_affine", "uint8", 8, "channel", zero="constant", scale_dtype="bfloat16"), ActivationSpec("int8", "token")),
    "FP8 block 128x128": (WeightSpec("float", "fp8_e4m3fn", 8, "block", block=(128, 128), scale_dtype="float32"), NO_ACTIVATION),
    **{kind.lower(): (super_block_spec(kind), NO_ACTIVATION) for kind in ("Q4_1", "Q4_K", "Q6_K", "IQ4_XS")},
    "W4A16 g32": (WeightSpec("int_affine", "uint4", 4, "group", 32, zero="constant", scale_dtype="float16"), NO_ACTIVATION),
    "W8A16 g32": (WeightSpec("int_affine", "uint8", 8, "group", 32, zero="constant", scale_dtype="float16"), NO_ACTIVATION),
}
WORKING_SET = 600_000_000  # bytes; past the last-level cache of the machines that this ran on


def read_rate() -> float:
    """Bytes per second of summing a large array with all threads, the best of five."""
    data = torch.ones(200_000_000, dtype=torch.float32)
    best = min(_seconds(data.sum) for _ in range(5))
    return data.numel() * 4 / best


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(name: str, n: int, k: int, rows: int, repeats: int, fidelity: str = "exact") -> dict[str, float | str]:
    """Median microseconds of the chosen kernel and of torch's bf16 linear, called in turn."""
    spec, act = CASES[name]
    selection = select(LinearProblem(spec, act, n, k, "bfloat16"), "cpu", Policy(fidelity=fidelity, self_test=False))
    kernel = selection.kernel
    first = kernel.prepare(sample_weight(spec, n, k), act)
    copies = max(1, min(64, WORKING_SET // first.nbytes)) if rows == 1 else 1
    prepared = [first, *(type(first)(first.shape, {key: t.clone() for key, t in first.tensors.items()}, act, first.meta) for _ in range(copies - 1))]
    dense = [torch.randn(n, k).bfloat16() for _ in range(max(1, min(16, WORKING_SET // (2 * n * k))) if rows == 1 else 1)]
    x = torch.randn(rows, k).bfloat16()
    ours, torchs = [], []
    for i in range(repeats + 3):
        ours.append(_seconds(lambda i=i: kernel.apply(x, prepared[i % len(prepared)], None)))
        torchs.append(_seconds(lambda i=i: torch.nn.functional.linear(x, dense[i % len(dense)])))
    mine, other = statistics.median(ours[3:]), statistics.median(torchs[3:])
    return {
        "case": name, "kernel": kernel.name, "rows": rows, "us": round(mine * 1e6, 1), "torch_bf16_us": round(other * 1e6, 1),
        "speedup": round(other / mine, 2), "GB_per_s": round(first.nbytes / mine / 1e9, 1), "GFLOP_per_s": round(2 * rows * n * k / mine / 1e9, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--fidelity", nargs="+", default=["exact"], choices=["exact", "fast"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    load, rate = os.getloadavg()[0], read_rate()
    results = [measure(name, args.n, args.k, rows, args.repeats, fidelity) for rows in args.rows for name in args.cases for fidelity in args.fidelity]
    record = {"instruction_set": library.instruction_set(), "threads": torch.get_num_threads(), "load_before": load, "read_GB_per_s": round(rate / 1e9, 1), "read_after_GB_per_s": round(read_rate() / 1e9, 1), "n": args.n, "k": args.k}
    if args.json:
        print(json.dumps({**record, "results": results}))
        return
    print(record)
    for row in results:
        share = f"{100 * row['GB_per_s'] * 1e9 / rate:4.0f} % of read" if row["rows"] == 1 else f"{row['GFLOP_per_s']:8.1f} GFLOP/s"
        print(f"{row['case']:18s} {row['kernel']:15s} rows {row['rows']:4d}  {row['us']:10.1f} us  torch bf16 {row['torch_bf16_us']:10.1f} us  x{row['speedup']:5.2f}  {share}")


if __name__ == "__main__":
    main()
