"""Every input that fuzzing found worth keeping is opened or refused, in bounded time and memory."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest

from tests.hostile.fuzz_target import run_input

CORPUS = sorted((Path(__file__).parent / "corpus").iterdir())
SECONDS, BYTES = 20, 1 << 30


def test_there_is_a_corpus():
    assert len(CORPUS) >= 100


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_input_is_opened_or_refused(path, tmp_path):
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    outcome = run_input(path.read_bytes(), tmp_path)
    assert outcome == "opened" or outcome.endswith("Error")
    assert path.name.startswith("seed-") <= (outcome == "opened"), f"{path.name}: {outcome}"
    assert time.monotonic() - started < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES
