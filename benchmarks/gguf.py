"""Decode and prefill of GGUF files, against llama.cpp on the same files in the same run.

    python tools/make_gguf.py llama1b.gguf --shape 1b --vocab 32000
    llama-quantize llama1b.gguf llama1b-Q4_K_M.gguf Q4_K_M      (and Q4_0)
    python benchmarks/gguf.py llama1b-Q4_K_M.gguf llama1b-Q4_0.gguf --llama-bench PATH/llama-bench [--json]

Systems take turns, `--repeats` times; medians.  Decode is tokens per second of one sequence after an empty prompt, prefill of one
prompt, as llama-bench measures them.  "of read" is the share of the read rate, measured right before and after each turn, at which
the bytes of one step (all matrices but the embedding) were streamed.  llama.cpp computes with 8-bit activations; "exact" does not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import bitgrain
from bitgrain.bench.limits import Machine
from bitgrain.models.batch import Batch, Segment

MODES = ("exact", "fast")


def prefill_rate(model, tokens: int) -> float:
    """Tokens per second of one prompt."""
    ids = torch.randint(0, model.vocab_size, (tokens,))
    start = time.perf_counter()
    model.forward(Batch(ids, torch.arange(tokens), (Segment(model.new_cache(tokens), 0, tokens),), torch.tensor([tokens - 1])))
    return tokens / (time.perf_counter() - start)


def decode_rate(model, tokens: int) -> float:
    """Tokens per second, one sequence, one token a step."""
    cache, token, row = model.new_cache(tokens), torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    start = time.perf_counter()
    for position in range(tokens):
        logits = model.forward(Batch(token, torch.tensor([position]), (Segment(cache, 0, 1),), row))
        token = logits[0].argmax()[None]
    return tokens / (time.perf_counter() - start)


def step_bytes(path: Path) -> int:
    """Stored bytes that one decode step reads."""
    rows = bitgrain.open_checkpoint(path).plan.modules.values()
    untied = any(row.kind.value == "lm_head" and row.tensors for row in rows)
    return sum(row.nbytes for row in rows if row.kind.value != "embedding" or not untied)


def run_llama(program: Path, path: Path, args: argparse.Namespace) -> dict[str, float]:
    """llama-bench's own figures, tokens per second."""
    command = [str(program), "-m", str(path), "-t", str(args.threads), "-p", str(args.prompt), "-n", str(args.tokens), "-r", "1", "-o", "json"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {"prefill" if row["n_prompt"] else "decode": row["avg_ts"] for row in found}


def run_ours(model, args: argparse.Namespace) -> dict[str, float]:
    return {"prefill": prefill_rate(model, args.prompt), "decode": decode_rate(model, args.tokens)}


def measure(path: Path, args: argparse.Namespace) -> dict[str, object]:
    """Medians of every system on one file."""
    systems: dict[str, Callable[[], dict[str, float]]] = {}
    kernels = {}
    for mode in args.modes:
        model = bitgrain.load_model(path, fidelity=mode)
        decode_rate(model, 4)
        kernels[mode] = sorted({row["kernel"] for row in model.explain()})
        systems[mode] = lambda model=model: run_ours(model, args)
    if args.llama_bench:
        systems["llama.cpp"] = lambda: run_llama(args.llama_bench, path, args)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
    nbytes = step_bytes(path)
    for _ in range(args.repeats):
        for name, call in systems.items():
            before = Machine().read()
            rates = call()
            limit = (before + Machine().read()) / 2
            found[name].append({**rates, "of_read": rates["decode"] * nbytes / limit, "read_GB_per_s": limit / 1e9})
    medians = {name: {key: round(statistics.median(turn[key] for turn in turns), 3) for key in turns[0]} for name, turns in found.items()}
    return {"file": path.name, "MB_per_step": round(nbytes / 1e6, 1), "kernels": kernels, "systems": medians}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--llama-bench", type=Path, help="llama.cpp's program; without it bitgrain runs alone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]
    results = [measure(path, args) for path in args.files]
    if args.json:
        print(json.dumps({"threads": args.threads, "load_before": load, "results": results}, indent=1))
        return
    for result in results:
        print(f"\n{result['file']}: {result['MB_per_step']} MB per step, {args.threads} threads, load before {load:.1f}")
        print(f"{'system':12} {'prefill t/s':>12} {'decode t/s':>12} {'of read':>8} {'read GB/s':>10}")
        for name, row in result["systems"].items():
            print(f"{name:12} {row['prefill']:12.1f} {row['decode']:12.2f} {row['of_read']:8.0%} {row['read_GB_per_s']:10.1f}")
        print("kernels:", "; ".join(f"{mode}: {', '.join(names)}" for mode, names in result["kernels"].items()))


if __name__ == "__main__":
    main()
