"""Logits of tiny random models against the transformers library's own modelling code, in float32."""

import warnings

import pytest
import torch

from tests.unit.models.fake_builder import build
from tests.unit.models.test_causal_lm import batch_of
from tests.unit.models.tiny_models import FAMILIES, GPT_OSS, LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE, random_tensors

transformers = pytest.importorskip("transformers", reason="the transformers library is not installed: nothing to compare with")

FACTORS = [1.0 + 0.2 * i for i in range(8)]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS[::-1]}
SLIDING = {"use_sliding_window": True, "sliding_window": 5}

# Keys whose absence means what the library's GptOssConfig takes for them.
GPT_OSS_DEFAULTS = ("rope_theta", "rms_norm_eps", "attention_bias", "swiglu_limit", "sliding_window", "head_dim")

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
    "gpt-oss-three-layers-by-default": {**GPT_OSS, "layer_types": None, "num_hidden_layers": 3},
    "gpt-oss-windows-only": {**GPT_OSS, "layer_types": ["sliding_attention"] * 2, "sliding_window": 1},
    "gpt-oss-no-window": {**GPT_OSS, "layer_types": ["full_attention"] * 2},
    "gpt-oss-one-expert": {**GPT_OSS, "num_experts_per_tok": 1},
    "gpt-oss-all-experts": {**GPT_OSS, "num_experts_per_tok": 6},
    "gpt-oss-other-gate": {**GPT_OSS, "swiglu_alpha": 1.2, "swiglu_limit": 0.7},
    "gpt-oss-tied": {**GPT_OSS, "tie_word_embeddings": True},
    "gpt-oss-yarn-untruncated": {**GPT_OSS, "rope_theta": 150000, "rope_scaling": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}},
    "gpt-oss-bare": {k: v for k, v in GPT_OSS.items() if k not in GPT_OSS_DEFAULTS},
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
    for router in [name for name in tensors if name.endswith("mlp.router.weight")]:
        stack_interleaved(state, router.replace("router.weight", "experts"), config["num_local_experts"])
    return state


def stack_interleaved(state, prefix, count):
    """gpt-oss: gate and up alternate, matrices are transposed, biases stand beside them."""
    take = lambda part: torch.stack([state.pop(f"{prefix}.{e}.{part}") for e in range(count)])  # noqa: E731
    for end, name in (("weight", "gate_up_proj"), ("bias", "gate_up_proj_bias")):
        gate, up = take(f"gate_proj.{end}"), take(f"up_proj.{end}")
        pair = torch.stack([gate, up], 2).flatten(1, 2)
        state[f"{prefix}.{name}"] = pair.transpose(1, 2) if end == "weight" else pair
    state[f"{prefix}.down_proj"] = take("down_proj.weight").transpose(1, 2)
    state[f"{prefix}.down_proj_bias"] = take("down_proj.bias")


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


@pytest.mark.parametrize("name", ["gpt_oss", "gpt-oss-yarn-untruncated", "qwen3_moe"])
def test_generation_through_the_cache_agrees(name):
    """The library's greedy generation against steps of a batch whose other sequence is somewhere else."""
    config = CASES[name]
    tensors = random_tensors(config, seed=5)
    prompts = [torch.randint(0, 96, (n,), generator=torch.Generator().manual_seed(n)) for n in (11, 4)]
    theirs = transformers_model(config, tensors)
    with torch.inference_mode():
        expected = [
            theirs.generate(ids[None], max_new_tokens=14, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0)[0, len(ids) :] for ids in prompts
        ]
    model = build(config, tensors)
    caches = [model.new_cache(len(ids) + 14) for ids in prompts]
    model(batch_of([(caches[0], prompts[0][:5])]))  # a prompt in two parts
    pending = [prompts[0][5:], prompts[1]]
    found = [[], []]
    for _ in range(14):
        logits = model(batch_of(list(zip(caches, pending, strict=True))))
        rows = [len(pending[0]) - 1, len(logits) - 1]
        pending = [logits[row].argmax()[None] for row in rows]
        for texts, token in zip(found, pending, strict=True):
            texts.append(int(token))
    assert found == [ids.tolist() for ids in expected]


def test_gpt_oss_in_bfloat16_agrees_within_its_rounding():
    tensors = random_tensors(GPT_OSS, seed=3)
    ids = torch.randint(0, 96, (40,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = transformers_model(GPT_OSS, tensors).bfloat16()(ids[None]).logits[0].float()
    found = build(GPT_OSS, tensors, dtype=torch.bfloat16).logits(ids)
    # a rounding may send a token to another expert: the bulk counts, not the largest difference
    assert (found - expected).abs().median() < 0.03 * expected.std()
