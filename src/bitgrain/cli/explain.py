"""Show which kernel each module would get and why not the others, from headers alone, also for platforms that are not present."""

from __future__ import annotations

import argparse
from contextlib import nullcontext

from bitgrain.api import open_checkpoint
from bitgrain.cli.options import add_model_argument, add_plan_arguments, kernel_pairs, model_path, plan_options
from bitgrain.cli.tables import print_json, print_table
from bitgrain.inspect.choices import choose_for_plan, choosing_for
from bitgrain.kernels.explain import explain_rows
from bitgrain.kernels.selection import FIDELITIES, REQUIREMENTS, Policy
from bitgrain.platforms.probe import default_platform, target
from bitgrain.settings import platform_key


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument("--platform", metavar="KEY[:GENERATION]", help="plan for this platform instead of the one that is here")
    parser.add_argument("--dtype", default="auto", metavar="TYPE", help="dtype of activations: auto, bfloat16, float16, float32")
    parser.add_argument("--fidelity", choices=FIDELITIES, default="exact", help="fast admits kernels that change numerics (default exact)")
    parser.add_argument("--kernel", action="append", default=[], metavar="OP=NAME", help="force a kernel; may be repeated")
    parser.add_argument("--forbid", action="append", default=[], metavar="NAME", help="never use this kernel or backend; may be repeated")
    parser.add_argument("--require", choices=REQUIREMENTS, help="refuse the reference floor and emulated arithmetic")
    add_plan_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(model_path(args), **plan_options(args))
    asked = args.platform or platform_key()
    with choosing_for(asked) if asked else nullcontext(default_platform().key) as platform:
        # the self-test needs the machine itself; planning for another one, or from headers, does without
        policy = Policy(args.fidelity, kernel_pairs(args.kernel), frozenset(args.forbid), args.require, self_test=False)
        rows = explain_rows(choose_for_plan(checkpoint.plan, platform, policy, checkpoint.dtype(args.dtype)))
        counted_on = target(platform)
    if args.json:
        told = {"state": counted_on.state, "generation": counted_on.generation, "features": sorted(counted_on.features)}
        print_json({"platform": platform, **told, "plan": checkpoint.plan.hash, "modelling": checkpoint.plan.modelling, "modules": rows})
        return 0
    where = f"on {platform}" if counted_on.state == "present" else counted_on.describe()
    print(f"{checkpoint.files.label} {where}, modelling code: {checkpoint.plan.modelling}")
    table = [(r["modules"], r["count"], r["problem"], r["kernel"], r["fidelity"] + (f"; {r['proof']}" if "proof" in r else "")) for r in rows]
    print_table("chosen", ("modules", "count", "problem", "kernel", "fidelity"), table)
    notes = [(r["modules"], r["note"]) for r in rows if "note" in r]
    if notes:
        print_table("experts that run as linear modules", ("modules", "why"), notes)
    refused = [(r["modules"], c["kernel"], c["reason"]) for r in rows for c in r["candidates"] if c["reason"]]
    print_table("not chosen", ("modules", "kernel", "reason"), refused)
    return 0
