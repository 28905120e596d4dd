"""A head and an embedding resolve by their own tensors and rules, whether config.json ties them or not."""

import pytest
import torch

import bitgrain
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint

IDS = torch.arange(3, 12)
GROUP = {"weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}}


def quantized(tensors, *names):
    """The named matrices as int8 with a scale per row, as compressed-tensors stores them."""
    for name in names:
        weight = tensors.pop(f"{name}.weight").float()
        scale = weight.abs().amax(1, keepdim=True) / 127
        tensors[f"{name}.weight"] = torch.round(weight / scale).to(torch.int8)
        tensors[f"{name}.weight_scale"] = scale.bfloat16()
    return tensors


def section(*targets):
    group = {**GROUP, "targets": list(targets)}
    return {"quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed", "config_groups": {"g": group}, "ignore": []}


def saved(folder, tensors, tied, *targets):
    return write_checkpoint(folder, tensors, llama_config(tie_word_embeddings=tied, quantization_config=section(*targets)))


@pytest.mark.parametrize("tied", [True, False])
def test_a_stored_quantized_head_is_used_tied_or_not(tmp_path, tied):
    place = saved(tmp_path / "m", quantized(llama_tensors(), "lm_head"), tied, "re:lm_head")
    row = bitgrain.open_checkpoint(place).plan.modules["lm_head"]
    assert row.label == "W8A16 int8 channel" and row.tied_to is None
    other = saved(tmp_path / "other", quantized(llama_tensors(), "lm_head"), not tied, "re:lm_head")
    logits = [bitgrain.load_model(p, dtype="float32").logits(IDS) for p in (place, other)]
    assert torch.equal(*logits)


def test_a_quantized_embedding_is_shared_with_a_tied_head(tmp_path):
    tensors = quantized(llama_tensors(), "model.embed_tokens")
    head = {"weight": tensors.pop("lm_head.weight")}
    tied = bitgrain.load_model(saved(tmp_path / "tied", tensors, True, "re:model.embed_tokens"), dtype="float32")
    assert tied.plan.modules["model.embed_tokens"].label == "W8A16 int8 channel" and tied.plan.modules["lm_head"].tied_to == "model.embed_tokens"
    # the same matrix stored twice, untied, is the same model
    tensors |= {"lm_head.weight": tensors["model.embed_tokens.weight"].clone(), "lm_head.weight_scale": tensors["model.embed_tokens.weight_scale"].clone()}
    untied = bitgrain.load_model(saved(tmp_path / "untied", tensors, False, "re:model.embed_tokens", "re:lm_head"), dtype="float32")
    torch.testing.assert_close(tied.logits(IDS), untied.logits(IDS), rtol=1e-5, atol=1e-5)
    assert head["weight"].shape == tied.plan.modules["lm_head"].shape


@pytest.mark.parametrize("tied", [True, False])
def test_the_same_online_request_gives_the_same_embedding_tied_or_not(tmp_path, tied):
    tensors = llama_tensors()
    if tied:
        del tensors["lm_head.weight"]
    plan = bitgrain.open_checkpoint(write_checkpoint(tmp_path / "m", tensors, llama_config(tie_word_embeddings=tied)), rules={"model.embed_tokens": "int8"}).plan
    assert plan.modules["model.embed_tokens"].label.startswith("online int8")
    assert plan.modules["lm_head"].label == ("tied to model.embed_tokens" if tied else "dense bfloat16")
