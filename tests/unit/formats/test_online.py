"""Quantizing a 16-bit checkpoint while it loads."""

import pytest
import torch

import bitgrain
from bitgrain.errors import BadValueError, ConflictingConfigError, RequestError
from bitgrain.layers.linear import Linear
from bitgrain.quantize import TARGETS, quantize_nearest
from tests.checkpoints import edited, linear_shapes, llama_tensors, small_llama

DOWN = "model.layers.1.mlp.down_proj"
Q = "model.layers.0.self_attn.q_proj"
IDS = torch.arange(3, 20)


@pytest.fixture
def dense(tmp_path):
    return small_llama(tmp_path / "dense")


@pytest.mark.parametrize("name", TARGETS)
def test_linear_modules_become_the_target_and_nothing_else_does(dense, name):
    checkpoint = bitgrain.open_checkpoint(dense, quantization=name)
    plan = checkpoint.plan
    quantized = {module for module, row in plan.modules.items() if row.label.startswith("online")}
    assert quantized == set(linear_shapes())
    assert f"--quantization {name}" in plan.modules[DOWN].why and "stays as it is" in plan.modules["lm_head"].why
    want = quantize_nearest(llama_tensors()[f"{DOWN}.weight"], TARGETS[name].weight)
    row = plan.modules[DOWN]
    assert row.scheme.weight_spec == want.spec and row.scheme.activation == TARGETS[name].activation
    assert torch.equal(checkpoint.dequantize(f"{DOWN}.weight"), want.dequantize())
    assert torch.equal(checkpoint.dequantize("lm_head.weight"), llama_tensors()["lm_head.weight"].float())


@pytest.mark.parametrize("name", TARGETS)
def test_logits_stay_close_to_those_of_the_dense_model(dense, name):
    model = bitgrain.load_model(dense, dtype="float32", quantization=name)
    want = bitgrain.load_model(dense, dtype="float32").logits(IDS)
    got = model.logits(IDS)
    cosine = torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), dim=0)
    assert cosine > (0.96 if TARGETS[name].weight.bits == 4 else 0.998), f"{cosine:.4f}"
    assert not torch.equal(got, want)


def test_rules_win_over_ignore_and_ignore_over_the_target(dense):
    plan = bitgrain.open_checkpoint(dense, quantization="int8", ignore=["q_proj", "*.1.mlp.*"], rules={"*.down_proj": "mxfp4", "*.v_proj": "none", "lm_head": "fp8"}).plan
    labels = {name: row.label.partition(":")[0] for name, row in plan.modules.items()}
    assert labels[DOWN] == "online mxfp4" and labels["model.layers.1.mlp.up_proj"] == "dense bfloat16"
    assert labels[Q] == labels["model.layers.0.self_attn.v_proj"] == "dense bfloat16"
    assert labels["model.layers.0.self_attn.o_proj"] == "online int8" and labels["lm_head"] == "online fp8"


def test_rules_alone_quantize_only_what_they_name(dense):
    plan = bitgrain.open_checkpoint(dense, rules={"mlp": "int4", "model.embed_tokens": "int8"}).plan
    quantized = {name for name, row in plan.modules.items() if row.label.startswith("online")}
    assert quantized == {n for n in linear_shapes() if ".mlp." in n} | {"model.embed_tokens"}
    model = bitgrain.load_model(dense, rules={"model.embed_tokens": "int8"})
    assert torch.isfinite(model.logits(IDS)).all()


def test_a_rule_that_matches_nothing_is_reported(dense):
    plan = bitgrain.open_checkpoint(dense, quantization="int8", ignore=["q_projj"]).plan
    assert any("q_projj" in note and "q_proj" in note for note in plan.notes)


def test_no_quantized_module_is_held_in_16_bits(dense):
    """Of what the model's layers hold, every module of 4 bits takes about 4 bits, and half a bit of scales."""
    model = bitgrain.load_model(dense, quantization="mxfp4")
    quantized = [layer for layer in model.modules() if isinstance(layer, Linear) and layer.name != "lm_head"]
    assert len(quantized) == 8  # fused q, k, v; o; fused gate, up; down; in two layers
    for layer in quantized:
        n, k = layer.prepared.shape
        assert 8 * layer.nbytes / (n * k) < 4.7, layer.name


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path, dense):
    quantized = tmp_path / "fp8"

    def to_fp8(tensors):
        for name in linear_shapes():
            weight = tensors[f"{name}.weight"].float()
            scale = weight.abs().amax() / 448
            tensors[f"{name}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}.weight_scale"] = scale

    edited(dense, quantized, to_fp8, lambda c: c.update(quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"}))
    assert bitgrain.open_checkpoint(quantized, quantization="fp8").plan.format == "fp8"  # the format's own name is a hint
    with pytest.raises(ConflictingConfigError, match="int4"):
        bitgrain.open_checkpoint(quantized, quantization="int4")
    with pytest.raises(RequestError, match="quantized already"):
        bitgrain.open_checkpoint(quantized, rules={"*": "int4"})


def test_what_cannot_be_honoured_is_refused(dense, tmp_path):
    with pytest.raises(RequestError, match="int9"):
        bitgrain.open_checkpoint(dense, quantization="int9")
    with pytest.raises(RequestError, match="rule '\\*'"):
        bitgrain.open_checkpoint(dense, rules={"*": "int9"})
    with pytest.raises(RequestError, match="ignore"):
        bitgrain.open_checkpoint(dense, ignore=["q_proj"])
    damaged = edited(dense, tmp_path / "nan", lambda t: t[f"{DOWN}.weight"][0].fill_(float("nan")))
    with pytest.raises(BadValueError, match=DOWN):
        bitgrain.load_model(damaged, quantization="int8")


def test_dequantize_keeps_the_numbers_in_16_bits(dense):
    model = bitgrain.load_model(dense, dtype="float32", quantization="int4", dequantize=True)
    plain = bitgrain.load_model(dense, dtype="float32", quantization="int4")
    torch.testing.assert_close(model.logits(IDS), plain.logits(IDS), rtol=1e-4, atol=1e-4)
    kernels = {row["problem"].split("]")[1].split(",")[0].strip() for row in model.explain() if "linear" in row["problem"]}
    assert kernels == {"float32", "bfloat16"}  # what was int4 is dense now; the head was dense before
