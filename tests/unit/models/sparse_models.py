"""Tiny models with experts: configurations, the transformers library's own models of them, and checkpoints on disk."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch
from torch import Tensor

import bitgrain
from tests.checkpoints import write_checkpoint
from tests.unit.models.test_causal_lm import in_steps
from tests.unit.models.tiny_models import BASE, random_tensors

MIXTRAL = {
    **BASE, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 40,
    "sliding_window": None, "rope_theta": 1e6,
}  # fmt: skip
QWEN2_MOE = {
    **BASE, "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 72, "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": [], "num_hidden_layers": 3,
    "use_sliding_window": False, "sliding_window": 5, "max_window_layers": 28,
}  # fmt: skip
# two experts' worth of shared ones, and a dense layer first
_DEEPSEEK = {
    **BASE, "num_hidden_layers": 3, "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 20,
}  # fmt: skip
DEEPSEEK_V2 = {
    **_DEEPSEEK, "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
    "norm_topk_prob": False, "scoring_func": "softmax", "routed_scaling_factor": 1.7, "rms_norm_eps": 1e-6,
}  # fmt: skip
DEEPSEEK_V3 = {
    **_DEEPSEEK, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "topk_method": "noaux_tc", "n_group": 4, "topk_group": 2,
    "norm_topk_prob": True, "scoring_func": "sigmoid", "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-6,
}  # fmt: skip
GLM4_MOE = {
    **BASE, "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "head_dim": 24, "moe_intermediate_size": 24, "n_routed_experts": 8, "attention_bias": True,
    "num_experts_per_tok": 3, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.5,
    "use_qk_norm": True, "partial_rotary_factor": 0.5, "num_hidden_layers": 3,
}  # fmt: skip
OLMOE = {
    **BASE, "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 40, "norm_topk_prob": False,
}  # fmt: skip
SPARSE = {"mixtral": MIXTRAL, "qwen2_moe": QWEN2_MOE, "deepseek_v2": DEEPSEEK_V2, "deepseek_v3": DEEPSEEK_V3, "glm4_moe": GLM4_MOE, "olmoe": OLMOE}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1}

NEWER_NAMES = ((".block_sparse_moe.", ".mlp."), (".w1.", ".gate_proj."), (".w3.", ".up_proj."), (".w2.", ".down_proj."))


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that all architectures but one give them."""
    found = {}
    for name, tensor in tensors.items():
        for older, newer in NEWER_NAMES:
            name = name.replace(older, newer)
        found[name] = tensor
    return found


def stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts in one tensor per layer, gate above up, as the library holds them since its fifth version."""
    state = {name: tensor for name, tensor in renamed(tensors).items() if ".experts." not in name}
    experts = {name: tensor for name, tensor in renamed(tensors).items() if ".experts." in name}
    for layer in {name.partition(".experts.")[0] for name in experts}:
        count = 1 + max(int(re.findall(r"\.experts\.(\d+)\.", n)[0]) for n in experts if n.startswith(f"{layer}.experts."))
        own = {part: [experts[f"{layer}.experts.{e}.{part}_proj.weight"] for e in range(count)] for part in ("gate", "up", "down")}
        state[f"{layer}.experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(own["gate"], own["up"], strict=True)])
        state[f"{layer}.experts.down_proj"] = torch.stack(own["down"])
    return state


def library_model(config: dict, tensors: dict[str, Tensor]):
    """The transformers library's model over the same tensors, in float32."""
    import transformers

    model_class = getattr(transformers, config["architectures"][0])
    parsed = model_class.config_class.from_dict({k: v for k, v in config.items() if v is not None or k in ("sliding_window", "q_lora_rank")})
    parsed._attn_implementation = "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_class(parsed).float().eval()
    state = stacked(tensors)
    if config["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model


def loaded(folder: Path, config: dict, tensors: dict[str, Tensor], **options):
    """The model of a checkpoint that is written to `folder`."""
    path = write_checkpoint(folder, tensors, config)
    return bitgrain.load_model(path, **{"device": "cpu", "dtype": "float32", **options})


def ids_of(count: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 96, (count,), generator=torch.Generator().manual_seed(seed))


def assert_agrees(folder: Path, config: dict) -> None:
    """Logits of the whole text, and of the same text in pieces and tokens through the cache, are those of the library."""
    tensors = random_tensors(config, seed=3)
    ids = ids_of(40)
    with torch.inference_mode():
        want = library_model(config, tensors)(ids[None]).logits[0]
    model = loaded(folder, config, tensors)
    # float32 noise is about 1e-5 of the logits' spread, what a wrong expert or scale makes of them 1000 times that
    for found in (model.logits(ids), in_steps(model, ids, [1, 1, 1, 20, 1, 16])):
        assert found.shape == want.shape and (found - want).abs().max() < 5e-5 * want.std()
