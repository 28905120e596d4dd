"""GLM-4 of both generations against the transformers library."""

import pytest
import torch

from bitgrain.errors import BitgrainError
from bitgrain.kernels.reference.step import rotate
from bitgrain.layers.rotary import Rope, Rotary
from bitgrain.models.config import ModelConfig
from bitgrain.models.registry import model_class
from tests.unit.models.library import (
    assert_agrees,
    assert_agrees_in_bfloat16,
    assert_matters,
    assert_saved_model_agrees,
    assert_steps_agree,
)
from tests.unit.models.tiny_models import GLM, GLM4

BOTH = pytest.mark.parametrize("config", [GLM, GLM4], ids=lambda c: c["model_type"])

VARIANTS = {
    "published": {},
    "no-biases": {"attention_bias": False},
    "whole-heads": {"partial_rotary_factor": 1.0},
    "tied": {"tie_word_embeddings": True},
    "one-kv-head": {"num_key_value_heads": 1},
    "other-head-size": {"head_dim": 16, "partial_rotary_factor": 0.75},
    "new-spelling": {"partial_rotary_factor": None, "rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25}},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
}  # fmt: skip
DEFAULTS = ("hidden_act", "rms_norm_eps", "head_dim", "attention_bias", "partial_rotary_factor", "rope_theta", "tie_word_embeddings", "num_key_value_heads")


@BOTH
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_agree(config, name):
    assert_agrees({key: value for key, value in {**config, **VARIANTS[name]}.items() if value is not None})


@BOTH
def test_what_the_configuration_leaves_out_agrees(config):
    assert_agrees({key: value for key, value in config.items() if key not in DEFAULTS})


@BOTH
def test_steps_through_the_cache_agree_with_the_whole(config):
    assert_steps_agree(config)


@BOTH
def test_bfloat16_rounds_at_the_same_places(config):
    assert_agrees_in_bfloat16(config)


@BOTH
def test_checkpoint_that_the_library_saves_runs(tmp_path, config):
    checkpoint = assert_saved_model_agrees(tmp_path, config)
    assert checkpoint.plan.modules["model.layers.1.mlp.gate_up_proj"].shape == (224, 64)


@BOTH
def test_each_key_has_its_effect(config):
    assert_matters(config, partial_rotary_factor=0.75)


@BOTH
def test_biases_are_those_of_q_k_and_v(config):
    parsed = ModelConfig.from_dict(config, "config.json")
    required = {slot.name.rpartition(".")[2] for slot in model_class(parsed.architecture).slots(parsed).modules if slot.bias == "required"}
    assert required == {"q_proj", "k_proj", "v_proj"}


def test_neighbouring_pairs_turn_as_complex_numbers_and_the_rest_of_a_head_stays():
    x = torch.randn(3, 2, 12, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 5, 90])
    cosine, sine = Rotary(Rope(100.0, 8), torch.float32, interleaved=True).angles(positions, ((3, 99),))
    found = rotate(x, cosine, sine, interleaved=True)
    turned = torch.view_as_complex(x[..., :8].unflatten(-1, (4, 2)).contiguous()) * torch.exp(1j * positions[:, None, None] * Rope(100.0, 8).frequencies(1))
    assert torch.allclose(found[..., :8], torch.view_as_real(turned).flatten(-2), atol=1e-5)
    assert torch.equal(found[..., 8:], x[..., 8:])


def test_key_of_another_generation_is_refused():
    with pytest.raises(BitgrainError, match="sliding_window"):
        ModelConfig.from_dict({**GLM4, "sliding_window": 8}, "config.json")
