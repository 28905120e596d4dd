"""Configurations of tiny models, and random state dicts that fit their slots."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bitgrain.formats.base import ModuleKind
from bitgrain.models.config import ModelConfig
from bitgrain.models.registry import model_class

BASE = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "rope_theta": 10000.0,
}  # fmt: skip

LLAMA = {**BASE, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
MISTRAL = {**BASE, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 7, "head_dim": 32}
QWEN2 = {**BASE, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False, "sliding_window": None}
QWEN3 = {**BASE, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 24, "tie_word_embeddings": True}
QWEN3_MOE = {
    **BASE, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "head_dim": 24, "num_experts": 6, "num_experts_per_tok": 2,
    "moe_intermediate_size": 40, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "num_hidden_layers": 3,
}  # fmt: skip
GPT_OSS = {
    **BASE, "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "head_dim": 24, "num_local_experts": 6, "num_experts_per_tok": 2,
    "intermediate_size": 40, "sliding_window": 5, "attention_bias": True, "layer_types": ["sliding_attention", "full_attention"],
    "swiglu_limit": 1.5,  # low enough that random values reach it
}  # fmt: skip
GEMMA = {**BASE, "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "head_dim": 24, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}
GEMMA2 = {
    **GEMMA, "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 20,
    "sliding_window": 7, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 9.0, "num_hidden_layers": 3,
}  # fmt: skip
GEMMA3 = {
    **GEMMA2, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "attn_logit_softcapping": None, "final_logit_softcapping": None,
    "rope_theta": 50000.0, "rope_local_base_freq": 300.0, "sliding_window_pattern": 2,
}  # fmt: skip
PHI3 = {**BASE, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "pad_token_id": 0}
GLM = {**BASE, "architectures": ["GlmForCausalLM"], "model_type": "glm", "head_dim": 24, "attention_bias": True, "partial_rotary_factor": 0.5, "pad_token_id": 0}
GLM4 = {**GLM, "architectures": ["Glm4ForCausalLM"], "model_type": "glm4"}
OLMO2 = {**BASE, "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}
MINISTRAL = {**MISTRAL, "architectures": ["MinistralForCausalLM"], "model_type": "ministral", "num_hidden_layers": 3}
# of the published Ministral 3, with a trained length that the tests' texts exceed
GROWING = {
    "rope_type": "yarn", "type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0,
    "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
MINISTRAL3 = {**BASE, "architectures": ["Ministral3ForCausalLM"], "model_type": "ministral3", "head_dim": 24, "rope_parameters": GROWING}
DENSE = {str(c["model_type"]): c for c in (GEMMA, GEMMA2, GEMMA3, PHI3, GLM, GLM4, OLMO2, MINISTRAL, MINISTRAL3)}
FAMILIES = {"llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3, "qwen3_moe": QWEN3_MOE, "gpt_oss": GPT_OSS, **DENSE}


def random_tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """A state dict of exactly the modules that the architecture's slots name."""
    parsed = ModelConfig.from_dict(config, "config.json")
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for slot in model_class(parsed.architecture).slots(parsed).modules:
        if slot.tied_to is not None:
            continue
        noise = torch.randn(slot.shape, generator=generator)
        vector = slot.kind is ModuleKind.VECTOR
        # wide enough that attention and routing are far from uniform
        tensors[slot.name if slot.bare else f"{slot.name}.weight"] = 1 + 0.2 * noise if vector else noise * (1.5 / slot.shape[-1] ** 0.5)
        if slot.bias == "required":
            tensors[f"{slot.name}.bias"] = 0.3 * torch.randn(slot.shape[0], generator=generator)
    return tensors
