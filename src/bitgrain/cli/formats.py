"""Show the support matrix: every format and scheme, and the kernel that each module kind gets here; from the registries."""

from __future__ import annotations

import argparse

from bitgrain.cli.tables import print_json, print_table
from bitgrain.formats.base import MATRIX_KINDS
from bitgrain.inspect.matrix import support_matrix


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="dtype of activations (default bfloat16)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    rows = support_matrix(args.dtype)
    if args.json:
        print_json(rows)
        return 0
    kinds = [kind.value for kind in MATRIX_KINDS]
    table = [(r["format"], r["scheme"], r["platform"], *(r["kernels"].get(kind, "dense only") for kind in kinds), _runs(r["last_run"])) for r in rows]
    print_table("formats", ("format", "scheme", "platform", *kinds, "last run on"), table)
    aliases = {r["format"]: r["aliases"] for r in rows}
    for name, other in aliases.items():
        if other:
            print(f"{name} is also called {', '.join(other)}")
    return 0


def _runs(last: dict[str, str]) -> str:
    """The last runs of a row, each once."""
    return "; ".join(dict.fromkeys(last.values()))
