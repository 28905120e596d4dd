"""A sharded checkpoint of more than 500 GB (sparse files) is inspected from headers, in seconds."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import make_checkpoint


@pytest.fixture(scope="module")
def sparse_checkpoint(tmp_path_factory):
    out = tmp_path_factory.mktemp("sparse")
    total = make_checkpoint.write_checkpoint(out, make_checkpoint.SHAPES["405b"], sparse=True)
    if sum(f.stat().st_blocks * 512 for f in out.glob("*.safetensors")) > 1e9:
        pytest.skip("this file system has no sparse files")
    assert total > 500e9
    return out, total


def test_inspect_of_500_gb_takes_seconds_and_reads_no_data(sparse_checkpoint):
    out, total = sparse_checkpoint
    start = time.monotonic()
    result = subprocess.run([sys.executable, "-m", "bitgrain", "inspect", str(out), "--json"], capture_output=True, text=True, check=False)
    seconds = time.monotonic() - start
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["totals"]["bytes"] == total
    assert seconds < 10


def test_plan_reads_only_headers(sparse_checkpoint, monkeypatch):
    import bitgrain
    from bitgrain.checkpoint import files

    def refuse(*_):
        raise AssertionError("data were read")

    monkeypatch.setattr(files, "map_tensor", refuse)
    plan = bitgrain.open_checkpoint(sparse_checkpoint[0]).plan
    assert len(plan.modules) > 1000 and len(plan.hash) == 64
