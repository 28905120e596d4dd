"""Mixtral against the transformers library, and the ways in which its experts are stored."""

import pytest
import torch

import bitgrain
from bitgrain.errors import ConfigError, MissingTensorError
from tests.checkpoints import write_checkpoint
from tests.unit.models.sparse_models import MIXTRAL, assert_agrees, ids_of, loaded, renamed, stacked
from tests.unit.models.tiny_models import random_tensors

CASES = {
    "plain": {},
    "window": {"sliding_window": 5},
    "window-wide": {"sliding_window": 100, "head_dim": 24},
    "one-expert-per-token": {"num_experts_per_tok": 1},
    "all-experts": {"num_experts_per_tok": 6},
    "one-kv-head-gelu-tied": {"num_key_value_heads": 1, "hidden_act": "gelu", "tie_word_embeddings": True},
    "defaults": {"rope_theta": None, "rms_norm_eps": None},
}


@pytest.mark.parametrize("name", CASES)
def test_logits_agree_with_the_library(tmp_path, name):
    pytest.importorskip("transformers", reason="the transformers library is not installed: nothing to compare with")
    assert_agrees(tmp_path / "m", {**MIXTRAL, **CASES[name]})


def half_new(tensors):
    """The module's older name over stacked experts, as some exporters write it."""
    return {name.replace(".mlp.", ".block_sparse_moe."): tensor for name, tensor in stacked(tensors).items()}


@pytest.mark.parametrize("storage", [renamed, stacked, half_new])
def test_every_storage_of_one_model_gives_identical_logits(tmp_path, storage):
    tensors = random_tensors(MIXTRAL, seed=3)
    assert "model.layers.1.block_sparse_moe.experts.5.w2.weight" in tensors
    expected = loaded(tmp_path / "older", MIXTRAL, tensors).logits(ids_of(30))
    other = storage(tensors)
    assert other.keys() != tensors.keys()
    assert torch.equal(loaded(tmp_path / "other", MIXTRAL, other).logits(ids_of(30)), expected)


def test_the_plan_keeps_the_names_under_which_modules_are_stored(tmp_path):
    tensors = random_tensors(MIXTRAL)
    names = {storage.__name__: set(bitgrain.open_checkpoint(write_checkpoint(tmp_path / storage.__name__, storage(tensors), MIXTRAL)).plan.modules) for storage in (dict, renamed)}
    assert {n.rpartition(".")[0] for n in tensors} == names["dict"]
    assert {n.rpartition(".")[0] for n in renamed(tensors)} == names["renamed"] != names["dict"]


def test_an_absent_expert_is_named(tmp_path):
    tensors = random_tensors(MIXTRAL)
    del tensors["model.layers.1.block_sparse_moe.experts.3.w3.weight"]
    with pytest.raises(MissingTensorError, match=r"layers\.1\.block_sparse_moe\.experts\.3\.w3"):
        loaded(tmp_path / "m", MIXTRAL, tensors)


def test_routing_that_it_does_not_have_is_refused(tmp_path):
    for key, value in (("norm_topk_prob", False), ("n_group", 2), ("n_shared_experts", 1), ("mlp_only_layers", [0])):
        with pytest.raises(ConfigError, match=key):
            loaded(tmp_path / key, {**MIXTRAL, key: value}, random_tensors(MIXTRAL))
