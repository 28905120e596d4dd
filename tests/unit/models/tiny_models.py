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
FAMILIES = {"llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3, "qwen3_moe": QWEN3_MOE, "gpt_oss": GPT_OSS}


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
