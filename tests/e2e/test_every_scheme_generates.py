"""Every scheme of every producer whose checkpoints lie beside the checkout generates text, and none is widened in memory."""

import json
from pathlib import Path

import pytest
import torch

import bitgrain
from bitgrain.engine.llm import LLM
from bitgrain.layers.linear import Linear
from tests.e2e.test_shared_fixtures import FAMILIES, SHARED

FOLDERS = sorted(p.parent for p in (SHARED / "fixtures").glob("*/case.json"))
WHOLE = [f for f in FOLDERS if (case := json.loads((f / "case.json").read_text()))["family"] in FAMILIES and case["kind"] == "model"]
PROMPT = [5, 9, 17, 33, 2]


def linked(folder: Path, target: Path) -> Path:
    """A folder of links to the checkpoint's own files, so that golden data is not taken for a part of it."""
    for name in json.loads((folder / "case.json").read_text())["files"]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).symlink_to(folder / name)
    return target


@pytest.mark.skipif(not WHOLE, reason="../shared/fixtures is not beside this checkout")
@pytest.mark.parametrize("folder", WHOLE, ids=lambda f: f.name)
def test_checkpoint_generates_and_explains_itself(folder, tmp_path):
    model = bitgrain.load_model(linked(folder, tmp_path), dtype="float32")
    with LLM.from_parts(model, None) as llm:
        (completion,) = llm.generate([PROMPT], bitgrain.SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
    assert len(completion.token_ids) == 4
    if all(spec.element == "none" for spec in model.cache_specs.values()):
        assert completion.token_ids[0] == int(model.logits(torch.tensor(PROMPT))[-1].argmax())
    rows = model.explain()
    assert rows and all(row["kernel"] and row["fidelity"] for row in rows)
    assert all(candidate["reason"] or candidate["kernel"] == row["kernel"] for row in rows for candidate in row["candidates"])
    for layer in (m for m in model.modules() if isinstance(m, Linear)):
        _not_widened(model, layer)


def _not_widened(model, layer) -> None:
    spec = model.selections[layer.name].problem.weight
    if spec.kind == "dense":
        return
    n, k = layer.prepared.shape
    # codes, and at most a float32 scale and zero point per 16 elements, or per element where groups run along N
    room = 8 + 2 * 32 / (1 if spec.row_index else min(spec.group_size or spec.block[1] or k, k, 16)) + 8 * 24 / k
    padded = 8 * layer.prepared.nbytes / ((n + 15) // 16 * 16 * ((k + 127) // 128 * 128))
    assert padded <= room, f"{layer.name}: {padded:.1f} bits per weight, {spec.describe()}"
