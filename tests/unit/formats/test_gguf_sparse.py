"""Mixtures of experts and latent attention from GGUF files, against the same models as safetensors."""

import pytest
import torch

import bitgrain
from bitgrain.errors import BitgrainError, MissingTensorError
from bitgrain.formats.gguf.schemes import BlockScheme
from tests.checkpoints import write_checkpoint
from tests.unit.checkpoint.gguf_bytes import random_blocks, write_gguf
from tests.unit.formats.gguf_models import interleave
from tests.unit.models.sparse_models import DEEPSEEK_V2, DEEPSEEK_V3, MIXTRAL, QWEN2_MOE, YARN, ids_of
from tests.unit.models.tiny_models import random_tensors

KINDS = {"mixtral": "llama", "qwen2_moe": "qwen2moe", "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2"}
LOCALS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_a_proj": "attn_q_a", "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b", "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    **{f"mlp.{shared}.{p}_proj": f"ffn_{p}_shexp" for shared in ("shared_expert", "shared_experts") for p in ("gate", "up", "down")},
}  # fmt: skip
PROJECTIONS = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
OUTER = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight", "model.norm.weight": "output_norm.weight"}


def metadata_of(config):
    """What a converter writes for a config.json."""
    kind = KINDS[config["model_type"]]
    keys = {
        "block_count": config["num_hidden_layers"], "context_length": config["max_position_embeddings"], "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"], "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"], "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(config["rope_theta"]), "vocab_size": config["vocab_size"], "expert_used_count": config["num_experts_per_tok"],
        "expert_count": next(config[k] for k in ("num_experts", "num_local_experts", "n_routed_experts") if k in config),
    }  # fmt: skip
    if kind == "qwen2moe":
        keys |= {"expert_feed_forward_length": config["moe_intermediate_size"], "expert_shared_feed_forward_length": config["shared_expert_intermediate_size"]}
    if kind == "deepseek2":
        keys |= deepseek_keys(config)
    return {"general.architecture": kind, "general.type": "model", "general.quantization_version": 2} | {f"{kind}.{k}": v for k, v in keys.items()}


def deepseek_keys(config):
    rank, rope, nope = config["kv_lora_rank"], config["qk_rope_head_dim"], config["qk_nope_head_dim"]
    keys = {
        "attention.head_count_kv": 1, "attention.key_length": rank + rope, "attention.value_length": rank, "attention.key_length_mla": nope + rope,
        "attention.value_length_mla": config["v_head_dim"], "attention.kv_lora_rank": rank, "rope.dimension_count": rope,
        "expert_feed_forward_length": config["moe_intermediate_size"], "expert_shared_count": config["n_shared_experts"],
        "expert_weights_scale": config["routed_scaling_factor"], "leading_dense_block_count": config["first_k_dense_replace"],
        "expert_weights_norm": config["norm_topk_prob"], "expert_gating_func": 2 if config["scoring_func"] == "sigmoid" else 1,
        "expert_group_count": config["n_group"], "expert_group_used_count": config["topk_group"],
    }  # fmt: skip
    if config["q_lora_rank"]:
        keys["attention.q_lora_rank"] = config["q_lora_rank"]
    if "rope_scaling" in config:
        scaling = config["rope_scaling"]
        keys |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(scaling["factor"]), "rope.scaling.yarn_log_multiplier": 0.1 * scaling["mscale_all_dim"]}
        keys["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    return keys


def stored(config, tensors, split_latent=True):
    """The tensors under a GGUF file's names: rows of q and k interleaved, experts stacked, kv_b in two tensors."""
    made, stacks = {}, {}
    for name, value in tensors.items():
        if name in OUTER:
            made[OUTER[name]] = value
            continue
        layer, rest = name.removeprefix("model.layers.").split(".", 1)
        module, _, local = rest.rpartition(".")
        if ".experts." in module:
            expert, projection = module.split(".experts.")[1].split(".")
            stacks.setdefault(f"blk.{layer}.ffn_{PROJECTIONS[projection]}_exps.weight", {})[int(expert)] = value
        elif local == "e_score_correction_bias":
            made[f"blk.{layer}.exp_probs_b.bias"] = value
        elif module == "self_attn.kv_b_proj" and split_latent:
            heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
            per_head = value.view(heads, -1, config["kv_lora_rank"])
            made[f"blk.{layer}.attn_k_b.weight"] = per_head[:, :nope].transpose(1, 2).contiguous()
            made[f"blk.{layer}.attn_v_b.weight"] = per_head[:, nope:].contiguous()
        else:
            if config["model_type"] == "mixtral" and module in ("self_attn.q_proj", "self_attn.k_proj"):
                value = interleave(value, config["num_attention_heads" if "q_proj" in module else "num_key_value_heads"])
            made[f"blk.{layer}.{LOCALS[module]}.{local}"] = value
    return made | {name: torch.stack([experts[i] for i in range(len(experts))]) for name, experts in stacks.items()}


def write_model(path, config, tensors, extra=None, more=None, **options):
    metadata = {k: v for k, v in (metadata_of(config) | (extra or {})).items() if v is not None}
    return write_gguf(path, metadata, {k: v for k, v in (stored(config, tensors, **options) | (more or {})).items() if v is not None})


ALL_DIM = {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}
CASES = {
    "mixtral": MIXTRAL,
    "qwen2_moe": QWEN2_MOE,
    "qwen2_moe-without-biases": {**QWEN2_MOE, "qkv_bias": False},
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v2-lite": {**DEEPSEEK_V2, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "topk_method": "greedy", "rope_scaling": ALL_DIM},
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v3-yarn": {**DEEPSEEK_V3, "rope_scaling": ALL_DIM, "first_k_dense_replace": 0},
    "deepseek_v3-one-group": {**DEEPSEEK_V3, "n_group": 1, "topk_group": 1},
}


@pytest.mark.parametrize("name", CASES)
def test_model_computes_what_the_same_safetensors_model_computes(tmp_path, name):
    config = {**CASES[name], "num_hidden_layers": 2}
    tensors = random_tensors(config, seed=3)
    path = write_model(tmp_path / "m.gguf", config, tensors)
    checkpoint = bitgrain.open_checkpoint(path)
    assert checkpoint.plan.format == "gguf" and checkpoint.architecture == config["architectures"][0]
    for tensor, value in tensors.items():
        if tensor.endswith(".weight"):
            assert torch.equal(checkpoint.dequantize(tensor), value), tensor
    models = [bitgrain.load_model(p, device="cpu", dtype=torch.float32) for p in (path, write_checkpoint(tmp_path / "plain", tensors, config))]
    found, want = (model.logits(ids_of(30)) for model in models)
    assert torch.equal(found, want)
    assert models[0].config.mixtures == models[1].config.mixtures and models[0].config.latent == models[1].config.latent


@pytest.mark.parametrize("config", [DEEPSEEK_V2, DEEPSEEK_V3], ids=["v2", "v3"])
def test_kv_b_in_one_piece_is_the_same_model(tmp_path, config):
    tensors = random_tensors(config, seed=3)
    lengths = {"deepseek2.attention.key_length_mla": None, "deepseek2.attention.value_length_mla": None, "deepseek2.attention.key_length": 32, "deepseek2.attention.value_length": 20}
    paths = [write_model(tmp_path / "two.gguf", config, tensors), write_model(tmp_path / "one.gguf", config, tensors, lengths, split_latent=False)]
    assert torch.equal(*(bitgrain.load_model(p, device="cpu", dtype=torch.float32).logits(ids_of(20)) for p in paths))


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_quantized_experts_run_as_their_dequantized_twin(tmp_path, name):
    config = {**CASES[name], "num_hidden_layers": 2, "moe_intermediate_size": 64, "n_shared_experts": 1} | ({"intermediate_size": 64} if name == "mixtral" else {})
    if name != "deepseek_v3":
        del config["n_shared_experts"]
    tensors = random_tensors(config, seed=3)
    more = {f"blk.1.ffn_{p}_exps.weight": random_blocks(kind, (8 if name == "deepseek_v3" else 6, 64, 64), seed) for seed, (p, kind) in enumerate((("gate", "Q8_0"), ("up", "Q4_0"), ("down", "Q5_1")))}
    if name == "deepseek_v3":
        more["blk.1.attn_v_b.weight"] = random_blocks("Q8_0", (4, 20, 32), 5)
    path = write_model(tmp_path / "m.gguf", config, tensors, more=more)
    checkpoint = bitgrain.open_checkpoint(path)
    twin = {tensor: checkpoint.dequantize(tensor) if tensor.endswith(".weight") else value for tensor, value in tensors.items()}
    changed = [tensor for tensor, value in twin.items() if not torch.equal(value, tensors[tensor])]
    assert len(changed) == (25 if name == "deepseek_v3" else 18)
    part = next(t for t in changed if ".experts." in t)
    assert torch.equal(twin[part], _decoded(more["blk.1.ffn_gate_exps.weight"], 0))
    found = bitgrain.load_model(path, device="cpu", dtype=torch.float32).logits(ids_of(20))
    want = bitgrain.load_model(write_checkpoint(tmp_path / "twin", twin, config), device="cpu", dtype=torch.float32).logits(ids_of(20))
    assert (found - want).abs().max() < 1e-4 * want.std()


def _decoded(stack, expert):
    size = len(stack.data) // stack.shape[0]
    own = torch.frombuffer(bytearray(stack.data[expert * size : (expert + 1) * size]), dtype=torch.uint8).view(stack.shape[1], -1)
    return BlockScheme((stack.shape[1], stack.shape[2]), "Q8_0").to_weight({"weight": own}).dequantize()


def test_an_absent_correction_is_named(tmp_path):
    with pytest.raises(MissingTensorError, match=r"layers\.1\.mlp\.gate\.e_score_correction_bias"):
        bitgrain.open_checkpoint(write_model(tmp_path / "m.gguf", DEEPSEEK_V3, random_tensors(DEEPSEEK_V3), more={"blk.1.exp_probs_b.bias": None}))


def test_weights_that_would_be_normalized_otherwise_are_refused(tmp_path):
    with pytest.raises(BitgrainError, match="norm_topk_prob"):
        bitgrain.open_checkpoint(write_model(tmp_path / "m.gguf", DEEPSEEK_V2, random_tensors(DEEPSEEK_V2), {"deepseek2.expert_weights_norm": True}))
