"""config.json of published models, keys that only training or other programs read included: each is read, and as what."""

import pytest

from bitgrain.errors import BitgrainError
from bitgrain.layers.rotary import LinearRope, Llama3Rope, LongRope, Rope, YarnRope
from bitgrain.models.config import ModelConfig

COMMON = {"attention_dropout": 0.0, "initializer_range": 0.02, "torch_dtype": "bfloat16", "transformers_version": "4.50.0", "use_cache": True, "bos_token_id": 2}
GEMMA2 = {
    **COMMON, "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "attention_bias": False, "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid",
    "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 128, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 4608, "intermediate_size": 36864, "max_position_embeddings": 8192, "num_attention_heads": 32, "num_hidden_layers": 46,
    "num_key_value_heads": 16, "pad_token_id": 0, "query_pre_attn_scalar": 144, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000,
}  # fmt: skip
GEMMA3 = {
    **COMMON, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "attention_bias": False, "attn_logit_softcapping": None,
    "cache_implementation": "hybrid", "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152, "intermediate_size": 6912, "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
    "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
}  # fmt: skip
GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144,
    "initializer_range": 0.02, "mm_tokens_per_image": 256, "model_type": "gemma3", "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model", "num_attention_heads": 16},
}  # fmt: skip
PHI3 = {
    **COMMON, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": False, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "embd_pdrop": 0.0, "resid_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "original_max_position_embeddings": 4096, "pad_token_id": 32000, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "vocab_size": 32064,
}  # fmt: skip
FACTORS = {"long_factor": [1.5] * 48, "short_factor": [1.0] * 48}
PHI4_MINI = {
    **PHI3, "eos_token_id": 199999, "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False, "max_position_embeddings": 131072,
    "num_attention_heads": 24, "num_key_value_heads": 8, "partial_rotary_factor": 0.75, "rope_scaling": {**FACTORS, "type": "longrope"}, "sliding_window": 262144,
    "tie_word_embeddings": True, "vocab_size": 200064,
}  # fmt: skip
GLM4 = {
    **COMMON, "architectures": ["Glm4ForCausalLM"], "model_type": "glm4", "attention_bias": False, "eos_token_id": [151329, 151336, 151338], "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 13696, "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 40,
    "num_key_value_heads": 2, "pad_token_id": 151329, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "vocab_size": 151552,
}  # fmt: skip
OLMO2 = {
    **COMMON, "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "attention_bias": False, "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": 100277,
    "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False, "vocab_size": 100352,
}  # fmt: skip
LLAMA = {
    **COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
    "hidden_size": 2048, "head_dim": 64, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 16,
    "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
}  # fmt: skip
SMALL = {
    "architectures": ["Mistral3ForConditionalGeneration"], "image_token_index": 10, "model_type": "mistral3", "multimodal_projector_bias": False, "projector_hidden_act": "gelu",
    "spatial_merge_size": 2, "torch_dtype": "bfloat16", "vision_feature_layer": -1, "vision_config": {"hidden_size": 1024, "model_type": "pixtral"},
    "text_config": {
        "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 32768,
        "max_position_embeddings": 131072, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 1000000000.0, "sliding_window": None, "use_cache": True, "vocab_size": 131072,
    },
}  # fmt: skip
GROWING = {
    "beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384,
    "rope_theta": 1000000.0, "rope_type": "yarn", "type": "yarn",
}  # fmt: skip
MINISTRAL3 = {
    **SMALL, "dtype": "bfloat16", "tie_word_embeddings": True,
    "text_config": {
        **SMALL["text_config"], "hidden_size": 3072, "intermediate_size": 9216, "max_position_embeddings": 262144, "model_type": "ministral3", "num_hidden_layers": 26,
        "rope_theta": None, "rope_parameters": GROWING, "tie_word_embeddings": True,
    },
}  # fmt: skip


def facts(config, *names):
    parsed = ModelConfig.from_dict(config, "config.json", ["language_model.model.layers.0.input_layernorm.weight", "language_model.lm_head.weight"])
    return tuple(getattr(parsed, name) for name in names)


def test_gemma_2_27b():
    found = facts(GEMMA2, "attention_scale", "attention_cap", "logit_cap", "windows", "embedding_scale", "tie_word_embeddings", "rope")
    assert found == (1 / 12, 50.0, 30.0, (4096, None) * 23, 4608**0.5, True, Rope(10000.0, 128))


def test_gemma_3_1b():
    found = facts(GEMMA3, "attention_scale", "attention_cap", "logit_cap", "windows", "rope", "local_rope", "eos_token_ids")
    assert found == (1 / 16, None, None, (*((512,) * 5 + (None,)) * 4, 512, 512), Rope(1e6, 256), Rope(1e4, 256), (1, 106))


def test_gemma_3_4b():
    found = facts(GEMMA3_4B, "architecture", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "rope", "local_rope", "max_context")
    assert found == ("Gemma3ForCausalLM", 2560, 8, 4, 256, 262208, LinearRope(1e6, 256, 8.0), Rope(1e4, 256), 131072)
    assert facts(GEMMA3_4B, "dtype", "eos_token_ids") == ("bfloat16", (1, 106))


def test_phi_3_mini():
    short = {**PHI3, "max_position_embeddings": 4096, "rope_scaling": None, "sliding_window": 2047}
    assert facts(short, "rope", "windows", "max_context") == (Rope(10000.0, 96), (2047,) * 32, 4096)
    long = {**PHI3, "max_position_embeddings": 131072, "rope_scaling": {**FACTORS, "type": "longrope"}, "sliding_window": 262144}
    assert facts(long, "rope") == (LongRope(10000.0, 96, (1.0,) * 48, (1.5,) * 48, 4096, 32.0),)


def test_phi_4():
    medium = {**PHI3, "hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 10, "max_position_embeddings": 16384, "rope_theta": 250000, "sliding_window": None}
    medium |= {"original_max_position_embeddings": 16384, "rope_scaling": None}
    assert facts(medium, "rope", "windows") == (Rope(250000.0, 128), (None,) * 32)
    assert facts(PHI4_MINI, "rope", "head_dim", "tie_word_embeddings") == (LongRope(10000.0, 96, (1.0,) * 48, (1.5,) * 48, 4096, 32.0), 128, True)


def test_glm_4():
    assert facts(GLM4, "rope", "head_dim", "qkv_bias", "o_bias") == (Rope(10000.0, 64), 128, False, False)
    older = {**GLM4, "architectures": ["GlmForCausalLM"], "model_type": "glm", "attention_bias": True, "rms_norm_eps": 1.5625e-7}
    assert facts(older, "rope", "qkv_bias", "o_bias", "rms_norm_eps") == (Rope(10000.0, 64), True, False, 1.5625e-7)


def test_olmo_2_7b():
    assert facts(OLMO2, "rope", "wide_norm", "max_context") == (Rope(500000.0, 128), True, 4096)


def test_llama_3_2_1b():
    assert facts(LLAMA, "rope", "tie_word_embeddings", "max_context") == (Llama3Rope(500000.0, 64, 32.0, 1.0, 4.0, 8192), True, 131072)


def test_mistral_small_3_1():
    found = facts(SMALL, "architecture", "rope", "windows", "head_dim", "tie_word_embeddings", "query_growth")
    assert found == ("MistralForCausalLM", Rope(1e9, 128), (None,) * 40, 128, False, None)


def test_ministral_3_3b():
    architecture, rope, growth, tied, context = facts(MINISTRAL3, "architecture", "rope", "query_growth", "tie_word_embeddings", "max_context")
    assert (architecture, tied, context) == ("Ministral3ForCausalLM", True, 262144)
    assert isinstance(rope, YarnRope) and (rope.factor, rope.original, rope.attention_factor) == (16.0, 16384, 1.0)
    assert (growth.beta, growth.original) == (0.1, 16384)


@pytest.mark.parametrize(
    ("config", "key"), [(PHI4_MINI, "lm_head_bias"), (PHI4_MINI, "full_attn_mod"), (PHI4_MINI, "interpolate_factor"), (GEMMA2, "scale_emb"), (GLM4, "use_qk_norm"), (OLMO2, "clip_qkv")]
)
def test_other_values_of_keys_that_are_not_computed_are_refused(config, key):
    with pytest.raises(BitgrainError, match=key):
        ModelConfig.from_dict({**config, "max_position_embeddings": 8192, key: 7}, "config.json")
