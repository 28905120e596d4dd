"""Checkpoints to logits through the NPU's kernels on models of its operators, against the plain run.  Not run on hardware."""

import json

import pytest
import torch

import bitgrain
from tests.checkpoints import linear_shapes, llama_config, llama_tensors, write_checkpoint
from tests.e2e.test_every_scheme_generates import linked
from tests.e2e.test_shared_fixtures import FAMILIES, SHARED
from tests.unit.formats.word_packers import gptq_tensors, numbers
from tests.unit.models.quantized import PRODUCERS, quantize

IDS = torch.tensor([5, 9, 17, 33, 2, 7])
# 16-bit: products rounded in other places, through two layers; float32: the same integers, scaled in another order
ROOM = {"float16": 6e-3, "float32": 2e-4}
# float32: a value between two codes may go the other way and take the rows after it along
FLIPPED = 5e-2


def logits(path, dtype, fidelity="exact"):
    model = bitgrain.load_model(path, dtype=dtype, fidelity=fidelity)
    return model.logits(IDS).float(), {row["kernel"] for row in model.explain()}


def agree(got, want, dtype):
    error = (got - want).abs().amax(1) / want.abs().max()
    enough = 1.0 if dtype == "float16" else 0.5
    assert (error <= ROOM[dtype]).double().mean() >= enough and error.max() <= FLIPPED, f"{error.tolist()}"


def compare(monkeypatch, path, dtype, platform="npu@host"):
    """Names of the kernels that ran on the platform; their logits are the plain run's."""
    monkeypatch.delenv("BITGRAIN_PLATFORM", raising=False)
    want, plain = logits(path, dtype)
    assert not any(name.startswith("npu.") for name in plain)
    monkeypatch.setenv("BITGRAIN_PLATFORM", platform)
    got, names = logits(path, dtype, "fast")
    agree(got, want, dtype)
    return names


# ---- integer weights with 16-bit activations: every way to store them ----


def stored(bits, sym, v1, act_order, seed=0):
    """A small model whose linear modules are random codes."""
    tensors = {name: value for name, value in llama_tensors().items() if "_proj" not in name}
    for place, (name, (n, k)) in enumerate(linear_shapes().items()):
        v = numbers(n, k, 32, bits, zero=1 << (bits - 1) if sym else None, seed=seed + place)
        v.zeros.clamp_(min=1)  # the first version cannot store 0
        v.scales = (v.scales.float() * 0.3 / (1 << bits)).half()
        if act_order:
            v.groups = (torch.randperm(k, generator=torch.Generator().manual_seed(place)) // 32).to(v.groups.dtype)
        tensors |= {f"{name}.{local}": tensor for local, tensor in gptq_tensors(v, v1=v1).items()}
    section = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": act_order, "sym": sym, "checkpoint_format": "gptq" if v1 else "gptq_v2"}
    return tensors, llama_config(torch_dtype="float16", quantization_config=section)


@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
@pytest.mark.parametrize("v1", [True, False], ids=["v1", "v2"])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integer_family_in_every_variant(monkeypatch, tmp_path, bits, sym, v1, act_order):
    names = compare(monkeypatch, write_checkpoint(tmp_path / "m", *stored(bits, sym, v1, act_order)), "float16")
    assert "npu.weight_only" in names


def test_a48_one_zero_point_in_both_versions_of_the_file_is_one_number(monkeypatch, tmp_path):
    monkeypatch.setenv("BITGRAIN_PLATFORM", "npu@host")
    both = [logits(write_checkpoint(tmp_path / str(v1), *stored(4, False, v1, False)), "float16", "fast")[0] for v1 in (True, False)]
    assert torch.equal(*both)


@pytest.mark.parametrize("producer", ["packed-int4", "gptq", "awq"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_producers_of_packed_integers(monkeypatch, tmp_path, producer, dtype):
    writer, section = PRODUCERS[producer]
    path = write_checkpoint(tmp_path / "m", quantize(llama_tensors(), writer)[0], llama_config(quantization_config=section))
    names = compare(monkeypatch, path, dtype)
    # products with float32 inputs are nobody's but the floor's
    assert ("npu.weight_only" in names) == (dtype == "float16")


@pytest.mark.parametrize(("target", "dtype", "kernel"), [("int8", "float32", "npu.int8_matmul"), ("mxfp8", "float32", "npu.mx_matmul"), ("mxfp4", "float16", "reference.linear")])
def test_quantization_while_loading(monkeypatch, tmp_path, target, dtype, kernel):
    path = write_checkpoint(tmp_path / "m", llama_tensors(), llama_config())
    want = bitgrain.load_model(path, dtype=dtype, quantization=target).logits(IDS).float()
    monkeypatch.setenv("BITGRAIN_PLATFORM", "npu:910_95@host")
    model = bitgrain.load_model(path, dtype=dtype, quantization=target)
    assert kernel in {row["kernel"] for row in model.explain()}
    agree(model.logits(IDS).float(), want, dtype)


# ---- checkpoints of real producers, one of each family ----


def one_of_each_family():
    found = {}
    for path in sorted((SHARED / "fixtures").glob("*/case.json")):
        case = json.loads(path.read_text())
        if case["family"] in FAMILIES and case["kind"] == "model":
            found.setdefault(case["family"], path.parent)
    return found


CASES = one_of_each_family()
# where the first case of a family is not the one that the device's own products take, and what takes it
MORE = {"llmcompressor-w8a8-int8-static-asym": "npu.int8_matmul", "msmodelslim-w8a8-static-bf16": "npu.int8_matmul", "msmodelslim-moe-w8a8-dynamic": "npu.experts",
        "llmcompressor-moe-w4a16-g32": "npu.experts", "msmodelslim-w8a16": "npu.weight_only", "msmodelslim-w8a8-mxfp8": "npu.mx_matmul", "msmodelslim-w4a4-mxfp4": "npu.mx_matmul",
        "gptqmodel-gptq-v1-4bit-g32-asym-descact": "npu.weight_only", "msmodelslim-wfp8afp8-dynamic": "npu.fp8_matmul", "quark-fp8": "npu.fp8_matmul"}  # fmt: skip


@pytest.mark.skipif(not CASES, reason="../shared/fixtures is not beside this checkout")
@pytest.mark.parametrize("name", sorted({folder.name for folder in CASES.values()} | set(MORE) if CASES else []))
def test_checkpoint_of_a_family_computes_what_the_plain_run_computes(monkeypatch, tmp_path, name):
    path = linked(SHARED / "fixtures" / name, tmp_path)
    problems = [s.problem for s in bitgrain.load_model(path, dtype="float32").selections.values()]
    # a rounding before a quantized input flips codes: such models are compared in float32
    quantized = any(not p.activation.is_none for p in problems)
    names = compare(monkeypatch, path, "float32" if quantized else "float16", "npu:910_95@host")
    assert MORE.get(name) is None or MORE[name] in names
