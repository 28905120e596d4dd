"""Show the support matrix: every format and scheme, and the kernel that each module kind gets here; from the registries."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from bitgrain.cli.tables import print_json, print_table
from bitgrain.formats.base import MATRIX_KINDS
from bitgrain.inspect.choices import choosing_for
from bitgrain.inspect.matrix import support_matrix
from bitgrain.inspect.run_records import read_records, run_records


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--platform", metavar="KEY[:GENERATION]", help="of this platform, also where it is not present (default: those that are)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="dtype of activations (default bfloat16)")
    parser.add_argument("--records", metavar="FILE", help="records of runs that `bitgrain conformance --record` wrote, besides those that came with the package")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    records = {**run_records(), **read_records(Path(args.records))} if args.records else None
    with choosing_for(args.platform) if args.platform else nullcontext(None) as platform:
        rows = support_matrix(args.dtype, [platform] if platform else None, records)
    if args.json:
        print_json(rows)
        return 0
    print_matrix(rows)
    aliases = {r["format"]: r["aliases"] for r in rows}
    for name, other in aliases.items():
        if other:
            print(f"{name} is also called {', '.join(other)}")
    return 0


def print_matrix(rows: list[dict[str, Any]]) -> None:
    """The table of support_matrix()."""
    kinds = [kind.value for kind in MATRIX_KINDS]
    table = [(r["format"], r["scheme"], r["platform"], *(r["kernels"].get(kind, "dense only") for kind in kinds), _runs(r["last_run"])) for r in rows]
    print_table("formats", ("format", "scheme", "platform", *kinds, "last run on"), table)


def _runs(last: dict[str, str]) -> str:
    """The last runs of a row, each once."""
    return "; ".join(dict.fromkeys(last.values()))
