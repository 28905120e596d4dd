"""Logits of tiny random models against the transformers library's own modelling code, in float32."""

import warnings

import pytest
import torch

from tests.unit.models.fake_builder import build
from tests.unit.models.tiny_models import FAMILIES, LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE, random_tensors

transformers = pytest.importorskip("transformers", reason="the transformers library is not installed: nothing to compare with")

FACTORS = [1.0 + 0.2 * i for i in range(8)]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS[::-1]}
SLIDING = {"use_sliding_window": True, "sliding_window": 5}

CASES = {
    **FAMILIES,
    "llama-tied": {**LLAMA, "tie_word_embeddings": True},
    "llama-biases": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "llama-one-kv-head-gelu": {**LLAMA, "num_key_value_heads": 1, "hidden_act": "gelu"},
    "llama-head-dim-gelu-tanh": {**LLAMA, "head_dim": 32, "hidden_act": "gelu_pytorch_tanh"},
    "mistral-no-window": {**MISTRAL, "sliding_window": None},
    "qwen2-window-in-last-layer": {**QWEN2, **SLIDING, "max_window_layers": 1},
    "qwen3-layer-types": {**QWEN3, **SLIDING, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3-biases": {**QWEN3, "attention_bias": True},
    "qwen3-moe-unnormalized": {**QWEN3_MOE, "norm_topk_prob": False},
    "qwen3-moe-dense-layer": {**QWEN3_MOE, "mlp_only_layers": [1]},
    "qwen3-moe-sparse-step": {**QWEN3_MOE, "decoder_sparse_step": 2},
    "qwen3-moe-window": {**QWEN3_MOE, **SLIDING},
    "rope-theta": {**LLAMA, "rope_theta": 500.0},
    "rope-parameters": {**LLAMA, "rope_theta": None, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
    "rope-linear": {**LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "rope-dynamic-within": {**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "rope-dynamic-beyond": {**LLAMA, "max_position_embeddings": 24, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "rope-llama3": {**LLAMA, "rope_scaling": LLAMA3},
    "rope-yarn": {**LLAMA, "rope_scaling": YARN},
    "rope-yarn-exact-bounds": {**LLAMA, "rope_scaling": {**YARN, "truncate": False}},
    "rope-yarn-attention-factor": {**LLAMA, "rope_scaling": {**YARN, "attention_factor": 1.5, "beta_fast": 8, "beta_slow": 2}},
    "rope-yarn-mscale": {**LLAMA, "rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}},
    "rope-yarn-on-qwen2": {**QWEN2, "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}},
    "rope-longrope-short": {**LLAMA, "rope_scaling": {**LONG, "original_max_position_embeddings": 48}},
    "rope-longrope-long": {**LLAMA, "rope_scaling": {**LONG, "original_max_position_embeddings": 16}},
    "rope-longrope-factor": {**LLAMA, "rope_scaling": {**LONG, "original_max_position_embeddings": 16, "factor": 6.0}},
    "rope-longrope-attention-factor": {**LLAMA, "rope_scaling": {**LONG, "original_max_position_embeddings": 16, "attention_factor": 1.4}},
}  # fmt: skip


def transformers_model(config, tensors):
    model_class = getattr(transformers, config["architectures"][0])
    parsed = model_class.config_class.from_dict({k: v for k, v in config.items() if v is not None or k == "sliding_window"})
    parsed._attn_implementation = "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_class(parsed).float().eval()
    model.load_state_dict(stacked_experts(tensors, config), strict=True)
    return model


def stacked_experts(tensors, config):
    """The state dict as that library holds it: tied weights twice, experts in one tensor."""
    state = dict(tensors)
    if config["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for router in [name for name in tensors if name.endswith("mlp.gate.weight")]:
        prefix = router.replace("gate.weight", "experts")
        take = lambda part, prefix=prefix: [state.pop(f"{prefix}.{e}.{part}.weight") for e in range(config["num_experts"])]  # noqa: E731
        state[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(take("gate_proj"), take("up_proj"), strict=True)])
        state[f"{prefix}.down_proj"] = torch.stack(take("down_proj"))
    return state


@pytest.mark.parametrize("name", CASES)
def test_logits_agree(name):
    config = CASES[name]
    tensors = random_tensors(config, seed=3)
    ids = torch.randint(0, 96, (40,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = transformers_model(config, tensors)(ids[None]).logits[0]
    found = build(config, tensors).logits(ids)
    assert found.dtype is torch.float32 and found.shape == (40, 96)
    # float32 noise is about 5e-6 of the logits' spread; the smallest difference between two cases here is 100 times that
    assert (found - expected).abs().max() < 3e-5 * expected.std()


def test_logits_in_bfloat16_agree_within_its_rounding():
    tensors = random_tensors(LLAMA, seed=3)
    ids = torch.randint(0, 96, (40,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = transformers_model(LLAMA, tensors).bfloat16()(ids[None]).logits[0].float()
    found = build(LLAMA, tensors, dtype=torch.bfloat16).logits(ids)
    assert (found - expected).abs().mean() < 0.02 * expected.std()
