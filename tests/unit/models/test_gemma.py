"""Gemma 1, 2 and 3 against the transformers library."""

import pytest
import torch

from bitgrain.errors import BitgrainError, ConflictingConfigError
from bitgrain.layers.rotary import LinearRope, Rope
from bitgrain.models.config import ModelConfig
from tests.unit.models.fake_builder import build
from tests.unit.models.library import (
    assert_agrees,
    assert_agrees_in_bfloat16,
    assert_matters,
    assert_saved_model_agrees,
    assert_steps_agree,
    ids_of,
)
from tests.unit.models.tiny_models import GEMMA, GEMMA2, GEMMA3, random_tensors


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


CASES = {
    "gemma": GEMMA,
    "gemma-legacy-gelu": {**GEMMA, "hidden_act": "gelu"},
    "gemma-published": {**GEMMA, "hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"},
    "gemma-untied": {**GEMMA, "tie_word_embeddings": False},
    "gemma-biases": {**GEMMA, "attention_bias": True},
    "gemma-defaults": without(GEMMA, "hidden_act", "tie_word_embeddings", "rope_theta", "rms_norm_eps", "head_dim"),
    "gemma2": GEMMA2,
    "gemma2-no-caps": {**GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gemma2-attention-cap-only": {**GEMMA2, "final_logit_softcapping": None},
    "gemma2-layer-types": {**GEMMA2, "layer_types": ["full_attention", "full_attention", "sliding_attention"]},
    "gemma2-wide-window": {**GEMMA2, "sliding_window": 100},
    "gemma2-untied-biases": {**GEMMA2, "tie_word_embeddings": False, "attention_bias": True},
    "gemma2-one-kv-head": {**GEMMA2, "num_key_value_heads": 1, "hidden_activation": "silu"},
    "gemma2-defaults": without(GEMMA2, "hidden_activation", "query_pre_attn_scalar", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping"),
    "gemma3": GEMMA3,
    "gemma3-scaled-global-rope": {**GEMMA3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "gemma3-new-spelling": {
        **without(GEMMA3, "rope_theta", "rope_local_base_freq"),
        "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 9e4}, "sliding_attention": {"rope_type": "default", "rope_theta": 700.0}},
    },
    "gemma3-yarn-global-rope": {
        **without(GEMMA3, "rope_theta"),
        "rope_parameters": {
            "full_attention": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 9e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        },
    },
    "gemma3-logit-cap": {**GEMMA3, "final_logit_softcapping": 5.0},
    "gemma3-six-layers-by-default": {**without(GEMMA3, "sliding_window_pattern"), "num_hidden_layers": 7},
    "gemma3-layer-types": {**GEMMA3, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    "gemma3-untied-biases": {**GEMMA3, "tie_word_embeddings": False, "attention_bias": True},
    "gemma3-defaults": without(GEMMA3, "rope_theta", "rope_local_base_freq", "hidden_activation", "query_pre_attn_scalar", "sliding_window", "rms_norm_eps"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_logits_agree(name):
    assert_agrees(CASES[name])


@pytest.mark.parametrize("config", [GEMMA, GEMMA2, GEMMA3], ids=lambda c: c["model_type"])
def test_steps_through_the_cache_agree_with_the_whole(config):
    assert_steps_agree(config)


@pytest.mark.parametrize("config", [GEMMA, GEMMA2, GEMMA3], ids=lambda c: c["model_type"])
def test_bfloat16_rounds_at_the_same_places(config):
    assert_agrees_in_bfloat16(config)


@pytest.mark.parametrize("config", [GEMMA, GEMMA2, GEMMA3], ids=lambda c: c["model_type"])
def test_checkpoint_that_the_library_saves_runs(tmp_path, config):
    assert_saved_model_agrees(tmp_path, config)


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (GEMMA, {"hidden_act": "silu"}),
        (GEMMA2, {"attn_logit_softcapping": None}),
        (GEMMA2, {"final_logit_softcapping": None}),
        (GEMMA2, {"query_pre_attn_scalar": 24}),
        (GEMMA2, {"sliding_window": 8}),
        (GEMMA3, {"rope_local_base_freq": 310.0}),
        (GEMMA3, {"rope_theta": 40000.0}),
        (GEMMA3, {"sliding_window_pattern": 3}),
    ],
    ids=lambda v: v["model_type"] if "model_type" in v else next(iter(v)),
)
def test_each_key_has_its_effect(config, change):
    assert_matters(config, **change)


def test_null_cap_is_none_and_absent_cap_is_the_default():
    parse = lambda **change: ModelConfig.from_dict({**GEMMA2, **change}, "config.json")  # noqa: E731
    config = parse(attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (config.attention_cap, config.logit_cap) == (None, None)
    config = ModelConfig.from_dict(without(GEMMA2, "attn_logit_softcapping", "final_logit_softcapping"), "config.json")
    assert (config.attention_cap, config.logit_cap) == (50.0, 30.0)


def test_scaling_of_global_layers_does_not_lengthen_the_context_or_reach_local_layers():
    config = ModelConfig.from_dict({**GEMMA3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "config.json")
    assert config.max_context == GEMMA3["max_position_embeddings"]
    assert config.rope == LinearRope(50000.0, 24, 8.0) and config.local_rope == Rope(300.0, 24)


@pytest.mark.parametrize(
    ("config", "change", "key"),
    [
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA3, {"sliding_window": None}, "sliding_window"),
        (GEMMA3, {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}}, "rope_parameters"),
        (GEMMA3, {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0, "alpha": 3.0}}}, "alpha"),
        (GEMMA3, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (GEMMA2, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        (GEMMA2, {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping"),
        (GEMMA2, {"rope_local_base_freq": 100.0}, "rope_local_base_freq"),
        (GEMMA2, {"sliding_window_pattern": 3}, "sliding_window_pattern"),
        (GEMMA, {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (GEMMA, {"hidden_activation": "silu"}, "hidden_activation"),
    ],
)
def test_what_the_architecture_does_not_compute_is_refused_by_key(config, change, key):
    with pytest.raises(BitgrainError, match=key):
        ModelConfig.from_dict({**config, **change}, "config.json")


def test_two_spellings_of_the_rope_that_disagree_are_refused():
    other = {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1234.0}, "sliding_attention": {"rope_type": "default"}}}
    with pytest.raises(ConflictingConfigError, match="rope_theta"):
        ModelConfig.from_dict({**GEMMA3, **other}, "config.json")


def test_embedding_scale_is_rounded_to_the_dtype_of_activations():
    config = {**GEMMA, "hidden_size": 96, "num_hidden_layers": 1}
    model = build(config, random_tensors(config), dtype=torch.bfloat16)
    seen = []
    model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.logits(ids_of(4))
    root = torch.tensor(96**0.5).bfloat16()
    assert root.item() != 96**0.5
    assert torch.equal(seen[0], model.embed(ids_of(4)) * root)
