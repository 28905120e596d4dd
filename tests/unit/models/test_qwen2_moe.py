"""Qwen2's mixtures of experts against the transformers library."""

import pytest
import torch

from bitgrain.errors import MissingTensorError
from bitgrain.models.config import ModelConfig
from tests.unit.models.sparse_models import QWEN2_MOE, assert_agrees, ids_of, loaded, stacked
from tests.unit.models.tiny_models import random_tensors

WINDOW = {"use_sliding_window": True, "sliding_window": 5}
CASES = {
    "plain": {},
    "normalized": {"norm_topk_prob": True},
    "dense-layer": {"mlp_only_layers": [1]},
    "sparse-step": {"decoder_sparse_step": 2},
    "all-dense": {"decoder_sparse_step": 4},
    "every-second-layer-has-a-window": WINDOW,
    "windows-end": {**WINDOW, "max_window_layers": 1},
    "window-in-named-layers": {**WINDOW, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    "without-biases": {"qkv_bias": False},
    "tied-and-many-per-token": {"tie_word_embeddings": True, "num_experts_per_tok": 5},
}


@pytest.mark.parametrize("name", CASES)
def test_logits_agree_with_the_library(tmp_path, name):
    pytest.importorskip("transformers", reason="the transformers library is not installed: nothing to compare with")
    assert_agrees(tmp_path / "m", {**QWEN2_MOE, **CASES[name]})


def test_stacked_experts_give_identical_logits(tmp_path):
    tensors = random_tensors(QWEN2_MOE, seed=3)
    models = [loaded(tmp_path / storage.__name__, QWEN2_MOE, storage(tensors)) for storage in (dict, stacked)]
    assert torch.equal(*(model.logits(ids_of(30)) for model in models))


def test_windows_are_those_of_every_second_layer_below_the_stated_one():
    windows = lambda **changes: ModelConfig.from_dict({**QWEN2_MOE, **WINDOW, "num_hidden_layers": 5, **changes}, "config.json").windows  # noqa: E731
    assert windows() == (5, None, 5, None, 5)
    assert windows(max_window_layers=3) == (5, None, 5, None, None)
    assert windows(use_sliding_window=False) == (None,) * 5


@pytest.mark.parametrize("name", ["shared_expert.up_proj", "shared_expert_gate", "gate"])
def test_an_absent_module_is_named(tmp_path, name):
    tensors = random_tensors(QWEN2_MOE)
    del tensors[f"model.layers.1.mlp.{name}.weight"]
    with pytest.raises(MissingTensorError, match=rf"layers\.1\.mlp\.{name}"):
        loaded(tmp_path / "m", QWEN2_MOE, tensors)


def test_without_a_shared_expert_there_is_neither_it_nor_its_gate(tmp_path):
    config = {**QWEN2_MOE, "shared_expert_intermediate_size": 0}
    tensors = random_tensors(config)
    assert not any("shared" in name for name in tensors)
    assert loaded(tmp_path / "m", config, tensors).logits(ids_of(5)).isfinite().all()
