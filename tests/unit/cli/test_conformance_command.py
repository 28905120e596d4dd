"""bitgrain conformance, as typed: table, JSON, records, exit statuses."""

import json

import pytest

from bitgrain.cli.main import main
from bitgrain.kernels.reference.step import ReferenceGate
from bitgrain.platforms.probe import default_platform

KEY = default_platform().key
GATE = ("conformance", "--operation", "gate", "--kernel", "reference.gate")


def test_table_says_what_ran_and_that_it_agrees(capsys):
    assert main(list(GATE)) == 0
    shown = capsys.readouterr().out
    assert "worst / allowed" in shown and "reference.gate" in shown and "45 cases of 1 kernels: all agree with the definition" in shown
    assert "0 combinations of kernel and scheme" in shown


def test_json_has_every_row_and_the_matrix(capsys):
    assert main(["conformance", "--quick", "--kernel", "reference.embedding", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (row,) = report["kernels"]
    assert (row["operation"], row["kernel"], row["failed"]) == ("embedding", "reference.embedding", 0) and row["cases"] > 100
    assert report["platform"] == KEY and report["depth"] == "quick" and report["cells"] > 10 and report["cell_failures"] == []
    assert all("reference.embedding" in "".join(r["kernels"].values()) for r in report["matrix"])


def test_records_are_kept_and_the_matrix_reads_them(capsys, tmp_path):
    file = tmp_path / "records.json"
    file.write_text(json.dumps({"other some.kernel: linear": {"date": "2026-01-02", "hardware": "other"}}))
    assert main(["conformance", "--quick", "--kernel", "reference.embedding", "--record", str(file)]) == 0
    records = json.loads(file.read_text())
    assert "other some.kernel: linear" in records and records[f"{KEY} reference.embedding: embedding over the grid"]["how"] == ""
    capsys.readouterr()
    assert main(["formats", "--platform", KEY, "--records", str(file), "--json"]) == 0
    runs = {row["last_run"]["embedding"] for row in json.loads(capsys.readouterr().out) if "embedding" in row["kernels"] and "reference.embedding" in row["kernels"]["embedding"]}
    date = records[f"{KEY} reference.embedding: embedding over the grid"]["date"]
    assert runs and all(run.startswith(date) for run in runs)


def test_failure_is_told_with_its_seed_and_is_not_recorded(capsys, tmp_path, monkeypatch):
    right = ReferenceGate.apply
    monkeypatch.setattr(ReferenceGate, "apply", lambda self, join, gate, up: right(self, join, gate, up) * (1.1 if join.describe() == "relu" else 1))
    file = tmp_path / "records.json"
    assert main([*GATE, "--record", str(file)]) == 1
    shown = capsys.readouterr().out
    assert "reference.gate fails 6 of 45 cases of gate" in shown and "gate of relu, float32, M = 5, columns 1201, seed 0: differs" in shown
    assert json.loads(file.read_text()) == {}
    assert main([*GATE, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["failed"] == 6


@pytest.mark.parametrize("words, said", [
    (("--kernel", "reference.liner"), "reference.linear"),
    (("--operation", "lineer"), "hadamard"),
    (("--platform", "tpu"), "no such platform"),
    (("--platform", "npu"), "npu is absent"),
    (("--operation", "gate", "--kernel", "reference.gate", "--record", "/nowhere/at/all"), "a file that can be written"),
])  # fmt: skip
def test_requests_that_cannot_be_met_are_refused(words, said, capsys):
    assert main(["conformance", *words]) == 1
    shown = capsys.readouterr().err
    assert said in shown and "Traceback" not in shown


def test_a_file_that_holds_no_records_is_refused(tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "llama"}')
    assert main(["formats", "--records", str(file)]) == 1
    assert main([*GATE, "--record", str(file)]) == 1
    assert "no records of runs" in capsys.readouterr().err and json.loads(file.read_text()) == {"model_type": "llama"}


def test_planning_table_of_a_platform_that_is_not_here(capsys):
    assert main(["formats", "--platform", "npu", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["platform"] for row in rows} == {"npu"}
    assert all("not run on hardware" in run for row in rows for run in row["last_run"].values())
