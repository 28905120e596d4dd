"""How threads should wait: torch's operations and native ones taking turns on one pool, idle and with others on the cores.

    python benchmarks/threads.py [--competitors 0 1 2 --seconds 2 --json]

One call is what a decode step does again and again: torch's product of a bfloat16 matrix, then a native one of four-bit codes, both
from the caches, both shared among the threads of torch's libgomp, which the native library uses too.  Each way of waiting is a
process of its own, since libgomp reads its variables once; ways take turns.  Competitors are processes that never rest.  "one core"
pins everything to one core of the first two.  Times are microseconds of a call: minimum, median, 95th percentile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial

WAYS: dict[str, tuple[int, dict[str, str]]] = {
    "default": (2, {}),
    "passive": (2, {"OMP_WAIT_POLICY": "passive"}),
    "active": (2, {"OMP_WAIT_POLICY": "active"}),
    "spin 1000": (2, {"GOMP_SPINCOUNT": "1000"}),
    "spin 10000": (2, {"GOMP_SPINCOUNT": "10000"}),
    "one thread": (1, {}),
}
TORCH_SIDE, NATIVE_SIDE = 512, 1024


def measure(seconds: float) -> list[float]:
    """Microseconds of each call within so many seconds."""
    import torch

    from bitgrain.kernels.base import LinearProblem
    from bitgrain.kernels.selection import Policy, select
    from bitgrain.platforms.probe import default_platform
    from bitgrain.weights import NO_ACTIVATION, WeightSpec
    from bitgrain.weights.synthetic import sample_weight

    spec = WeightSpec("int_affine", "uint4", 4, "group", 128, zero="constant", scale_dtype="float16")
    kernel = select(LinearProblem(spec, NO_ACTIVATION, NATIVE_SIDE, NATIVE_SIDE, "bfloat16"), default_platform().key, Policy(self_test=False)).kernel
    prepared = kernel.prepare(sample_weight(spec, NATIVE_SIDE, NATIVE_SIDE), NO_ACTIVATION)
    x, dense, narrow = torch.randn(1, NATIVE_SIDE).bfloat16(), torch.randn(TORCH_SIDE, TORCH_SIDE), torch.randn(8, TORCH_SIDE)
    taken = []
    with torch.inference_mode():
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            torch.nn.functional.linear(narrow, dense)
            kernel.apply(x, prepared, None)
            taken.append((time.perf_counter() - start) * 1e6)
    return taken[len(taken) // 10 :]


def run(way: str, seconds: float, core: bool) -> dict[str, float]:
    threads, variables = WAYS[way]
    clean = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    pin = partial(os.sched_setaffinity, 0, {min(os.sched_getaffinity(0))}) if core else None
    done = subprocess.run(
        [sys.executable, __file__, "--child", "--seconds", str(seconds)], env={**clean, "OMP_NUM_THREADS": str(threads), **variables}, capture_output=True, text=True, check=True, preexec_fn=pin
    )
    taken = sorted(json.loads(done.stdout))
    return {"min": round(taken[0]), "median": round(taken[len(taken) // 2]), "p95": round(taken[len(taken) * 95 // 100]), "calls": len(taken)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--competitors", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.seconds)))
        return
    rows = []
    print(f"load before: {os.getloadavg()[0]:.1f}", file=sys.stderr)
    for place, counts in (("all cores", args.competitors), ("one core", [0])):
        for count in counts:
            others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
            try:
                rows += [{"where": place, "competitors": count, "way": way, **run(way, args.seconds, place == "one core")} for way in args.ways]
            finally:
                for other in others:
                    other.kill()
                    other.wait()
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    print("| cores | competitors | waiting | minimum µs | median µs | 95 % µs |\n| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        print(f"| {row['where']} | {row['competitors']} | {row['way']} | {row['min']} | {row['median']} | {row['p95']} |")


if __name__ == "__main__":
    main()
