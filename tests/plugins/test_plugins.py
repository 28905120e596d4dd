"""A format and a backend, each a distribution of its own, plug in by entry point; no file of bitgrain is touched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.checkpoints import linear_shapes, llama_config, llama_tensors, write_checkpoint

HERE = Path(__file__).parent


def run_with_plugins(*arguments: str, platform: str | None = None) -> subprocess.CompletedProcess:
    """Run Python in a process that sees both distributions, as if pip had installed them."""
    paths = [str(HERE / "toy_format"), str(HERE / "toy_backend"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if platform:
        env["BITGRAIN_PLATFORM"] = platform
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, check=False)


@pytest.fixture(scope="module")
def toy_checkpoint(tmp_path_factory):
    """(checkpoint in the toy format, the same numbers as a dense checkpoint)."""
    tensors, dense = llama_tensors(dtype=torch.float32), llama_tensors(dtype=torch.float32)
    for name in linear_shapes():
        weight = tensors.pop(f"{name}.weight")
        step = weight.abs().max() / 127
        steps = torch.round(weight / step).to(torch.int8)
        tensors[f"{name}.steps"], tensors[f"{name}.step"] = steps, step.reshape(1)
        dense[f"{name}.weight"] = steps.float() * step
    config = llama_config(torch_dtype="float32", quantization_config={"quant_method": "toy-steps", "skip": ["lm_head"]})
    root = tmp_path_factory.mktemp("toy")
    return write_checkpoint(root / "toy", tensors, config), write_checkpoint(root / "dense", dense, llama_config(torch_dtype="float32"))


LOGITS = """
import sys, torch, bitgrain
toy, dense = (bitgrain.load_model(p) for p in sys.argv[1:3])
ids = torch.arange(1, 12)
a, b = toy.logits(ids), dense.logits(ids)
kernels = sorted({s.kernel.name for s in toy.selections.values()})
print(float((a - b).abs().max() / b.abs().max()), ",".join(kernels))
"""


def test_toy_format_loads_and_computes_its_numbers(toy_checkpoint):
    result = run_with_plugins("-c", LOGITS, *map(str, toy_checkpoint))
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split()[0]) < 1e-5


def test_toy_format_is_unknown_without_its_distribution(toy_checkpoint):
    result = subprocess.run([sys.executable, "-m", "bitgrain", "inspect", str(toy_checkpoint[0])], capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "toy-steps" in result.stderr and "Traceback" not in result.stderr


def test_toy_backend_runs_what_it_can_and_the_floor_the_rest(toy_checkpoint):
    result = run_with_plugins("-c", LOGITS, *map(str, toy_checkpoint), platform="toychip")
    assert result.returncode == 0, result.stderr
    difference, kernels = result.stdout.split()
    assert float(difference) < 1e-5
    assert kernels.split(",") == ["reference.embedding", "reference.linear", "toychip.int8"]


def test_explain_plans_for_the_toy_platform_and_gives_its_reasons(toy_checkpoint):
    result = run_with_plugins("-m", "bitgrain", "explain", str(toy_checkpoint[0]), "--platform", "toychip", "--json")
    assert result.returncode == 0, result.stderr
    rows = {r["modules"]: r for r in json.loads(result.stdout)["modules"]}
    assert rows["model.layers.0-1.mlp.down_proj"]["kernel"] == "toychip.int8"
    refused = {c["kernel"]: c["reason"] for c in rows["lm_head"]["candidates"]}
    assert "8-bit integer" in refused["toychip.int8"]


def test_mutations_of_a_toy_checkpoint_are_refused(toy_checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    name = "model.layers.0.mlp.up_proj.step"
    tensors = load_file(toy_checkpoint[0] / "model.safetensors")
    tensors.pop(name)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    save_file(tensors, damaged / "model.safetensors")
    (damaged / "config.json").write_text((toy_checkpoint[0] / "config.json").read_text())
    result = run_with_plugins("-m", "bitgrain", "inspect", str(damaged))
    assert result.returncode == 1 and name in result.stderr and "MissingTensorError" in result.stderr
