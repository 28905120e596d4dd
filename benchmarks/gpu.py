"""Every GPU kernel of the platform that is here: checked against the definition in float64, and timed against measured ceilings.

    python benchmarks/gpu.py [--cases "W4A16 g128" "FP8 channel" --rows 1 512 --kernels triton --tune --json]
    python benchmarks/gpu.py --check-only --platform cuda@host --tiny      (no GPU: the same code in the interpreter, nothing is timed)

"of copy" is the share of the rate at which this device copied memory in the same run; bytes are those that a call cannot avoid (the
prepared weight, x, y).  "of peak" is the share of torch's rate for 8192^3 in the arithmetic that the scheme asks for: bf16, int8 or fp8.
Times are medians of replayed graphs of many calls, one after the other, on weights that rotate through more memory than the caches hold;
"no graph" marks kernels that could not be captured.  "x bf16" is torch's bf16 linear of the same size over the kernel's time,
"x vendor" the fastest kernel of the case that is torch's or an installed package's.  "error" is the difference over what is allowed.
"""

from __future__ import annotations

import argparse
import json
import math
import platform as host
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_jobs import CASES, EXPERTS, OTHERS, TINY, WORKING_SET, Job, Jobs, Sizes
from gpu_tuning import tune
from torch import Tensor

from bitgrain.errors import BitgrainError, RunError
from bitgrain.kernels.triton import availability
from bitgrain.platforms.base import Platform
from bitgrain.platforms.probe import counting_on, parse_request, present, probe

GPUS = ("cuda", "hip", "xpu")
VENDOR = ("torch.", "cuda.", "hip.", "xpu.")
RESULTS = Path(__file__).parent / "results"
# what the issue of the GPU kernels asks for: (case, kernel's beginning, N, rows, figure, at least)
TARGETS = (("W4A16 g128", "triton.", 14336, 1, "of_copy", 0.70), ("W4A16 g128", "triton.", 14336, 512, "of_bf16", 0.60), ("FP8 channel", "", 14336, 512, "x_bf16", 1.0))


@dataclass
class Row:
    """What a job gave; 0 where something was not measured."""

    case: str
    kernel: str
    fidelity: str
    size: str
    n: int
    rows: int
    error: float | None
    us: float = 0.0
    GB_per_s: float = 0.0
    of_copy: float = 0.0
    TFLOP_per_s: float = 0.0
    of_peak: float = 0.0
    of_bf16: float = 0.0
    x_bf16: float = 0.0
    x_vendor: float = 0.0
    note: str = ""

    @property
    def right(self) -> bool:
        """It is within what is allowed, or was not held against a definition."""
        return self.error is None or self.error <= 1


class Timer:
    """Seconds of a call on one kind of device."""

    def __init__(self, device: str) -> None:
        self.module: Any = getattr(torch, device)

    def seconds(self, call: Callable[[int], object], copies: int) -> tuple[float, str]:
        """(median of replays of a graph of many calls, ""), or (of plain calls, "no graph")."""
        for turn in range(3):
            call(turn % copies)
        once = self._between(lambda: call(0))
        count = max(copies, min(200, int(3e-3 / max(once, 1e-6))))
        try:
            graph = self.module.CUDAGraph()
            with self.module.graph(graph):
                for turn in range(count):
                    call(turn % copies)
            graph.replay()
            return statistics.median(self._between(graph.replay) for _ in range(7)) / count, ""
        except (RuntimeError, AttributeError):  # something that a graph cannot hold, or a torch without graphs for the device
            self.module.synchronize()
        times = [self._between(lambda: [call(turn % copies) for turn in range(count)]) / count for _ in range(5)]
        return statistics.median(times), "no graph"

    def _between(self, call: Callable[[], object]) -> float:
        start, stop = self.module.Event(enable_timing=True), self.module.Event(enable_timing=True)
        self.module.synchronize()
        start.record()
        call()
        stop.record()
        self.module.synchronize()
        return float(start.elapsed_time(stop)) / 1e3


class Bench:
    """Checks jobs, and times them against ceilings that it measures."""

    def __init__(self, platform: Platform, timed: bool, square: int, copied: int = 1 << 30) -> None:
        """square: side of the products that ceilings are measured with; copied: bytes that are copied for them."""
        self.device, self.square, self.copied = torch.device(platform.device_type), square, copied
        self.timer = Timer(platform.device_type) if timed else None
        self.ceilings: dict[str, float] = {}
        self.baseline: dict[tuple[int, int, int], float] = {}

    def measure_ceilings(self) -> None:
        """Bytes per second of a copy; operations per second of torch's products of squares."""
        assert self.timer is not None
        source = torch.empty(self.copied, dtype=torch.uint8, device=self.device)
        copied = torch.empty_like(source)
        self.ceilings["copy"] = 2.0 * self.copied / self.timer.seconds(lambda turn: copied.copy_(source), 1)[0]
        side, one = self.square, torch.ones((), device=self.device)
        a, b = (torch.randn(side, side, device=self.device) for _ in range(2))
        products: dict[str, tuple[torch.dtype, Callable[[Tensor, Tensor], Tensor]]] = {
            "bf16": (torch.bfloat16, torch.nn.functional.linear),
            "int8": (torch.int8, lambda x, w: torch._int_mm(x, w.t())),
            "fp8": (torch.float8_e4m3fn, lambda x, w: torch._scaled_mm(x, w.t(), one, one, out_dtype=torch.bfloat16)),
        }
        for name, (dtype, product) in products.items():
            try:
                self.ceilings[name] = 2.0 * side**3 / self.timer.seconds(partial(_turned, product, a.to(dtype), b.to(dtype)), 1)[0]
            except RuntimeError as error:
                print(f"no ceiling for {name}: {str(error).splitlines()[0]}", file=sys.stderr)

    def dense_seconds(self, n: int, k: int, rows: int) -> float:
        """Of torch's bf16 linear of a size, measured once."""
        assert self.timer is not None
        if (n, k, rows) not in self.baseline:
            copies = max(1, min(16, WORKING_SET // (2 * n * k))) if rows <= 64 else 1
            weights = [torch.randn(n, k, device=self.device).bfloat16() for _ in range(copies)]
            x = torch.randn(rows, k, device=self.device).bfloat16()
            self.baseline[n, k, rows] = self.timer.seconds(lambda turn: torch.nn.functional.linear(x, weights[turn]), copies)[0]
        return self.baseline[n, k, rows]

    def run(self, job: Job) -> Row:
        """Check a job, and time it where there is a device; what it raises is its note."""
        row = Row(job.case, job.kernel, job.fidelity, job.size, job.n, job.rows, None)
        try:
            row.error = job.check() if job.check else None
            if self.timer is None:
                return row
            seconds, row.note = self.timer.seconds(job.call, job.copies)
        except Exception as error:  # one kernel that fails is a line of the table, not its end
            row.error, row.note = math.inf, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:160]
            return row
        row.us, row.GB_per_s, row.of_copy = seconds * 1e6, job.nbytes / seconds / 1e9, job.nbytes / seconds / self.ceilings["copy"]
        row.TFLOP_per_s = job.operations / seconds / 1e12
        peak = self.ceilings.get(job.arithmetic, self.ceilings["bf16"])
        row.of_peak, row.of_bf16 = job.operations / seconds / peak, job.operations / seconds / self.ceilings["bf16"]
        if job.n:
            n, k = (int(part) for part in job.size.split("x"))
            row.x_bf16 = self.dense_seconds(n, k, job.rows) / seconds
        return row


def _turned(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor, turn: int) -> Tensor:
    return product(x, w)


def with_vendor(rows: list[Row]) -> list[Row]:
    """The rows, with how each compares with the fastest vendor's kernel of its case and size."""
    best: dict[tuple[str, str, int], float] = {}
    for row in rows:
        if row.us and row.kernel.startswith(VENDOR):
            key = row.case, row.size, row.rows
            best[key] = min(best.get(key, row.us), row.us)
    for row in rows:
        row.x_vendor = best.get((row.case, row.size, row.rows), 0.0) / row.us if row.us else 0.0
    return rows


def line(row: Row) -> str:
    """One line of the printed table."""
    error = "     -" if row.error is None else f"{row.error:6.2f}"
    timed = ""
    if row.us:
        against = f"  x bf16 {row.x_bf16:5.2f}" if row.x_bf16 else ""
        vendor = f"  x vendor {row.x_vendor:5.2f}" if row.x_vendor else ""
        timed = f" {row.us:10.1f} us {row.GB_per_s:7.0f} GB/s {row.of_copy:4.0%} of copy {row.TFLOP_per_s:7.1f} TFLOP/s {row.of_peak:4.0%} of peak{against}{vendor}"
    return f"{row.case:16s} {row.kernel:32s} {row.fidelity:11s} {row.size:14s} rows {row.rows:4d} error {error}{timed}  {row.note}".rstrip()


def targets(rows: list[Row]) -> list[str]:
    """What was asked for, and the best that was reached; nothing where it was not measured."""
    said = []
    for case, start, n, count, figure, least in TARGETS:
        found = [row for row in rows if row.us and (row.case, row.n, row.rows) == (case, n, count) and row.kernel.startswith(start) and not row.kernel.startswith("(")]
        if found:
            best = max(found, key=lambda row: float(getattr(row, figure)))
            value = float(getattr(best, figure))
            said.append(f"{case}, N = {n}, {count} rows: {figure.replace('_', ' ')} {value:.2f} ({best.kernel}), asked for {least:.2f}: {'reached' if value >= least else 'NOT reached'}")
    return said


def record_of(platform: Platform, bench: Bench, text: str) -> dict[str, Any]:
    """Hardware, versions, command and ceilings."""
    names = getattr(platform, "devices", ()) or ("host tensors",)
    return {
        "platform": text, "device": names[0] if bench.timer else f"{host.machine()}, Triton's interpreter and contract models on host tensors", "features": sorted(f for f in platform.features if ":" not in f),
        "torch": torch.__version__, "device_library": torch.version.cuda or getattr(torch.version, "hip", None) or "", "triton": availability.version(), "python": host.python_version(),
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "copy_GB_per_s": round(bench.ceilings.get("copy", 0) / 1e9), **{f"{name}_TFLOP_per_s": round(rate / 1e12, 1) for name, rate in bench.ceilings.items() if name != "copy"},
    }  # fmt: skip


def write(name: str, record: dict[str, Any], rows: list[Row], left: list[str], said: list[str], seconds: float) -> Path:
    """benchmarks/results/gpu-<name>.md."""
    timed = any(row.us for row in rows)
    title = f"# GPU kernels: {name}\n\n"
    note = "" if timed else "**Not run on hardware.** Every kernel ran on host tensors, in Triton's interpreter or against models of vendors' operators; nothing was timed.\n\n"
    facts = "\n".join(f"- {key.replace('_', ' ')}: {', '.join(value) if isinstance(value, list) else f'`{value}`' if key == 'command' else value}" for key, value in record.items() if value)
    head = "| case | kernel | fidelity | N x K | rows | error / allowed |" + (" us | GB/s | of copy | TFLOP/s | of peak | x bf16 | x vendor | note |" if timed else " note |")
    table = [head, "|---" * (head.count("|") - 1) + "|"]
    for row in rows:
        error = "" if row.error is None else f"{row.error:.2f}"
        cells = [row.case, f"`{row.kernel}`", row.fidelity, row.size, str(row.rows), error]
        if timed:
            cells += [f"{row.us:.1f}", f"{row.GB_per_s:.0f}", f"{row.of_copy:.0%}", f"{row.TFLOP_per_s:.1f}", f"{row.of_peak:.0%}", f"{row.x_bf16:.2f}" if row.x_bf16 else "", f"{row.x_vendor:.2f}" if row.x_vendor else ""]
        table.append("| " + " | ".join([*cells, row.note]) + " |")
    wrong = [row for row in rows if not row.right]
    counts = f"{len(rows)} lines, {len(wrong)} of them not within what is allowed; {seconds:.0f} seconds.\n"
    missing = f"\nNot reached in the time given: {', '.join(left)}.\n" if left else ""
    goals = "\n## Targets\n\n" + "".join(f"- {text}\n" for text in said) if said else ""
    path = RESULTS / f"gpu-{name}.md"
    path.write_text(f"{title}{note}{facts}\n\n{counts}{missing}{goals}\n## Kernels\n\n" + "\n".join(table) + "\n")
    return path


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    every = [*CASES, *EXPERTS, *OTHERS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platform", default="", help="KEY, or KEY[:GENERATION]@host with --check-only; default: the GPU that is here")
    parser.add_argument("--cases", nargs="+", default=every, choices=every, metavar="CASE", help=", ".join(every))
    parser.add_argument("--kernels", nargs="+", default=[], metavar="NAME", help="beginnings of kernels' names, such as triton. or torch.fp8; default: all")
    parser.add_argument("--rows", type=int, nargs="+", help="default: 1 8 64 512 2048")
    parser.add_argument("--check-only", action="store_true", help="check, and time nothing")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for the interpreter")
    parser.add_argument("--tune", action="store_true", help="first search the tiles of Triton's linear kernels for these sizes, for half of the time")
    parser.add_argument("--budget", type=float, default=570, help="seconds after which what is left is only named (default 570)")
    parser.add_argument("--name", help="writes benchmarks/results/gpu-NAME.md; default when timing: the device's")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(given)


def chosen_platform(args: argparse.Namespace) -> tuple[str, Platform]:
    """(as it was asked for, the platform).

    Raises:
        BitgrainError: no GPU is here, the one asked for is not, or times of a simulated one are asked for.
    """
    text = args.platform
    if not text:
        reports = [probe(key) for key in GPUS]
        text = next((report.key for report in reports if report.platform is not None), "")
        if not text:
            raise RunError("benchmarks/gpu.py", "; ".join(f"{r.key} {r.state}" for r in reports), "a GPU", "run it where one is; --check-only --platform cuda@host --tiny checks the kernels on the host")
    if parse_request(text).on_host and (not args.check_only or args.tune):
        raise RunError(f"platform {text!r}", "simulated on the host: its times would say nothing", "a device", "add --check-only, without --tune")
    return text, present(text)


def selected(args: argparse.Namespace, jobs: Jobs, deadline: float, left: list[str]) -> Iterator[Job]:
    """Jobs until the deadline; the cases and sizes after it are added to `left`."""
    for case in args.cases:
        if time.monotonic() > deadline:
            left.append(case)
            continue
        for job in jobs.of(case):
            if time.monotonic() > deadline:
                left.append(f"the rest of {case}")
                break
            yield job


def main(given: Sequence[str] | None = None) -> int:
    args = arguments(given)
    try:
        text, platform = chosen_platform(args)
    except BitgrainError as error:
        print(error, file=sys.stderr)
        return 2
    with counting_on(text):
        return run(args, text, platform)


def run(args: argparse.Namespace, text: str, platform: Platform) -> int:
    """Check, time, print and write; the exit status."""
    start = time.monotonic()
    sizes = TINY if args.tiny else Sizes()
    if args.rows:
        sizes = Sizes(sizes.shapes, tuple(args.rows), sizes.experts, sizes.hadamard, sizes.attention, sizes.square)
    jobs, bench = Jobs(platform, sizes, args.kernels, not args.check_only), Bench(platform, not args.check_only, sizes.square)
    rows: list[Row] = []
    left: list[str] = []
    if bench.timer is not None:
        bench.measure_ceilings()
        if args.tune:
            left += tune(jobs, args.cases, bench.timer.seconds, start + args.budget / 2, lambda text: print(text, file=sys.stderr, flush=True))
    with torch.inference_mode():
        for job in selected(args, jobs, start + args.budget, left):
            rows.append(bench.run(job))
            if not args.json:
                print(line(rows[-1]), flush=True)
    rows, said = with_vendor(rows), targets(rows)
    record, wrong = record_of(platform, bench, text), [row for row in rows if not row.right]
    if args.json:
        print(json.dumps({**record, "left": left, "targets": said, "results": [{**asdict(row), "error": row.error if row.error is not None and math.isfinite(row.error) else None, "right": row.right} for row in rows]}))
    else:
        print("\n".join([str(record), *said, *([f"not reached: {', '.join(left)}"] if left else []), f"{len(rows)} lines, {len(wrong)} wrong"]))
    name = args.name or ("" if args.check_only else re.sub(r"[^a-z0-9]+", "-", str(record["device"]).lower()).strip("-"))
    if name:
        print(f"written: {write(name, record, rows, left, said, time.monotonic() - start)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
