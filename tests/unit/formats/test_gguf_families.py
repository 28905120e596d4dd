"""Gemma 1 to 3, Phi-3, GLM-4-0414 and OLMo 2 as GGUF files: what they compute is what the same model computes from safetensors."""

import math
import struct

import pytest
import torch

import bitgrain
from bitgrain.errors import BitgrainError
from bitgrain.layers.rotary import LongRope
from tests.checkpoints import write_checkpoint
from tests.unit.checkpoint.gguf_bytes import random_blocks, write_gguf
from tests.unit.models.tiny_models import GEMMA, GEMMA2, GEMMA3, GLM4, OLMO2, PHI3, random_tensors

# names of a layer's tensors, written from the format's description and apart from the package's tables
SHARED = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
}  # fmt: skip
FOUR_NORMS = {"post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
STEMS = {
    "gemma": {**SHARED, "ffn_norm": "post_attention_layernorm"},
    "gemma2": {**SHARED, **FOUR_NORMS},
    "gemma3": {**SHARED, **FOUR_NORMS},
    "phi3": {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj",
        "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj",
    },
    "glm4": {
        "attn_norm": "input_layernorm", "post_attention_norm": "post_self_attn_layernorm", "ffn_norm": "post_attention_layernorm", "post_ffw_norm": "post_mlp_layernorm",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    },
    "olmo2": {**SHARED, "post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"},
}  # fmt: skip
OUTER = {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}
# the container does not state this scale: its programs take the size of a head
SCALE = {"query_pre_attn_scalar": 24}
CONFIGS = {"gemma": GEMMA, "gemma2": {**GEMMA2, **SCALE}, "gemma3": {**GEMMA3, **SCALE}, "phi3": PHI3, "glm4": GLM4, "olmo2": OLMO2}
IDS = torch.arange(30) * 7 % 96


def tensors_of(config):
    """Random weights; norms are such that 1 + w is exact in float32."""
    return {name: (256 * value).round() / 256 if value.dim() == 1 else value for name, value in random_tensors(config).items()}


def metadata_of(kind, config, **more):
    head_dim = config.get("head_dim", 16)
    keys = {
        "block_count": config["num_hidden_layers"], "context_length": config["max_position_embeddings"], "embedding_length": 64, "feed_forward_length": 112,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5, "attention.key_length": head_dim,
        "attention.value_length": head_dim, "rope.freq_base": float(config["rope_theta"]), "attn_logit_softcapping": config.get("attn_logit_softcapping"),
        "final_logit_softcapping": config.get("final_logit_softcapping"), "attention.sliding_window": config.get("sliding_window"),
        **{key.replace("__", "."): value for key, value in more.items()},
    }  # fmt: skip
    if kind == "gemma3":
        keys = {"attention.sliding_window_pattern": 2, "rope.freq_base_swa": 300.0, **keys}
    if kind == "glm4":
        keys = {"rope.dimension_count": int(head_dim * config["partial_rotary_factor"]), **keys}
    return {"general.architecture": kind, "general.quantization_version": 2, **{f"{kind}.{k}": v for k, v in keys.items() if v is not None}}


def write_model(path, kind, config, tensors, more=None, **keys):
    named = {name: stem for stem, name in STEMS[kind].items()}
    made = {}
    for name, value in tensors.items():
        module, _, local = name.rpartition(".")
        if module in OUTER:
            full = OUTER[module]
        else:
            layer, rest = module.removeprefix("model.layers.").split(".", 1)
            full = f"blk.{layer}.{named[rest]}"
        made[f"{full}.{local}"] = value + 1 if "gemma" in kind and value.dim() == 1 else value
    return write_gguf(path, metadata_of(kind, config, **keys), {**made, **(more or {})})


def logits_of(path):
    return bitgrain.load_model(path, device="cpu", dtype=torch.float32).logits(IDS)


def assert_equal_to(path, config, tensors):
    plain = write_checkpoint(path.parent / "plain", tensors, config)
    assert torch.equal(logits_of(path), logits_of(plain))


@pytest.mark.parametrize("kind", CONFIGS)
def test_model_computes_what_the_same_safetensors_model_computes(tmp_path, kind):
    config = CONFIGS[kind]
    tensors = tensors_of(config)
    path = write_model(tmp_path / "m.gguf", kind, config, tensors)
    checkpoint = bitgrain.open_checkpoint(path)
    assert checkpoint.architecture == config["architectures"][0]
    for name in (n for n in tensors if n.endswith(".weight")):
        assert torch.equal(checkpoint.dequantize(name), tensors[name]), name
    assert_equal_to(path, config, tensors)


@pytest.mark.parametrize("kind", CONFIGS)
def test_packed_matrices_run(tmp_path, kind):
    config = CONFIGS[kind]
    tensors = tensors_of(config)
    stem, shape = {"phi3": ("attn_qkv", (128, 64)), "glm4": ("ffn_up", (224, 64))}.get(kind, ("ffn_up", (112, 64)))
    more = {f"blk.1.{stem}.weight": random_blocks("Q8_0", shape), "blk.0.attn_output.weight": random_blocks("Q4_0", (64, 96 if "head_dim" in config else 64))}
    more["token_embd.weight"] = random_blocks("Q8_0", (96, 64), 2)  # the head of a Gemma too
    path = write_model(tmp_path / "m.gguf", kind, config, tensors, more)
    checkpoint = bitgrain.open_checkpoint(path)
    names = ["model.embed_tokens.weight", f"model.layers.1.{STEMS[kind][stem]}.weight", "model.layers.0.self_attn.o_proj.weight"]
    assert all("dense" not in checkpoint.plan.modules[name.removesuffix(".weight")].label for name in names)
    meant = {**tensors, **{name: checkpoint.dequantize(name) for name in names}}
    expected = logits_of(write_checkpoint(tmp_path / "plain", meant, config))
    assert (logits_of(path) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("kind", "stated", "keys", "same"),
    [
        ("gemma2", {}, {"attn_logit_softcapping": 0.0, "final_logit_softcapping": 0.0}, {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}, {}, {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}),
        ("gemma2", {}, {"attention__sliding_window": None}, {"sliding_window": 4096}),
        ("gemma3", {}, {"attention__sliding_window": None}, {"layer_types": ["full_attention"] * 3}),
        ("gemma3", {"num_hidden_layers": 6}, {"attention__sliding_window_pattern": None}, {"sliding_window_pattern": 6}),
        ("gemma3", {}, {"rope__scaling__type": "linear", "rope__scaling__factor": 8.0}, {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ("gemma3", {}, {"rope__freq_base_swa": None}, {"rope_local_base_freq": 10000.0}),
        ("gemma3", {}, {"final_logit_softcapping": 3.0}, {"final_logit_softcapping": 3.0}),
        ("gemma", {}, {"attention__head_count_kv": [2, 2], "feed_forward_length": [112, 112]}, {}),
        ("glm4", {"attention_bias": False}, {"rope__dimension_count": None}, {"partial_rotary_factor": 1.0}),
    ],
    ids=["caps-of-0", "default-caps", "default-window", "no-window", "default-pattern", "scaled-rope", "default-local-rope", "logit-cap", "lists-of-sizes", "whole-heads"],
)  # fmt: skip
def test_settings_mean_what_they_mean_in_the_other_files(tmp_path, kind, stated, keys, same):
    config = {**CONFIGS[kind], **stated}
    tensors = tensors_of(config)
    assert_equal_to(write_model(tmp_path / "m.gguf", kind, config, tensors, **keys), {**config, **same}, tensors)


def test_untied_head_is_a_stored_output(tmp_path):
    config = {**CONFIGS["gemma2"], "tie_word_embeddings": False}
    tensors = tensors_of(config)
    assert_equal_to(write_model(tmp_path / "m.gguf", "gemma2", config, tensors), config, tensors)


@pytest.mark.parametrize("original", [16, 48], ids=["beyond", "within"])
def test_stored_factors_rotate_a_part_of_each_head(tmp_path, original):
    short, long = [1.0 + 0.125 * i for i in range(6)], [1.5 + i for i in range(6)]
    factor = math.sqrt(1 + math.log(64 / original) / math.log(original))
    scaling = {"type": "longrope", "short_factor": short, "long_factor": long, "attention_factor": struct.unpack("f", struct.pack("f", factor))[0]}
    config = {**PHI3, "partial_rotary_factor": 0.75, "original_max_position_embeddings": original, "rope_scaling": scaling, "sliding_window": 9}
    tensors = tensors_of(config)
    factors = {"rope_factors_long.weight": torch.tensor(long), "rope_factors_short.weight": torch.tensor(short)}
    keys = {"rope__dimension_count": 12, "rope__scaling__original_context_length": original, "rope__scaling__attn_factor": factor}
    path = write_model(tmp_path / "m.gguf", "phi3", config, tensors, factors, **keys)
    checkpoint = bitgrain.open_checkpoint(path)
    assert set(checkpoint.plan.ignored) == set(factors)
    model = bitgrain.load_model(path, device="cpu")
    assert isinstance(model.config.rope, LongRope) and model.config.rope.head_dim == 12 and model.config.windows == (9, 9)
    expected = logits_of(write_checkpoint(tmp_path / "plain", tensors, config))
    assert (logits_of(path) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("kind", "keys", "word"),
    [
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3", {"attention__sliding_window_pattern": [True, False, True]}, "sliding_window_pattern"),
        ("gemma", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping"),
        ("phi3", {"expert_count": 4}, "expert_count"),
        ("olmo2", {"attention__sliding_window": 8}, "sliding_window"),
    ],
)
def test_settings_that_would_change_numbers_are_refused(tmp_path, kind, keys, word):
    with pytest.raises(BitgrainError, match=word):
        bitgrain.open_checkpoint(write_model(tmp_path / "m.gguf", kind, CONFIGS[kind], tensors_of(CONFIGS[kind]), **keys))


def test_half_of_a_joint_matrix_is_refused(tmp_path):
    tensors = tensors_of(PHI3)
    path = write_model(tmp_path / "m.gguf", "phi3", PHI3, tensors, {"blk.0.ffn_up.weight": torch.zeros(112, 64)})
    with pytest.raises(BitgrainError, match=r"gate_up_proj(.|\n)*\[224, 64\]"):
        bitgrain.open_checkpoint(path)
