"""Measure speed as a share of what this machine does at best.

bench kernels          linear kernels of each kind of weight, at sizes of your choice
bench decode [MODEL]   one token a step, for one or more sequences
bench prefill [MODEL]  a prompt read at once

The read rate of memory is measured right before and after each round; a round in which it changed by more than 15 % is thrown
away and repeated, up to four times, and a line whose rounds were all disturbed says so.  "of arithmetic" is of what registers alone do
in the fastest arithmetic that the kernel may use, which "arithmetic" names: float32, bfloat16, int8 (bytes by bytes), int4 (bytes
by codes of four bits), or int4 in three digits (exact products of such codes: each activation is three bytes).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from bitgrain.bench.kernels import CASES, KernelRow, measure_kernels
from bitgrain.bench.limits import Machine
from bitgrain.bench.models import ModelRow, measure_decode, measure_prefill
from bitgrain.bench.roofline import roofline
from bitgrain.cli.options import add_load_arguments, add_model_argument, kernel_pairs, load_options, model_path
from bitgrain.cli.tables import print_json, print_table
from bitgrain.errors import RequestError, RunError
from bitgrain.kernels.selection import Policy
from bitgrain.platforms.base import Platform
from bitgrain.platforms.probe import default_platform, platform_of
from bitgrain.platforms.processors import limit_threads


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parts = parser.add_subparsers(dest="what", required=True, metavar="kernels | decode | prefill")
    kernels = parts.add_parser("kernels", help="linear kernels of each kind of weight", allow_abbrev=False)
    kernels.add_argument("--cases", nargs="+", default=list(CASES), metavar="CASE", help=f"of {', '.join(CASES)}")
    kernels.add_argument("--shapes", nargs="+", default=["4096x4096"], metavar="NxK", help="out features x in features (default 4096x4096)")
    kernels.add_argument("--rows", nargs="+", type=int, default=[1, 8, 512], metavar="M", help="rows of activations (default 1 8 512)")
    kernels.add_argument("--fidelity", choices=("exact", "fast"), default="exact", help="fast admits kernels that change numerics (default exact)")
    kernels.add_argument("--kernel", action="append", default=[], metavar="OP=NAME", help="force a kernel")
    kernels.add_argument("--repeats", type=int, default=15, metavar="N", help="calls in a round (default 15)")
    for name, text in (("decode", "one token a step"), ("prefill", "a prompt read at once")):
        part = parts.add_parser(name, help=text, allow_abbrev=False)
        add_model_argument(part)
        part.add_argument("--repeats", type=int, default=16 if name == "decode" else 3, metavar="N", help="steps or prompts in a round")
        if name == "decode":
            part.add_argument("--sequences", nargs="+", type=int, default=[1], metavar="N", help="sequences in a batch (default 1)")
            part.add_argument("--context", type=int, default=0, metavar="N", help="tokens before the first step (default 0)")
        else:
            part.add_argument("--tokens", nargs="+", type=int, default=[512], metavar="N", help="tokens of the prompt (default 512)")
        add_load_arguments(part)
    for part in parts.choices.values():
        part.add_argument("--json", action="store_true", help="print JSON")
        part.add_argument("--plot", metavar="FILE.svg", help="draw what was measured under the machine's limits")


def run(args: argparse.Namespace) -> int:
    _check(args)
    machine = Machine()
    record = {"threads": torch.get_num_threads(), "load_before": round(os.getloadavg()[0], 2), "torch": torch.__version__}
    with torch.inference_mode():
        rows: list[Any] = _kernels(args, machine) if args.what == "kernels" else _models(args, machine)
        read, peaks = machine.read(), machine.peaks()
    record |= {"read_GB_per_s": round(read / 1e9, 1), **{f"{name.replace(' ', '_')}_GFLOP_per_s": round(peak / 1e9, 1) for name, peak in peaks.items()}}
    if args.plot:
        Path(args.plot).write_text(roofline(read, peaks, [_point(row) for row in rows], f"bitgrain bench {args.what}"), encoding="utf-8")
    told = [row.as_dict() for row in rows]
    if args.json:
        print_json({**record, "results": told})
        return 0
    print(", ".join(f"{name.replace('_per_s', '/s').replace('_', ' ')} {value}" for name, value in record.items()))
    columns = [name for name in told[0] if name not in ("bytes", "rejected", "disturbed")] if told else []
    print_table(args.what, columns, [[*_cells(row, columns)] for row in told])
    for row in told:
        if row["disturbed"]:
            print(f"disturbed in every round: {row.get('case', row.get('what'))}, {row.get('rows', row.get('tokens'))}: something else uses this machine's memory")
    return 0


def _check(args: argparse.Namespace) -> None:
    counts = [*getattr(args, "rows", []), *getattr(args, "sequences", []), *getattr(args, "tokens", []), args.repeats]
    if min(counts) < 1 or getattr(args, "context", 0) < 0:
        raise RequestError(f"bench {args.what}", "a count below 1", "positive numbers", "correct the option")
    if args.plot and not Path(args.plot).resolve().parent.is_dir():
        raise RequestError(f"--plot {args.plot}", "no such folder", "a folder that exists", "make it, or choose another")


def _here(platform: Platform) -> str:
    """The platform's key.

    Raises:
        RunError: a device with memory of its own: the limits measured here are the host's.
    """
    if platform.device_type != torch.empty(0).device.type or platform.state != "present":
        raise RunError("bench", f"platform {platform.key} is not the host itself", "the host", "use benchmarks/gpu.py, which measures a device's own limits")
    return platform.key


def _kernels(args: argparse.Namespace, machine: Machine) -> list[KernelRow]:
    policy = Policy(args.fidelity, kernel_pairs(args.kernel))
    key = _here(default_platform())
    policy.check(key)
    limit_threads()
    return list(measure_kernels(args.cases, [_shape(text) for text in args.shapes], args.rows, policy, key, machine, args.repeats))


def _shape(text: str) -> tuple[int, int]:
    n, cross, k = text.partition("x")
    if not (cross and n.isdecimal() and k.isdecimal() and int(n) and int(k)):
        raise RequestError(f"--shapes {text}", "not a shape", "NxK, such as 14336x4096", "correct it")
    return int(n), int(k)


def _models(args: argparse.Namespace, machine: Machine) -> list[ModelRow]:
    from bitgrain.api import load_model

    options = load_options(args)
    _here(platform_of(options["device"]) if "device" in options else default_platform())
    model = load_model(model_path(args), **options)
    if args.what == "decode":
        _fits(model.max_context, args.context + args.repeats)
        return [measure_decode(model, count, args.context, args.repeats, machine) for count in args.sequences]
    _fits(model.max_context, max(args.tokens))
    return [measure_prefill(model, tokens, args.repeats, machine) for tokens in args.tokens]


def _fits(limit: int, tokens: int) -> None:
    if tokens > limit:
        raise RequestError("bench", f"{tokens} tokens in a sequence", f"at most {limit}, the model's context", "ask for fewer")


def _point(row: KernelRow | ModelRow) -> tuple[str, float, float]:
    label = f"{row.case}, {row.rows} rows" if isinstance(row, KernelRow) else f"{row.what}, {row.tokens}"
    return label, row.operations / row.nbytes, row.operations / row.taken.median


def _cells(row: dict[str, Any], columns: list[str]) -> list[str]:
    return [f"{row[name]:.0%}" if name.startswith(("of_", "in_")) else str(row[name]) for name in columns]
