"""A format and a backend, each a distribution of its own that pip installs, plug in by entry point; no file of bitgrain is touched."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import bitgrain
from tests.checkpoints import linear_shapes, llama_config, llama_tensors, write_checkpoint

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PACKAGES = ("toy_format", "toy_backend")


def why_not_installable() -> str:
    """Distributions are built without a network, so by what is installed here."""
    if find_spec("setuptools") is None:
        return "setuptools is not installed"
    import setuptools.command

    old = find_spec("wheel") is None and find_spec("setuptools.command.bdist_wheel") is None
    return f"setuptools {setuptools.__version__} builds no wheels by itself" if old else ""


pytestmark = pytest.mark.skipif(bool(why_not_installable()), reason=why_not_installable() or "setuptools builds wheels")


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> str:
    """The interpreter of an environment into which pip installed both distributions, beside this bitgrain."""
    folder = tmp_path_factory.mktemp("plugins")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "env"), "platbase": str(folder / "env")}))
    here = [str(Path(bitgrain.__file__).parents[1]), *dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))]
    (site / "bitgrain-of-the-tests.pth").write_text("\n".join(here) + "\n")
    interpreter = str(folder / "env" / "bin" / "python")
    copies = [str(shutil.copytree(HERE / name, folder / name)) for name in PACKAGES]  # building writes beside the sources
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    installed = subprocess.run([sys.executable, "-m", "pip", "--python", interpreter, "install", *flags, *copies], capture_output=True, text=True, check=False)
    assert installed.returncode == 0, installed.stderr
    return interpreter


@pytest.fixture(scope="module")
def run_with_plugins(python):
    def run(*arguments: str, platform: str | None = None) -> subprocess.CompletedProcess:
        env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "BITGRAIN_PLATFORM")}
        if platform:
            env["BITGRAIN_PLATFORM"] = platform
        return subprocess.run([python, *arguments], capture_output=True, text=True, env=env, check=False)

    return run


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


def test_toy_format_loads_and_computes_its_numbers(toy_checkpoint, run_with_plugins):
    result = run_with_plugins("-c", LOGITS, *map(str, toy_checkpoint))
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split()[0]) < 1e-5


def test_toy_format_is_unknown_without_its_distribution(toy_checkpoint):
    result = subprocess.run([sys.executable, "-m", "bitgrain", "inspect", str(toy_checkpoint[0])], capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "toy-steps" in result.stderr and "Traceback" not in result.stderr


def test_toy_backend_runs_what_it_can_and_the_floor_the_rest(toy_checkpoint, run_with_plugins):
    result = run_with_plugins("-c", LOGITS, *map(str, toy_checkpoint), platform="toychip")
    assert result.returncode == 0, result.stderr
    difference, kernels = result.stdout.split()
    assert float(difference) < 1e-5
    assert kernels.split(",") == ["reference.embedding", "reference.linear", "toychip.int8_weights"]


def test_explain_plans_for_the_toy_platform_and_gives_its_reasons(toy_checkpoint, run_with_plugins):
    result = run_with_plugins("-m", "bitgrain", "explain", str(toy_checkpoint[0]), "--platform", "toychip", "--json")
    assert result.returncode == 0, result.stderr
    rows = {r["modules"]: r for r in json.loads(result.stdout)["modules"]}
    assert rows["model.layers.0-1.mlp.down_proj"]["kernel"] == "toychip.int8_weights"
    refused = {c["kernel"]: c["reason"] for c in rows["lm_head"]["candidates"]}
    assert "8-bit integer" in refused["toychip.int8_weights"]


def test_mutations_of_a_toy_checkpoint_are_refused(toy_checkpoint, tmp_path, run_with_plugins):
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


@pytest.fixture(scope="module")
def accepted(run_with_plugins, tmp_path_factory):
    """(what the acceptance test of the backend says, the file with its records)."""
    records = tmp_path_factory.mktemp("records") / "toychip.json"
    result = run_with_plugins("-m", "bitgrain", "conformance", "--platform", "toychip", "--quick", "--record", str(records), "--json")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr
    return json.loads(result.stdout), records


def test_toy_backend_passes_its_acceptance_test(accepted):
    report, _ = accepted
    rows = {(row["operation"], row["kernel"]): row for row in report["kernels"]}
    own = {key: row["cases"] for key, row in rows.items() if key[1].startswith("toychip.")}
    print(own)
    assert set(own) == {("linear", "toychip.int8_weights"), ("linear", "toychip.int8_dot"), ("experts", "toychip.experts")} and all(own.values())
    assert ("linear", "reference.linear") in rows and all(row["error"] <= 1 and not row["failed"] for row in rows.values())


def test_toy_backend_is_in_the_matrix_with_its_records(accepted, run_with_plugins):
    report, records = accepted
    result = run_with_plugins("-m", "bitgrain", "formats", "--platform", "toychip", "--records", str(records), "--json")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert rows == report["matrix"]
    chosen = {(kernel.partition(" ")[0], row["last_run"][kind]) for row in rows for kind, kernel in row["kernels"].items()}
    assert {"toychip.int8_weights", "toychip.int8_dot", "toychip.experts"} <= {kernel for kernel, _ in chosen}
    assert all(re.fullmatch(r"20\d\d-\d\d-\d\d on Toychip T2", run) for kernel, run in chosen), chosen
    kept = json.loads(records.read_text())
    assert kept["toychip toychip.int8_dot: linear over the grid"]["cases"] > 0


def test_doctor_shows_the_toy_backend(run_with_plugins):
    found = json.loads(run_with_plugins("-m", "bitgrain", "doctor", "--json").stdout)
    platform = next(p for p in found["platforms"] if p["platform"] == "toychip")
    assert platform["state"] == "present" and "int8_dot" in platform["features"]
    assert ("linear", "toychip.int8_dot") in {(k["operation"], k["kernel"]) for k in found["kernels"]}
    assert "toy-steps" in found["formats"]


def test_an_older_generation_of_the_toy_chip_is_planned_for_without_its_integer_products(run_with_plugins):
    model = str(ROOT / "src" / "bitgrain" / "bundled" / "arithmetic-w8a8")
    kernels = {}
    for platform in ("toychip", "toychip:t1"):
        result = run_with_plugins("-m", "bitgrain", "explain", model, "--platform", platform, "--json")
        assert result.returncode == 0, result.stderr
        kernels[platform] = {c["kernel"]: c["reason"] for row in json.loads(result.stdout)["modules"] if "down_proj" in row["modules"] for c in row["candidates"]}
    assert kernels["toychip"]["toychip.int8_dot"] == ""
    assert kernels["toychip:t1"]["toychip.int8_dot"] == "the chip does not multiply int8 with int8" and kernels["toychip:t1"]["reference.linear"] == ""


BROKEN = """
from toy_backend import chip
whole = chip.integer_product
chip.integer_product = lambda x, codes: whole(x, codes) + (codes.shape[0] == 37)
from bitgrain.cli.main import main
raise SystemExit(main(["conformance", "--platform", "toychip", "--kernel", "toychip.int8_dot"]))
"""


def test_a_chip_that_computes_wrongly_at_one_size_fails(run_with_plugins):
    result = run_with_plugins("-c", BROKEN)
    assert result.returncode == 1, result.stdout
    assert "toychip.int8_dot fails" in result.stdout and "[37, 100] int8 channel" in result.stdout and "seed 3" in result.stdout
    assert "failures in toychip.int8_dot" in result.stdout
