"""Checkpoints of real producers, whole: weights and logits agree, and every damage is refused by name.

Uses ../shared beside the checkout when it is there; golden modules in tests/golden cover the decoding without it.
"""

import subprocess
import sys
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[3] / "shared"
# what this version reads; the other families are refused by name
FAMILIES = [
    "unquantized", "awq", "gptq", "autoround", "compressed-tensors-int", "compressed-tensors-float", "compressed-tensors-sparse", "compressed-tensors-transform", "fp8", "modelopt",
    "quark", "modelslim", "bnb", "hqq", "torchao", "quanto", "mxfp4-moe", "gguf", "aqlm", "quip", "qtip", "vptq",
]  # fmt: skip

needs_shared = pytest.mark.skipif(not (SHARED / "fixtures").is_dir(), reason="../shared/fixtures is not beside this checkout")


def run_tool(name: str, places: list[Path], families: list[str]) -> subprocess.CompletedProcess:
    options = [word for family in families for word in ("--family", family)]
    return subprocess.run([sys.executable, str(SHARED / "tools" / name), *map(str, places), *options], capture_output=True, text=True, check=False)


@needs_shared
@pytest.mark.parametrize("tool", ["check_fixtures.py", "mutate_fixtures.py"])
def test_every_case_of_the_families_passes(tool):
    result = run_tool(tool, [SHARED / "fixtures"], FAMILIES)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]

