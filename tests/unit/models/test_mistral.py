"""Ministral, Ministral 3, and further configurations of Llama 3 and Mistral, against the transformers library."""

import pytest

from bitgrain.errors import BitgrainError
from bitgrain.models.config import ModelConfig
from tests.unit.models.library import (
    assert_agrees,
    assert_agrees_in_bfloat16,
    assert_matters,
    assert_saved_model_agrees,
    assert_steps_agree,
)
from tests.unit.models.tiny_models import GROWING, LLAMA, MINISTRAL, MINISTRAL3, MISTRAL

TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

CASES = {
    "ministral": MINISTRAL,
    "ministral-layer-types": {**MINISTRAL, "layer_types": TYPES},
    "ministral-full-layers-only": {**MINISTRAL, "layer_types": ["full_attention"] * 3},
    "ministral3": MINISTRAL3,
    "ministral3-strong-growth": {**MINISTRAL3, "rope_parameters": {**GROWING, "llama_4_scaling_beta": 0.8}},
    "ministral3-window-tied": {**MINISTRAL3, "sliding_window": 7, "tie_word_embeddings": True},
    "ministral3-default-rope": {k: v for k, v in MINISTRAL3.items() if k not in ("rope_parameters", "rope_theta", "rms_norm_eps", "head_dim")},
    "mistral-nemo": {**MISTRAL, "sliding_window": None, "head_dim": 32, "rope_theta": 1e6},
    "llama-3": {**LLAMA, "rope_theta": 500000.0},
    "llama-3.1": {**LLAMA, "rope_theta": 500000.0, "rope_scaling": LLAMA31},
    "llama-3.2": {**LLAMA, "rope_theta": 500000.0, "rope_scaling": {**LLAMA31, "factor": 32.0}, "head_dim": 16, "tie_word_embeddings": True},
    "llama-3.3-new-spelling": {**{k: v for k, v in LLAMA.items() if k != "rope_theta"}, "rope_parameters": {**LLAMA31, "rope_theta": 500000.0}},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_logits_agree(name):
    assert_agrees(CASES[name])


@pytest.mark.parametrize("name", ["ministral-layer-types", "ministral3", "llama-3.2"])
def test_steps_through_the_cache_agree_with_the_whole(name):
    assert_steps_agree(CASES[name])


@pytest.mark.parametrize("name", ["ministral", "ministral3"])
def test_bfloat16_rounds_at_the_same_places(name):
    assert_agrees_in_bfloat16(CASES[name])


@pytest.mark.parametrize("name", ["ministral-layer-types", "ministral3", "llama-3.1", "llama-3.2"])
def test_checkpoint_that_the_library_saves_runs(tmp_path, name):
    assert_saved_model_agrees(tmp_path, CASES[name])


def test_queries_grow_with_their_position():
    assert_matters(MINISTRAL3, rope_parameters={**GROWING, "llama_4_scaling_beta": 0.2})


def test_ministral_without_a_window_attends_to_all_tokens():
    assert ModelConfig.from_dict({**MINISTRAL, "sliding_window": None}, "config.json").windows == (None,) * 3  # the library itself cannot run it


@pytest.mark.parametrize(
    ("config", "change", "key"),
    [
        (MINISTRAL3, {"rope_parameters": {k: v for k, v in GROWING.items() if k != "llama_4_scaling_beta"}}, "llama_4_scaling_beta"),
        (MINISTRAL3, {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        (MISTRAL, {"rope_theta": None, "rope_parameters": GROWING}, "llama_4_scaling_beta"),
        (MINISTRAL, {"layer_types": TYPES, "sliding_window": None}, "sliding_window"),
        (MINISTRAL, {"layer_types": ["chunked_attention"] * 3}, "layer_types"),
    ],
)
def test_what_the_architecture_does_not_compute_is_refused_by_key(config, change, key):
    with pytest.raises(BitgrainError, match=key):
        ModelConfig.from_dict({**config, **change}, "config.json")
