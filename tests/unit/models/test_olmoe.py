"""OLMoE against the transformers library."""

import pytest
import torch

from bitgrain.errors import ConfigError
from bitgrain.models.config import ModelConfig
from tests.unit.models.sparse_models import OLMOE, assert_agrees, ids_of, loaded, stacked
from tests.unit.models.tiny_models import random_tensors

CASES = {"plain": {}, "normalized": {"norm_topk_prob": True}, "biases": {"attention_bias": True}, "one-head-per-group": {"num_key_value_heads": 4}}


@pytest.mark.parametrize("name", CASES)
def test_logits_agree_with_the_library(tmp_path, name):
    pytest.importorskip("transformers", reason="the transformers library is not installed: nothing to compare with")
    assert_agrees(tmp_path / "m", {**OLMOE, "eos_token_id": 1, **CASES[name]})


def test_stacked_experts_give_identical_logits(tmp_path):
    tensors = random_tensors(OLMOE, seed=3)
    models = [loaded(tmp_path / storage.__name__, OLMOE, storage(tensors)) for storage in (dict, stacked)]
    assert torch.equal(*(model.logits(ids_of(30)) for model in models))


def test_clipped_queries_are_refused():
    with pytest.raises(ConfigError, match="clip_qkv"):
        ModelConfig.from_dict({**OLMOE, "clip_qkv": 8.0}, "config.json")
