"""Vendors' packages that are missing, broken or too old, as processes see them: clear answers, and no other device's kernel."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MISSING = "missing"
BROKEN = "raise OSError('libvendor.so: undefined symbol: zap\\nmore')"
# a package that has nothing of what is asked for
EMPTY = "__version__ = '0.1'"
# a device whose package registers a part of the operators
OLD_NPU = """
import torch
from types import SimpleNamespace as Space
torch.npu = Space(
    is_available=lambda: True, device_count=lambda: 1, get_device_name=lambda i=0: "Ascend910B3",
    get_device_properties=lambda i=0: Space(total_memory=1 << 35, cube_core_num=20),
)
LIBRARY = torch.library.Library("npu", "DEF")
LIBRARY.define("npu_grouped_matmul(Tensor x) -> Tensor")
LIBRARY.impl("npu_grouped_matmul", lambda x: x, "PrivateUse1")
"""


# Runs several command lines in one process, and prints [[status, standard output, standard error], …].
RUN = """
import contextlib, io, json, os, sys
import bitgrain
from bitgrain.cli.main import main
results = []
for words in json.loads(sys.argv[1]):
    os.environ.pop("BITGRAIN_PLATFORM", None)
    if "=" in words[0]:
        os.environ["BITGRAIN_PLATFORM"] = words.pop(0).partition("=")[2]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(words)
        except Exception as error:
            status = f"Traceback: {error!r}"
    results.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""
EXPLAIN = ("explain", "arithmetic-w8a8", "--json")
GENERATE = ("generate", "arithmetic-w8a8", "--prompt", "1", "--max-tokens", "1")


def run(folder: Path, package: str, source: str, *lines: tuple[str, ...]) -> list[tuple[int, str, str]]:
    """(status, output, errors) of each command line, in a process where a package is replaced by `source`; "P=KEY" in front sets the platform."""
    start, paths = "", [os.environ.get("PYTHONPATH", "")]
    if source == MISSING:
        start = f"import sys; sys.modules[{package!r}] = None\n"
    else:
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text(source)
        paths.insert(0, str(folder))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "BITGRAIN_CACHE": str(folder), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", start + RUN, json.dumps(lines)], capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def document(result: tuple[int, str, str]) -> dict:
    status, out, err = result
    assert status == 0 and not err, err or status
    return json.loads(out)


def reasons(report: dict, backend: str) -> list[str]:
    """Why kernels of a backend were not chosen."""
    return [c["reason"] for row in report["modules"] for c in row["candidates"] if c["kernel"].startswith(f"{backend}.")]


def refused(result: tuple[int, str, str], *texts: str) -> None:
    status, out, err = result
    assert status == 1 and not out and "  needed: " in err and all(text in err for text in texts), (status, out, err)


TRITON = [(MISSING, "triton is not installed"), (BROKEN, "libvendor.so: undefined symbol: zap"), (EMPTY, "lacks")]


@pytest.mark.parametrize("source, text", TRITON, ids=["missing", "broken", "empty"])
def test_triton_that_cannot_run_is_told_and_refuses_each_kernel(source, text, tmp_path):
    doctor, planned, simulated, forced = run(
        tmp_path, "triton", source, ("doctor", "--json"), (*EXPLAIN, "--platform", "cuda:sm90"), (*EXPLAIN, "--platform", "cuda@host"),
        (*EXPLAIN, "--platform", "cuda@host", "--kernel", "linear=triton.linear"),
    )  # fmt: skip
    states = {(k["platform"], k["kernel"]): k["state"] for k in document(doctor)["kernels"]}
    ours = {key: state for key, state in states.items() if key[1].startswith("triton.")}
    assert ours and all(text in state for state in ours.values()), ours
    # what is not here says nothing of the machine that is planned for
    assert document(planned)["state"] == "planned" and not [r for r in reasons(document(planned), "triton") if text in r]
    report = document(simulated)
    assert report["state"] == "simulated" and any(text in r for r in reasons(report, "triton"))
    assert not {row["kernel"].partition(".")[0] for row in report["modules"]} & {"triton", "cpu", "npu"}
    refused(forced, "triton.linear")


NPU = [
    (MISSING, "absent: torch_npu is not installed"),
    (BROKEN, "broken: importing torch_npu failed: OSError: libvendor.so: undefined symbol: zap"),
    (EMPTY, "incompatible: torch_npu brings no torch.npu"),
]


@pytest.mark.parametrize("source, state", NPU, ids=["missing", "broken", "empty"])
def test_npu_that_cannot_run_is_told_and_refused_with_every_platform(source, state, tmp_path):
    doctor, forced, device, planned = run(
        tmp_path, "torch_npu", source, ("doctor", "--json"), ("P=npu", *GENERATE), (*GENERATE, "--device", "npu:0"), (*EXPLAIN, "--platform", "npu:910b"),
    )  # fmt: skip
    assert {p["platform"]: p["state"] for p in document(doctor)["platforms"]}["npu"] == state
    refused(forced, state, "cpu: present", "cuda: ")
    refused(device, state, "cpu: present", "cuda: ")
    report = document(planned)
    assert (report["platform"], report["state"], report["generation"]) == ("npu", "planned", "910b")
    assert not [r for r in reasons(report, "npu") if "torch_npu" in r]


def test_npu_package_that_lacks_an_operator_refuses_the_kernels_that_need_it(tmp_path):
    doctor, explained = run(tmp_path, "torch_npu", OLD_NPU, ("doctor", "--json"), (*EXPLAIN, "--platform", "npu"))
    found = next(p for p in document(doctor)["platforms"] if p["platform"] == "npu")
    assert found["state"] == "present" and [f for f in found["features"] if f.startswith("op:")] == ["op:npu::npu_grouped_matmul"]
    report = document(explained)
    assert report["state"] == "present" and any("npu_quant_matmul" in r for r in reasons(report, "npu"))
    assert {row["kernel"].partition(".")[0] for row in report["modules"]} == {"reference"}


def distribution(folder: Path, name: str, points: str) -> None:
    """A distribution's metadata, as pip leaves it."""
    made = folder / f"{name}-1.0.dist-info"
    made.mkdir()
    (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (made / "entry_points.txt").write_text(points)


def test_package_that_breaks_torchs_own_import_is_named(tmp_path):
    distribution(tmp_path, "torch_npu", "[torch.backends]\ntorch_npu = torch_npu:autoload\n")
    (result,) = run(tmp_path, "torch_npu", BROKEN, ("doctor",))
    refused(result, "MissingDependencyError: torch: importing it failed", "undefined symbol: zap")


PLUGIN = """
[bitgrain.kernels]
zapchip = zapchip:KERNELS

[bitgrain.platforms]
zapchip = zapchip:PLATFORM
"""


def test_plugin_that_does_not_load_says_so_and_leaves_the_others_alone(tmp_path):
    distribution(tmp_path, "zapchip", PLUGIN)
    doctor, forced, plain, planned = run(
        tmp_path, "zapchip", BROKEN, ("doctor", "--json"), (*EXPLAIN, "--kernel", "linear=zapchip.fast"), EXPLAIN, (*EXPLAIN, "--platform", "zapchip"),
    )  # fmt: skip
    state = {p["platform"]: p["state"] for p in document(doctor)["platforms"]}["zapchip"]
    assert state.startswith("broken: loading zapchip:PLATFORM failed: OSError: libvendor.so") and list(document(doctor)["broken_kernels"]) == ["zapchip"]
    refused(forced, "no such kernel", "zapchip is broken")
    assert document(plain)["platform"] == "cpu"
    refused(planned, "broken: loading zapchip:PLATFORM failed")
