"""benchmarks/gpu.py without a GPU: its checks run in the interpreter, its timing on a clock of the test's."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitgrain.platforms.base import Platform

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ON_HOST = Platform("cpu", "cpu", frozenset(), 1, 1 << 30)


def run(*arguments, **variables):
    environment = {**os.environ, "BITGRAIN_SELFTEST": "0", **variables}
    return subprocess.run([sys.executable, str(BENCHMARKS / "gpu.py"), *arguments], capture_output=True, text=True, timeout=120, env=environment, check=False)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


class Clock:
    """What Timer asks of torch's module for a device: every call takes one millisecond, every replay as long as its calls."""

    def __init__(self, graphs=True):
        self.passed, self.graphs, self.calls = 0.0, graphs, 0

    def count(self, milliseconds):
        self.passed += milliseconds

    def synchronize(self):
        pass

    def Event(self, enable_timing):
        return _Event(self)

    def CUDAGraph(self):
        if not self.graphs:
            raise RuntimeError("no graphs here")
        return _Graph(self)

    def graph(self, graph):
        return graph


class _Event:
    def __init__(self, clock):
        self.clock = clock

    def record(self):
        self.at = self.clock.passed

    def elapsed_time(self, other):
        return other.at - self.at


class _Graph:
    def __init__(self, clock):
        self.clock = clock

    def __enter__(self):
        self.start = self.clock.passed

    def __exit__(self, *error):
        self.took, self.clock.passed = self.clock.passed - self.start, self.start

    def replay(self):
        self.clock.passed += self.took


def on_clock(gpu, graphs=True):
    timer = gpu.Timer.__new__(gpu.Timer)
    timer.module = Clock(graphs)
    bench = gpu.Bench(ON_HOST, False, 16, 1000)
    bench.timer = timer
    return bench, timer.module


def job_of(gpu, clock, **changes):
    def call(turn):
        clock.count(1.0)

    fields = {"case": "W4A16 g128", "kernel": "triton.x", "fidelity": "exact", "size": "14336x4096", "n": 14336, "rows": 1, "call": call, "copies": 2, "check": lambda: 0.5, "nbytes": 2e6, "operations": 4e6}
    return gpu.Job(**{**fields, **changes})


def test_check_only_runs_every_kind_of_kernel_on_the_host():
    done = run("--check-only", "--platform", "cuda@host", "--tiny", "--json", "--rows", "3", "--cases", "W4A16 g128", "FP8 channel", "W8A8 token", "dense bf16", "quantize", "experts int4")
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(done.stdout)
    kernels = {row["kernel"] for row in found["results"]}
    assert {"torch.int4_weights", "torch.fp8", "torch.int8", "torch.dense"} <= kernels
    assert all(row["right"] and row["error"] is not None and row["us"] == 0 for row in found["results"]) and found["left"] == []
    assert "on host tensors" in found["device"]


def test_without_a_gpu_it_refuses_and_says_what_runs_on_the_host():
    if torch.cuda.is_available() or torch.xpu.is_available():
        pytest.skip("a GPU is here")
    done = run(BITGRAIN_PLATFORM="")
    assert done.returncode == 2 and "cuda absent" in done.stderr and "--check-only --platform cuda@host --tiny" in done.stderr


def test_times_of_a_simulated_device_are_refused():
    done = run("--platform", "cuda@host")
    assert done.returncode == 2 and "its times would say nothing" in done.stderr


@pytest.mark.parametrize("graphs", [True, False])
def test_time_of_a_call_is_the_median_of_many(graphs, gpu):
    bench, clock = on_clock(gpu, graphs)
    seconds, note = bench.timer.seconds(lambda turn: clock.count(0.25), 3)
    assert seconds == pytest.approx(0.25e-3) and note == ("" if graphs else "no graph")


def test_rates_and_ratios_follow_from_times(gpu):
    bench, clock = on_clock(gpu)
    bench.ceilings = {"copy": 4e9, "bf16": 8e9}
    bench.baseline[14336, 4096, 1] = 3e-3
    row = bench.run(job_of(gpu, clock))
    assert (row.us, row.GB_per_s, row.of_copy) == pytest.approx((1000, 2, 0.5))
    assert (row.TFLOP_per_s, row.of_peak, row.of_bf16, row.x_bf16, row.error) == pytest.approx((0.004, 0.5, 0.5, 3, 0.5))
    vendor = bench.run(job_of(gpu, clock, kernel="torch.y", call=lambda turn: clock.count(2.0)))
    rows = gpu.with_vendor([row, vendor])
    assert [one.x_vendor for one in rows] == pytest.approx([2, 1])
    assert gpu.targets(rows) == ["W4A16 g128, N = 14336, 1 rows: of copy 0.50 (triton.x), asked for 0.70: NOT reached"]


def test_kernel_that_raises_is_a_wrong_line_and_not_the_end(gpu):
    bench, clock = on_clock(gpu)

    def broken():
        raise RuntimeError("misaligned\naddress")

    row = bench.run(job_of(gpu, clock, check=broken))
    assert row.error == float("inf") and row.note == "RuntimeError: misaligned" and "inf" in gpu.line(row)


def test_ceilings_are_bytes_both_ways_and_two_operations_per_product(gpu, monkeypatch):
    bench, _ = on_clock(gpu)
    monkeypatch.setattr(bench.timer, "seconds", lambda call, copies: (call(0), (1e-3, ""))[1])
    bench.measure_ceilings()
    assert bench.ceilings["copy"] == pytest.approx(2000 / 1e-3) and bench.ceilings["bf16"] == pytest.approx(2 * 16**3 / 1e-3)


def test_what_time_did_not_reach_is_named(gpu):
    args = gpu.arguments(["--cases", "W4A16 g128", "Q4_K"])
    left = []
    assert list(gpu.selected(args, None, -1.0, left)) == [] and left == ["W4A16 g128", "Q4_K"]


def test_results_file_says_where_it_ran(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    bench, clock = on_clock(gpu)
    bench.ceilings = {"copy": 4e9, "bf16": 8e9}
    bench.baseline[14336, 4096, 1] = 3e-3
    row = bench.run(job_of(gpu, clock))
    record = gpu.record_of(ON_HOST, bench, "cpu")
    timed = gpu.write("one", record, [row], ["Q4_K"], ["a target"], 3.0).read_text()
    assert "copy GB per s: 4" in timed and "| 1000.0 |" in timed and "Not reached in the time given: Q4_K" in timed and "- a target" in timed
    row.us = 0
    assert "Not run on hardware" in gpu.write("two", record, [row], [], [], 3.0).read_text()
