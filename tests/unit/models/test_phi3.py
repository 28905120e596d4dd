"""Phi-3 and Phi-4 against the transformers library."""

import json

import pytest

import bitgrain
from bitgrain.errors import BitgrainError, MissingTensorError, ShapeMismatchError
from bitgrain.layers.rotary import LongRope
from bitgrain.models.config import ModelConfig
from bitgrain.models.registry import model_class
from tests.checkpoints import write_checkpoint
from tests.unit.models.fake_builder import build
from tests.unit.models.library import (
    assert_agrees,
    assert_agrees_in_bfloat16,
    assert_matters,
    assert_saved_model_agrees,
    assert_steps_agree,
    distance,
    ids_of,
    library_logits,
    library_model,
)
from tests.unit.models.tiny_models import PHI3, random_tensors

# as Phi-4-mini: three quarters of each head (12 of 16) are rotated, with factors for short and for long texts
SHORT, LONG = [1.0 + 0.1 * i for i in range(6)], [1.5 + 0.7 * i for i in range(6)]
PARTIAL = {
    **PHI3, "num_attention_heads": 4, "hidden_size": 64, "partial_rotary_factor": 0.75, "tie_word_embeddings": True, "original_max_position_embeddings": 32,
    "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG}, "max_position_embeddings": 96, "sliding_window": 100,
}  # fmt: skip

CASES = {
    "plain": PHI3,
    "window": {**PHI3, "sliding_window": 7},
    "no-window": {**PHI3, "sliding_window": None},
    "one-kv-head": {**PHI3, "num_key_value_heads": 1},
    "half-of-heads": {**PHI3, "partial_rotary_factor": 0.5},
    "longrope-beyond": PARTIAL,
    "longrope-within": {**PARTIAL, "original_max_position_embeddings": 64},
    "longrope-whole-heads": {
        **PARTIAL, "partial_rotary_factor": 1.0, "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]},
    },
    "defaults": {k: v for k, v in PHI3.items() if k not in ("hidden_act", "rms_norm_eps", "rope_theta", "tie_word_embeddings")},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_logits_agree(name):
    assert_agrees(CASES[name])


def test_factors_are_chosen_by_the_length_of_the_text():
    tensors = random_tensors(PARTIAL, seed=3)
    model, library = build(PARTIAL, tensors), library_model(PARTIAL, tensors)
    found = {count: model.logits(ids_of(count)) for count in (32, 33)}
    for count, logits in found.items():
        assert distance(logits, library_logits(library, ids_of(count))) < 1e-5
    assert distance(found[33][:32], found[32]) > 1e-3


@pytest.mark.parametrize("config", [PHI3, CASES["window"], PARTIAL], ids=["plain", "window", "longrope"])
def test_steps_through_the_cache_agree_with_the_whole(config):
    # the caches have room for more tokens than the trained length: the whole text must be longer than it too
    assert_steps_agree({**config, "original_max_position_embeddings": 16} if "rope_scaling" in config else config)


def test_bfloat16_rounds_at_the_same_places():
    assert_agrees_in_bfloat16(PHI3)


@pytest.mark.parametrize("config", [PHI3, PARTIAL], ids=["phi-3", "phi-4-mini"])
def test_checkpoint_that_the_library_saves_runs(tmp_path, config):
    checkpoint = assert_saved_model_agrees(tmp_path, config)
    assert checkpoint.plan.modules["model.layers.0.self_attn.qkv_proj"].shape == (128, 64)
    assert checkpoint.plan.modules["model.layers.0.mlp.gate_up_proj"].shape == (224, 64)


@pytest.mark.parametrize("change", [{"partial_rotary_factor": 0.75}, {"sliding_window": 9}], ids=lambda c: next(iter(c)))
def test_each_key_has_its_effect(change):
    assert_matters(PHI3, **change)


def test_rope_of_a_part_of_each_head():
    rope = ModelConfig.from_dict(PARTIAL, "config.json").rope
    assert isinstance(rope, LongRope)
    assert (rope.head_dim, rope.original, rope.factor, len(rope.short)) == (12, 32, 3.0, 6)
    older = {**PARTIAL, "rope_scaling": {**PARTIAL["rope_scaling"], "type": "su"}}
    assert ModelConfig.from_dict(older, "config.json").rope == rope


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"partial_rotary_factor": 0.2}, "partial_rotary_factor"),  # three entries, of which one has no partner
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.01}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "longrope", "short_factor": SHORT[:5], "long_factor": LONG}}, "short_factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "short_factor": SHORT, "long_factor": LONG}}, "short_factor"),
    ],
)
def test_rope_that_cannot_be_is_refused_by_key(change, key):
    with pytest.raises(BitgrainError, match=key):
        ModelConfig.from_dict({**PARTIAL, **change}, "config.json")


def test_joint_modules_are_slots_of_their_own_and_join_no_group():
    config = ModelConfig.from_dict(PHI3, "config.json")
    slots = model_class(config.architecture).slots(config)
    shapes = {slot.name.removeprefix("model.layers.0."): slot.shape for slot in slots.modules}
    assert shapes["self_attn.qkv_proj"] == (128, 64) and shapes["mlp.gate_up_proj"] == (224, 64)
    assert "self_attn.q_proj" not in shapes and slots.fusion_groups == ()


@pytest.mark.parametrize(("change", "problem"), [({"num_key_value_heads": 4}, ShapeMismatchError), ({"num_hidden_layers": 3}, MissingTensorError)])
def test_joint_module_that_does_not_fit_is_refused(tmp_path, change, problem):
    folder = write_checkpoint(tmp_path, random_tensors(PHI3), PHI3)
    (folder / "config.json").write_text(json.dumps({**PHI3, **change}))
    with pytest.raises(BitgrainError) as caught:
        bitgrain.open_checkpoint(folder)
    found = getattr(caught.value, "problems", [caught.value])
    assert any(isinstance(p, problem) for p in found) and "qkv_proj" in str(caught.value)
