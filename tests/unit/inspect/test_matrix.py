"""The support matrix: every format speaks for itself, and every cell names a kernel that exists."""

import json
import re
from pathlib import Path

import pytest

from bitgrain.cli.main import main
from bitgrain.formats.base import MATRIX_KINDS
from bitgrain.formats.registry import formats
from bitgrain.inspect.matrix import support_matrix
from bitgrain.inspect.matrix_pages import matrix_pages
from bitgrain.inspect.run_records import last_run, record_key
from bitgrain.kernels.base import Fidelity, LinearProblem
from bitgrain.kernels.registry import kernel_entries
from bitgrain.platforms.probe import default_platform, probe_all
from bitgrain.quantize import TARGETS
from bitgrain.weights import NO_ACTIVATION, WeightSpec

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def rows():
    return support_matrix()


def test_every_format_and_present_platform_has_rows(rows):
    here = {report.platform.key for report in probe_all() if report.platform is not None}
    assert {(r["format"], r["platform"]) for r in rows} == {(name, key) for name in (*formats().names(), "online") for key in here}


def test_every_cell_names_a_kernel_and_its_fidelity(rows):
    known = {f"{kernel.name} ({fidelity.value})" for _, _, kernel in kernel_entries() for fidelity in Fidelity}
    for row in rows:
        assert set(row["kernels"]) <= {kind.value for kind in MATRIX_KINDS}
        assert {"linear", "expert", "lm_head"} <= set(row["kernels"])
        assert {cell.removesuffix(", as linear modules") for cell in row["kernels"].values()} <= known, row
        assert not [kind for kind, cell in row["kernels"].items() if cell.endswith("linear modules") and kind != "expert"]
        assert set(row["last_run"]) == set(row["kernels"])


def test_experts_run_together_or_as_linear_modules(rows):
    together = {kernel.name for operation, _, kernel in kernel_entries() if operation == "experts"}
    cells = [row["kernels"]["expert"] for row in rows]
    assert all((cell.split(" ")[0] in together) != cell.endswith(", as linear modules") for cell in cells), cells
    # a stored value for each part's input keeps gate and up apart, whatever the kernel
    static = [row["kernels"]["expert"] for row in rows if " static" in row["scheme"]]
    assert static and all(cell.endswith(", as linear modules") for cell in static)
    assert any(cell.split(" ")[0] in together for cell in cells)


@pytest.fixture(scope="module")
def pages():
    return matrix_pages()


def test_pages_of_absent_devices_claim_no_hardware(pages):
    absent = [report.key for report in probe_all() if report.platform is None]
    assert absent
    for key in absent:
        rows = [line.split(" | ") for line in pages[f"support-matrix/{key}.md"].splitlines() if line.startswith("| ")]
        runs = {row[-1].removesuffix(" |") for row in rows} - {"last run"}
        assert runs and all("not run on hardware" in run for run in runs), runs
        # kernels by the platform's own keys, with how they were proven
        lines = [line for line in pages["support-matrix.md"].splitlines() if line.startswith(f"| {key} | ")]
        assert all("not run on hardware" in line for line in lines)
        own = {kernel.name for _, platform, kernel in kernel_entries() if platform == key}
        assert all(any(f"| {name} |" in line for line in lines) for name in own)


def test_pages_show_what_other_generations_choose(pages):
    page = pages["support-matrix/cuda.md"]
    assert "\n## " in page and "sm100" in page.partition("\n## ")[2]
    assert sum(map(len, pages.values())) < 1_000_000 and max(map(len, pages.values())) < 300_000


def test_records_of_a_simulation_are_never_those_of_a_device():
    problem = LinearProblem(WeightSpec("dense", "bfloat16", 16), NO_ACTIVATION, 8, 8, "bfloat16")
    key = record_key(problem, "cuda@host", "some.kernel")
    records = {key: {"date": "2026-01-02", "hardware": "the host, as cuda:sm90", "how": "interpreter only, not run on hardware"}}
    assert last_run(problem, "cuda", "some.kernel", records) == "interpreter only, not run on hardware (2026-01-02)"
    records[record_key(problem, "cuda", "some.kernel")] = {"date": "2026-01-03", "hardware": "A device", "how": ""}
    assert last_run(problem, "cuda", "some.kernel", records) == "2026-01-03 on A device"
    assert last_run(problem, "cuda", "other.kernel", records) == "not run on hardware"


def test_last_run_is_a_record_or_says_that_there_is_none(rows, monkeypatch):
    runs = {run for row in rows for run in row["last_run"].values()}
    assert all(re.fullmatch(r"20\d\d-\d\d-\d\d on .+|not run on hardware", run) for run in runs)
    monkeypatch.setattr("bitgrain.inspect.run_records.run_records", dict)
    assert {run for row in support_matrix() for run in row["last_run"].values()} == {"not run on hardware"}


def test_generated_page_has_every_scheme():
    page = (ROOT / "docs" / "support-matrix" / f"{default_platform().key}.md").read_text()
    missing = [label for _, config in formats().items() for label, _, _ in config.examples() if f"| {label} |" not in page]
    assert not missing, f"run tools/support_matrix.py: {missing[:3]}"
    assert all(f"| {name} |" in page for name in formats().names()) and all(f"| {t.name}: {t.meaning} |" in page for t in TARGETS.values())


@pytest.mark.parametrize("name", formats().names())
def test_examples_are_distinct_and_labelled_by_their_spec(name):
    examples = formats()[name].examples()
    assert examples and len({label for label, _, _ in examples}) == len(examples)
    for label, weight, activation in examples:
        assert weight.describe() in label
        assert activation.is_none or activation.describe() in label


SCHEMES = {
    "awq": ["int4 g128 asym"],
    "gptq": ["int4 g128", "int8 g128", "int3 g128", "int4 g128 asym act-order"],
    "compressed-tensors": [
        "W4A16 int4 g128", "W4A16 int4 g128 asym", "W8A16 int8 channel", "int8 token dynamic", "int8 tensor static", "W4A8 int4 g128, activation int8",
        "fp8_e4m3fn channel, activation fp8_e4m3fn token dynamic", "fp8_e4m3fn tensor, activation fp8_e4m3fn tensor static", "block 128x128",
    ],
    "fp8": ["block 128x128, activation fp8_e4m3fn g128 dynamic", "channel, activation fp8_e4m3fn token dynamic", "tensor static"],
    "unquantized": ["dense bfloat16"],
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMES)
def test_main_schemes_of_a_format_are_among_its_examples(name):
    labels = [label for label, _, _ in formats()[name].examples()]
    assert [s for s in SCHEMES[name] if not any(s in label for label in labels)] == []


def test_formats_command_prints_the_matrix(capsys, rows):
    assert main(["formats", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == rows
    assert main(["formats", "--dtype", "float32"]) == 0
    shown = capsys.readouterr().out
    assert all(row["scheme"] in shown for row in rows)
    assert "gptq is also called gptq_marlin" in shown
