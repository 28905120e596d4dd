"""GLM-4's mixtures of experts against the transformers library."""

import pytest
import torch

from tests.unit.models.sparse_models import GLM4_MOE, assert_agrees, ids_of, loaded, stacked
from tests.unit.models.tiny_models import random_tensors

CASES = {
    "plain": {},
    "without-norms-and-biases": {"use_qk_norm": False, "attention_bias": False},
    "whole-heads-rotated": {"partial_rotary_factor": 1.0},
    "groups": {"n_group": 4, "topk_group": 2},
    "unnormalized": {"norm_topk_prob": False},
    "all-sparse-and-tied": {"first_k_dense_replace": 0, "tie_word_embeddings": True, "n_shared_experts": 3},
}


@pytest.mark.parametrize("name", CASES)
def test_logits_agree_with_the_library(tmp_path, name):
    pytest.importorskip("transformers", reason="the transformers library is not installed: nothing to compare with")
    assert_agrees(tmp_path / "m", {**GLM4_MOE, **CASES[name]})


def test_stacked_experts_give_identical_logits(tmp_path):
    tensors = random_tensors(GLM4_MOE, seed=3)
    models = [loaded(tmp_path / storage.__name__, GLM4_MOE, storage(tensors)) for storage in (dict, stacked)]
    assert torch.equal(*(model.logits(ids_of(30)) for model in models))
