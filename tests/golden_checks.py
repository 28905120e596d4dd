"""Golden cases through the public API: open the checkpoint, dequantize, compare with the producer's own values."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open

import bitgrain

GOLDEN = Path(__file__).parent / "golden"


def golden_folders(family: str) -> list[Path]:
    """Every case in tests/golden of a family."""
    return sorted(p.parent for p in GOLDEN.glob("*/case.json") if json.loads(p.read_text())["family"] == family)


def check_golden(folder: Path) -> int:
    """Compare every golden weight of a case; returns the number of comparisons, which is never 0."""
    facts = json.loads((folder / "case.json").read_text())
    checkpoint = bitgrain.open_checkpoint(folder)
    done = 0
    with safe_open(str(folder / "golden.safetensors"), "pt") as golden:
        for check in facts["checks"]:
            if check["type"] == "sha256":
                got = checkpoint.dequantize(check["name"])
                assert hashlib.sha256((got.contiguous() + 0.0).numpy().tobytes()).hexdigest() == check["of"], check["name"]
            else:
                effective = check["type"] == "effective_weight"
                got = (checkpoint.effective_weight if effective else checkpoint.dequantize)(check["name"])
                want = golden.get_tensor(f"{'effective' if effective else 'weight'}/{check['name']}")
                mine = got if check["rows"] == "all" else got[check["rows"]]
                if check["exact"]:
                    assert torch.equal(mine, want), check["name"]
                else:
                    torch.testing.assert_close(mine, want, rtol=check["rtol"], atol=check["atol"])
            done += 1
    assert done, f"{folder.name} has no check"
    return done
