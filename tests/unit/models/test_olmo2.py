"""OLMo 2 against the transformers library."""

import pytest
import torch

from bitgrain.kernels.reference.step import rotate
from bitgrain.models.config import ModelConfig
from bitgrain.models.registry import model_class
from tests.unit.models.fake_builder import build
from tests.unit.models.library import assert_agrees, assert_agrees_in_bfloat16, assert_saved_model_agrees, assert_steps_agree
from tests.unit.models.tiny_models import LLAMA, OLMO2, random_tensors

CASES = {
    "published": OLMO2,
    "tied": {**OLMO2, "tie_word_embeddings": True},
    "biases": {**OLMO2, "attention_bias": True},
    "one-head-per-kv": {**OLMO2, "num_key_value_heads": 4},
    "other-head-size": {**OLMO2, "head_dim": 24},
    "yarn": {**OLMO2, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "defaults": {k: v for k, v in OLMO2.items() if k not in ("hidden_act", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "num_key_value_heads")},
}


@pytest.mark.parametrize("name", CASES)
def test_logits_agree(name):
    assert_agrees(CASES[name])


def test_steps_through_the_cache_agree_with_the_whole():
    assert_steps_agree(OLMO2)


def test_bfloat16_rounds_at_the_same_places():
    assert_agrees_in_bfloat16(OLMO2)


def test_checkpoint_that_the_library_saves_runs(tmp_path):
    assert_saved_model_agrees(tmp_path, OLMO2)


def test_norms_stand_behind_attention_and_mlp_and_cover_all_heads():
    config = ModelConfig.from_dict(OLMO2, "config.json")
    shapes = {slot.name: slot.shape for slot in model_class(config.architecture).slots(config).modules if "layers.1." in slot.name and len(slot.shape) == 1}
    assert {name.removeprefix("model.layers.1."): shape for name, shape in shapes.items()} == {
        "post_attention_layernorm": (64,), "post_feedforward_layernorm": (64,), "self_attn.q_norm": (64,), "self_attn.k_norm": (32,),
    }  # fmt: skip


def test_heads_are_rotated_in_float32_and_rounded_once():
    model = build(OLMO2, random_tensors(OLMO2), dtype=torch.bfloat16)
    cosine, sine = model.rotary.angles(torch.tensor([0, 7, 61]), ((3, 64),))
    assert cosine.dtype is sine.dtype is torch.float32
    x = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = rotate(x, cosine, sine)
    assert found.dtype is torch.bfloat16 and torch.equal(found, rotate(x.float(), cosine, sine).bfloat16())
    assert build(LLAMA, random_tensors(LLAMA), dtype=torch.bfloat16).rotary.angles(torch.tensor([1]), ((1, 64),))[0].dtype is torch.bfloat16
