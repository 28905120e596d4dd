"""Hold every kernel of a platform against the definition, over all that it says it takes; then show the platform's support matrix.

A kernel that somebody registered from a distribution of its own is tested like those that come with bitgrain.
KEY@host runs the kernels of a device that is not here on the host's tensors (an interpreter, models of operators): that
proves their arithmetic, and nothing about the device; records and tables say so.
The exit status is 1 if any kernel fails.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from bitgrain.cli.formats import print_matrix
from bitgrain.cli.progress import progress_bar
from bitgrain.cli.tables import print_json, print_table
from bitgrain.conformance.cases import OPERATIONS, Depth
from bitgrain.conformance.suite import Result, chosen_kernels, run_kernel
from bitgrain.inspect.cells import CellRuns, run_cells
from bitgrain.inspect.matrix import support_matrix
from bitgrain.inspect.run_records import grid_key, grid_record, place_of, run_records, write_records
from bitgrain.platforms.base import Platform
from bitgrain.platforms.probe import counting_on, default_platform, present


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--platform", metavar="KEY[:GENERATION][@host]", help="whose kernels (default: the platform that is here)")
    parser.add_argument("--operation", metavar="OP", help=f"only kernels of this operation: {', '.join(OPERATIONS)}")
    parser.add_argument("--kernel", metavar="NAME", help="only this kernel")
    parser.add_argument("--quick", action="store_true", help="one case for each weight and dtype, and for each activation and dtype, instead of all")
    parser.add_argument("--record", metavar="FILE", help="add what agreed to this file, which `bitgrain formats --records` reads")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    with counting_on(args.platform) if args.platform else nullcontext():
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    platform = present(args.platform) if args.platform else default_platform()
    depth = Depth.QUICK if args.quick else Depth.FULL
    place, records, results = place_of(platform), {}, []
    for operation, kernel in chosen_kernels(platform, args.operation, args.kernel):
        with progress_bar(f"{operation} {kernel.name}") as tick:
            result = run_kernel(operation, kernel, platform, depth, tick)
        results.append(result)
        if result.cases:
            print(f"{operation} {kernel.name}: {result.cases} cases, {result.failed} failed, {result.seconds:.1f} s", file=sys.stderr, flush=True)
        if result.cases and not result.failed:
            records[grid_key(place, result.kernel, operation)] = grid_record(platform, kernel, result, depth.value)
    whole = not (args.operation or args.kernel)
    names = {r.kernel for r in results}
    with progress_bar("support matrix") as tick:
        cells = run_cells(platform, kernels=None if whole else names, tick=tick)
    records |= cells.records
    if args.record:
        # a run for one generation adds to what ran for the others
        write_records(Path(args.record), records, replaced=place if whole and ":" not in (args.platform or "") else "")
    failed = sum(r.failed for r in results) + len(cells.failures)
    matrix = [
        row for row in support_matrix(platforms=[platform.key], records={**run_records(), **records})
        if whole or names & {cell.partition(" ")[0] for cell in row["kernels"].values()}
    ]  # fmt: skip
    if args.json:
        print_json({
            "platform": place, "state": platform.state, "generation": platform.generation, "depth": depth.value, "failed": failed,
            "kernels": [r.as_dict() for r in results], "cells": len(cells.records), "cell_failures": list(cells.failures), "records": records, "matrix": matrix,
        })  # fmt: skip
    else:
        _print(platform, results, cells, matrix)
    return 1 if failed else 0


def _print(platform: Platform, results: list[Result], cells: CellRuns, matrix: list[dict[str, Any]]) -> None:
    columns = ("operation", "kernel", "cases", "refused", "worst / allowed", "failed", "seconds", "how")
    rows = [(r.operation, r.kernel, r.cases, r.refused, f"{r.error:.2g}", r.failed, f"{r.seconds:.1f}", "; ".join(filter(None, (r.proof, r.note)))) for r in results]
    print_table(f"conformance {platform.describe()}", columns, rows)
    for result in results:
        if result.failed:
            print(f"\n{result.kernel} fails {result.failed} of {result.cases} cases of {result.operation}, such as")
            print("\n".join(f"  {text}" for text in result.failures))
    print()
    if matrix:
        print_matrix(matrix)
    print(f"\n{len(cells.records)} combinations of kernel and scheme in it ran and agree with the definition, {len(cells.failures)} do not")
    print("".join(f"  {text}\n" for text in cells.failures), end="")
    wrong = sorted({r.kernel for r in results if r.failed} | {text.partition(":")[0] for text in cells.failures})
    print(f"{sum(r.cases for r in results)} cases of {len(results)} kernels: " + (f"failures in {', '.join(wrong)}" if wrong else "all agree with the definition"))
