"""Tiny models as GGUF files: a converter for tests, written from the specification and apart from the package's tables."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tests.unit.checkpoint.gguf_bytes import Packed, write_gguf

NAMES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "Qwen3MoeForCausalLM": "qwen3moe"}
LOCALS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip


def metadata_of(config: dict) -> dict:
    """What a converter writes for a config.json."""
    kind = NAMES[config["architectures"][0]]
    keys = {
        "block_count": config["num_hidden_layers"], "context_length": config["max_position_embeddings"], "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"], "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"], "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(config["rope_theta"]), "vocab_size": config["vocab_size"],
    }  # fmt: skip
    head_dim = config.get("head_dim")
    if head_dim:
        keys |= {"attention.key_length": head_dim, "attention.value_length": head_dim, "rope.dimension_count": head_dim}
    if config.get("sliding_window"):
        keys["attention.sliding_window"] = config["sliding_window"]
    if "num_experts" in config:
        keys |= {"expert_count": config["num_experts"], "expert_used_count": config["num_experts_per_tok"], "expert_feed_forward_length": config["moe_intermediate_size"]}
    general = {"general.architecture": kind, "general.type": "model", "general.quantization_version": 2, "tokenizer.ggml.eos_token_id": 2}
    return general | {f"{kind}.{key}": value for key, value in keys.items()}


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Row (h, j hd/2 + i) goes to (h, 2 i + j)."""
    size = len(rows) // heads
    order = [h * size + j * (size // 2) + i for h in range(heads) for i in range(size // 2) for j in range(2)]
    return rows[order]


def stored(config: dict, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under a GGUF file's names, in its order of rows, experts stacked."""
    kind = NAMES[config["architectures"][0]]
    made: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, value in tensors.items():
        module, _, local = name.rpartition(".")
        if not module.startswith("model.layers."):
            made[{"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}[module] + "." + local] = value
            continue
        layer, rest = module.removeprefix("model.layers.").split(".", 1)
        if ".experts." in rest:
            expert, projection = rest.split(".experts.")[1].split(".")
            stacks.setdefault(f"blk.{layer}.ffn_{projection.removesuffix('_proj')}_exps.weight", {})[int(expert)] = value
            continue
        if kind == "llama" and rest in ("self_attn.q_proj", "self_attn.k_proj"):
            value = interleave(value, config["num_attention_heads" if rest.endswith("q_proj") else "num_key_value_heads"])
        made[f"blk.{layer}.{LOCALS[rest]}.{local}"] = value
    return made | {name: torch.stack([experts[i] for i in range(len(experts))]) for name, experts in stacks.items()}


def write_model(path: Path, config: dict, tensors: dict[str, Tensor], extra: dict | None = None, more: dict[str, Tensor | Packed] | None = None) -> Path:
    """The model as one file; `extra` metadata and `more` tensors are added or, where None, left out."""
    metadata = {k: v for k, v in (metadata_of(config) | (extra or {})).items() if v is not None}
    return write_gguf(path, metadata, {k: v for k, v in (stored(config, tensors) | (more or {})).items() if v is not None})
