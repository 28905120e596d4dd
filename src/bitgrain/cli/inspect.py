"""Show what a checkpoint holds: per module its scheme, size and the reason; totals, predicted memory, shard check.

Reads headers only: takes seconds for a checkpoint of any size, on any machine.
"""

from __future__ import annotations

import argparse

from bitgrain.api import Checkpoint, open_checkpoint
from bitgrain.cli.options import add_model_argument, add_plan_arguments, model_path, plan_options
from bitgrain.cli.tables import print_json, print_table, size
from bitgrain.inspect.report import group_rows, left_out_lines, memory, reason_lines, shard_rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument("--tp", type=int, metavar="N", help="check whether every matrix can be split over N ranks")
    add_plan_arguments(parser)
    parser.add_argument("--all", action="store_true", help="one row per module instead of one per group")
    parser.add_argument("--json", action="store_true", help="print the whole plan as JSON")


def run(args: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(model_path(args), **plan_options(args))
    shards = shard_rows(checkpoint.plan, args.tp) if args.tp is not None else None
    if args.json:
        report = {**checkpoint.plan.as_dict(), "hash": checkpoint.plan.hash, "architecture": checkpoint.architecture, "memory": memory(checkpoint.plan)}
        print_json(report if shards is None else {**report, "shards": {"ranks": args.tp, "remarks": shards}})
    else:
        _print(checkpoint, args.all)
        if shards is not None:
            _print_shards(shards, args.tp)
    return 1 if shards and any(row["verdict"].startswith("refused") for row in shards) else 0


def _print(checkpoint: Checkpoint, every: bool) -> None:
    plan = checkpoint.plan
    print(f"{checkpoint.files.label}: {checkpoint.architecture or 'unknown architecture'}, format {plan.format} ({'; '.join(plan.evidence)})")
    print(f"modelling code: {plan.modelling}")
    rows: list[tuple[object, ...]]
    if every:
        rows = [(m.name, 1, m.kind.value, m.label, "x".join(map(str, m.shape)), f"{m.bits_per_weight:.2f}", size(m.nbytes), m.why) for m in plan.modules.values()]
    else:
        rows = [(g.name, g.count, g.kind, g.scheme, "x".join(map(str, g.shape)), f"{g.bits_per_weight:.2f}", size(g.nbytes), g.why) for g in group_rows(plan)]
    print_table("modules", ("module", "count", "kind", "scheme", "shape", "bits/weight", "bytes", "why"), rows)
    totals = plan.totals
    scheme_rows = [(label, r["modules"], f"{r['parameters']:,}", size(r["bytes"])) for label, r in totals["schemes"].items()]
    print_table("totals", ("scheme", "modules", "parameters", "bytes"), [*scheme_rows, ("all", totals["modules"], f"{totals['parameters']:,}", size(totals["bytes"]))])
    need = memory(plan)
    print(f"{totals['bits_per_weight']:.2f} bits per weight; loading needs at most {size(need['peak_loading_bytes'])} of host memory")
    for line in reason_lines(plan) + left_out_lines(plan):
        print(line)
    for note in plan.notes:
        print(f"note: {note}")
    print(f"plan {plan.hash}")


def _print_shards(rows: list[dict[str, object]], ranks: int) -> None:
    if not rows:
        print(f"every matrix can be split over {ranks} ranks")
        return
    print_table(f"split over {ranks} ranks", ("module", "count", "dim", "size", "verdict"), [(r["name"], r["count"], r["dim"], r["size"], r["verdict"]) for r in rows])
