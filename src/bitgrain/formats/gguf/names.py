"""Tensor names of GGUF files and what Hugging Face's checkpoints call the same tensors, per architecture.

Source: llama.cpp's tensor names (gguf package 0.19, constants and tensor_mapping); formats specification, part 2, section 1.4.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

OUTER = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}

_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_DENSE = {**_ATTENTION, **_MLP}
_OUT_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_FOUR_NORMS = {**_OUT_NORMS, "ffn_norm": "pre_feedforward_layernorm"}
_ROUTER = {"ffn_gate_inp": "mlp.gate"}
_SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_LATENT = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
# stem of a stack of experts (or of one expert, in old files): projections that it holds, in the order of its rows
_STACKS = {
    "ffn_gate_exps": ("gate",),
    "ffn_up_exps": ("up",),
    "ffn_down_exps": ("down",),
    "ffn_gate_up_exps": ("gate", "up"),
}
_SINGLE = {"ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down"}


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one of GGUF's architectures relates to Hugging Face's.

    Args:
        name:        of the class there.
        model_type:  there.
        layer:       stem of a layer's tensor to the module's name inside its layer.
        experts:     module that holds the experts; "" without any.
        projections: gate, up and down to the module's name inside an expert.
        interleaved: rows of q and k lie in the order of interleaved rotary pairs.
        norm_shift:  what the writer added to every norm's weight.
    """

    name: str
    model_type: str
    layer: Mapping[str, str] = field(default_factory=lambda: _DENSE)
    experts: str = ""
    projections: Mapping[str, str] = field(default_factory=lambda: {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"})
    interleaved: bool = False
    norm_shift: float = 0.0


LLAMA = Architecture("LlamaForCausalLM", "llama", interleaved=True)
MISTRAL = Architecture("MistralForCausalLM", "mistral", interleaved=True)
MINISTRAL = Architecture("Ministral3ForCausalLM", "ministral3", interleaved=True)
MIXTRAL = Architecture(
    "MixtralForCausalLM", "mixtral", {**_ATTENTION, "ffn_gate_inp": "block_sparse_moe.gate"}, "block_sparse_moe.experts",
    {"gate": "w1", "up": "w3", "down": "w2"}, interleaved=True,
)  # fmt: skip
DEEPSEEK2 = Architecture("DeepseekV2ForCausalLM", "deepseek_v2", {**_DENSE, **_ROUTER, **_LATENT}, "mlp.experts")
DEEPSEEK3 = Architecture("DeepseekV3ForCausalLM", "deepseek_v3", {**_DENSE, **_ROUTER, **_LATENT}, "mlp.experts")

# by general.architecture; "llama", "mistral3" and "deepseek2" cover several of the others' classes, see metadata.architecture_of
ARCHITECTURES = {
    "llama": LLAMA,
    "mistral3": MISTRAL,
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2"),
    "qwen2moe": Architecture("Qwen2MoeForCausalLM", "qwen2_moe", {**_DENSE, **_ROUTER, **_SHARED}, "mlp.experts"),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3"),
    "qwen3moe": Architecture("Qwen3MoeForCausalLM", "qwen3_moe", {**_DENSE, **_ROUTER}, "mlp.experts"),
    "gemma": Architecture("GemmaForCausalLM", "gemma", norm_shift=1.0),
    "gemma2": Architecture("Gemma2ForCausalLM", "gemma2", {**_DENSE, **_FOUR_NORMS}, norm_shift=1.0),
    "gemma3": Architecture("Gemma3ForCausalLM", "gemma3_text", {**_DENSE, **_FOUR_NORMS}, norm_shift=1.0),
    "phi3": Architecture("Phi3ForCausalLM", "phi3", {**_ATTENTION, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}),
    "glm4": Architecture(
        "Glm4ForCausalLM", "glm4",
        {**_ATTENTION, **_OUT_NORMS, "post_attention_norm": "post_self_attn_layernorm", "post_ffw_norm": "post_mlp_layernorm", "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"},
    ),
    "olmo2": Architecture("Olmo2ForCausalLM", "olmo2", {stem: name for stem, name in {**_DENSE, **_OUT_NORMS}.items() if stem not in ("attn_norm", "ffn_norm")}),
    "deepseek2": DEEPSEEK2,
}

LOCALS = ("weight", "bias", "scale", "input_scale")
_NAME = re.compile(r"(?:blk\.(?P<layer>\d{1,6})\.)?(?P<stem>[a-z0-9_]+)(?:\.(?P<expert>\d{1,6}))?\.(?P<local>weight|bias|scale|input_scale)")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stored tensor belongs.

    Args:
        module:   full module name; for experts, that of the module that holds them.
        local:    name inside the module.
        stem:     the file's name without layer and ending.
        layer:    index, None outside of layers.
        stacked:  projections that a stack of experts holds; empty for any other tensor.
    """

    module: str
    local: str
    stem: str
    layer: int | None = None
    stacked: tuple[str, ...] = ()


def place_of(name: str, architecture: Architecture) -> Place | None:
    """Where a tensor of this name belongs; None if the architecture has no such tensor."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    stem, local, expert = found["stem"], found["local"], found["expert"]
    if found["layer"] is None:
        return Place(OUTER[stem], local, stem) if stem in OUTER and expert is None else None
    layer = int(found["layer"])
    prefix = f"model.layers.{layer}"
    if architecture.experts:
        experts = f"{prefix}.{architecture.experts}"
        if expert is not None and stem in _SINGLE:
            return Place(f"{experts}.{int(expert)}.{architecture.projections[_SINGLE[stem]]}", local, stem, layer)
        if expert is None and stem in _STACKS:
            return Place(experts, local, stem, layer, tuple(architecture.projections[p] for p in _STACKS[stem]))
    if expert is not None:
        return None
    if stem == "exp_probs_b" and local == "bias" and "ffn_gate_inp" in architecture.layer:
        return Place(f"{prefix}.{architecture.layer['ffn_gate_inp']}", "e_score_correction_bias", stem, layer)
    if stem in ("attn_k_b", "attn_v_b") and "attn_kv_b" in architecture.layer and local == "weight":
        return Place(f"{prefix}.{architecture.layer['attn_kv_b']}", stem.removeprefix("attn_"), stem, layer)
    return Place(f"{prefix}.{architecture.layer[stem]}", local, stem, layer) if stem in architecture.layer else None
