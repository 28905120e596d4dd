"""DeepSeek-V2 and V3 against the transformers library; latent attention both ways; layers that predict further tokens."""

import math

import pytest
import torch

import bitgrain
from bitgrain.errors import BitgrainError, ConfigError, RequestError
from bitgrain.models.config import ModelConfig
from tests.checkpoints import write_checkpoint
from tests.unit.models.sparse_models import DEEPSEEK_V2, DEEPSEEK_V3, YARN, assert_agrees, ids_of, library_model, loaded, stacked
from tests.unit.models.test_causal_lm import batch_of, in_steps
from tests.unit.models.tiny_models import random_tensors

BOTH = {"v2": DEEPSEEK_V2, "v3": DEEPSEEK_V3}
SHARED_CASES = {
    "plain": {},
    "queries-without-a-latent": {"q_lora_rank": None},
    "all-layers-sparse": {"first_k_dense_replace": 0},
    "all-layers-dense": {"first_k_dense_replace": 3},
    "one-shared-expert": {"n_shared_experts": 1},
    "biases": {"attention_bias": True},
    "values-larger-than-keys": {"v_head_dim": 48, "qk_nope_head_dim": 8, "qk_rope_head_dim": 16},
    "wide-latent": {"kv_lora_rank": 80, "q_lora_rank": 20},
    "yarn": {"rope_scaling": YARN},
    "yarn-with-equal-weights": {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "yarn-with-other-weights": {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}},
    "yarn-with-one-weight": {"rope_scaling": {**YARN, "mscale_all_dim": 1.3}},
    "all-groups": {"topk_group": 4},
    "one-group": {"n_group": 1, "topk_group": 1},
    "more-experts-than-the-kept-groups-have": {"num_experts_per_tok": 5, "topk_group": 2},
    "other-eps-theta-and-tied": {"rms_norm_eps": 1e-3, "rope_theta": 500.0, "tie_word_embeddings": True},
    "unscaled": {"routed_scaling_factor": 1.0},
}
CASES = {f"{model}-{name}": {**config, **change} for name, change in SHARED_CASES.items() for model, config in BOTH.items()} | {
    "v2-greedy": {**DEEPSEEK_V2, "topk_method": "greedy"},
    "v2-greedy-by-default": {**DEEPSEEK_V2, "topk_method": None, "n_group": None, "topk_group": None},
    "v2-biased-mlp": {**DEEPSEEK_V2, "mlp_bias": True},
    "v3-halves": {**DEEPSEEK_V3, "rope_interleave": False},
    "v3-unnormalized": {**DEEPSEEK_V3, "norm_topk_prob": False},
}


@pytest.mark.parametrize("name", CASES)
def test_logits_agree_with_the_library(tmp_path, name):
    pytest.importorskip("transformers", reason="the transformers library is not installed: nothing to compare with")
    assert_agrees(tmp_path / "m", CASES[name])


@pytest.mark.parametrize("config", BOTH.values(), ids=BOTH)
def test_stacked_experts_give_identical_logits(tmp_path, config):
    tensors = random_tensors(config, seed=3)
    models = [loaded(tmp_path / storage.__name__, config, storage(tensors)) for storage in (dict, stacked)]
    assert torch.equal(*(model.logits(ids_of(30)) for model in models))


@pytest.mark.parametrize("config", BOTH.values(), ids=BOTH)
def test_bfloat16_agrees_within_its_rounding(tmp_path, config):
    pytest.importorskip("transformers", reason="the transformers library is not installed: nothing to compare with")
    tensors = random_tensors(config, seed=3)
    tensors = {name: t if name.endswith("correction_bias") else t.bfloat16() for name, t in tensors.items()}
    with torch.inference_mode():
        exact = library_model(config, tensors)
        want = exact(ids_of(40)[None]).logits[0]
        theirs = exact.bfloat16()(ids_of(40)[None]).logits[0].float()
    found = loaded(tmp_path / "m", config, tensors, dtype="bfloat16").logits(ids_of(40))
    # a rounding may send a token to another expert: the bulk counts, not the largest difference
    assert (found - want).abs().median() < 1.5 * (theirs - want).abs().median()


# ---- the layers of a step ----


@pytest.mark.parametrize("config", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("sizes", [[30], [7, 1, 1, 21], [1] * 30], ids=["whole", "chunks", "one-by-one"])
def test_absorbed_and_expanded_attention_agree(tmp_path, config, sizes):
    model = loaded(tmp_path / "m", config, random_tensors(config, seed=3))
    found = {}
    for path in ("absorbed", "expanded"):
        for layer in model.layers:
            layer.attention.path = path
        found[path] = in_steps(model, ids_of(30), sizes)
    spread = found["absorbed"].std()
    assert 0 < (found["absorbed"] - found["expanded"]).abs().max() < 5e-5 * spread  # not one and the same computation


def test_a_stored_bias_of_kv_b_counts_both_ways(tmp_path):
    tensors = random_tensors(DEEPSEEK_V3, seed=3)
    plain = loaded(tmp_path / "plain", DEEPSEEK_V3, tensors).logits(ids_of(30))
    tensors["model.layers.1.self_attn.kv_b_proj.bias"] = 0.5 * torch.randn(4 * 44, generator=torch.Generator().manual_seed(0))
    model = loaded(tmp_path / "m", DEEPSEEK_V3, tensors)
    found = []
    for path in ("absorbed", "expanded"):
        for layer in model.layers:
            layer.attention.path = path
        found.append(model.logits(ids_of(30)))
    assert (found[0] - found[1]).abs().max() < 5e-5 * plain.std() < (found[0] - plain).abs().max()


def test_rows_and_heads_that_do_not_fit_at_once_are_computed_in_turn(tmp_path, monkeypatch):
    model = loaded(tmp_path / "m", DEEPSEEK_V3, random_tensors(DEEPSEEK_V3, seed=3))
    for path in ("absorbed", "expanded"):
        for layer in model.layers:
            layer.attention.path = path
        whole = model.logits(ids_of(30))
        monkeypatch.setattr("bitgrain.layers.latent_attention.HELD_ELEMENTS", 500)
        assert (model.logits(ids_of(30)) - whole).abs().max() < 2e-5 * whole.std()
        monkeypatch.undo()


def test_steps_of_few_tokens_are_absorbed_and_long_prompts_expanded():
    shape = ModelConfig.from_dict({**DEEPSEEK_V3, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "v_head_dim": 128}, "config.json").latent
    assert [shape.prefers_absorbed(n) for n in (1, 64, 170, 171, 4096)] == [True, True, True, False, False]
    small = ModelConfig.from_dict({**DEEPSEEK_V3, "kv_lora_rank": 16}, "config.json").latent  # a latent that is smaller than a head
    assert small.prefers_absorbed(100_000)


def test_sequences_of_one_batch_do_not_see_each_other(tmp_path):
    model = loaded(tmp_path / "m", DEEPSEEK_V3, random_tensors(DEEPSEEK_V3, seed=3))
    texts, done = [ids_of(n, seed=n) for n in (15, 9, 12, 1)], [14, 0, 5, 0]
    alone, together = [], []
    for results in (alone, together):
        caches = [model.new_cache(16) for _ in texts]
        for cache, ids, count in zip(caches, texts, done, strict=True):
            if count:
                model(batch_of([(cache, ids[:count])]))
        parts = [(cache, ids[count:]) for cache, ids, count in zip(caches, texts, done, strict=True)]
        results += [model(batch_of([part])) for part in parts] if results is alone else [model(batch_of(parts))]
    want = torch.cat(alone)
    assert (want - together[0]).abs().max() < 2e-5 * want.std()


# ---- the cache ----


def test_cache_holds_a_latent_and_a_rotated_key_per_token(tmp_path):
    model = loaded(tmp_path / "m", DEEPSEEK_V3, random_tensors(DEEPSEEK_V3), dtype="bfloat16")
    cache = model.new_cache(64)
    model(batch_of([(cache, ids_of(64))]))
    assert cache.nbytes == 3 * 64 * (32 + 8) * 2
    assert model.cache_specs["model.layers.0.self_attn"].describe() == "16-bit, of latents"


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.05), ("fp8", 0.3), ("int4", 1.0), ("nvfp4", 1.0)])
def test_quantized_caches_hold_the_latent_so_and_the_rotated_key_as_it_is(tmp_path, kind, most):
    tensors = random_tensors(DEEPSEEK_V3, seed=3)
    plain = loaded(tmp_path / "plain", DEEPSEEK_V3, tensors)
    model = loaded(tmp_path / "m", DEEPSEEK_V3, tensors, kv_cache=kind)
    assert "latents; rotated keys 16-bit" in model.cache_specs["model.layers.2.self_attn"].describe()
    want = plain.logits(ids_of(24))
    found = in_steps(model, ids_of(24), [9, 1, 14])
    assert 0 < (found - want).abs().median() < most * want.std()
    whole, own = (m.new_cache(64) for m in (plain, model))
    for m, cache in ((plain, whole), (model, own)):
        m(batch_of([(cache, ids_of(64))]))
    keys = 3 * 64 * 8 * 4  # of float32
    assert keys < own.nbytes < keys + (whole.nbytes - keys) / 2


def test_stored_scales_of_keys_and_values_are_refused(tmp_path):
    tensors = random_tensors(DEEPSEEK_V3)
    for layer in range(3):
        for which in "kv":
            tensors[f"model.layers.{layer}.self_attn.{which}_scale"] = torch.tensor(0.5)
    section = {"quant_method": "fp8", "activation_scheme": "dynamic", "kv_cache_scheme": {"type": "float", "num_bits": 8}}
    with pytest.raises((RequestError, ConfigError), match="kv_cache|latent"):
        loaded(tmp_path / "m", {**DEEPSEEK_V3, "quantization_config": section}, tensors)


# ---- configurations ----


def test_further_layers_are_left_out_under_a_rule(tmp_path):
    tensors = random_tensors(DEEPSEEK_V3)
    extra = {name.replace("layers.2.", "layers.3."): t.clone() for name, t in tensors.items() if ".layers.2." in name}
    extra |= {"model.layers.3.eh_proj.weight": torch.randn(64, 128), "model.layers.3.shared_head.head.weight": torch.randn(96, 64)}
    checkpoint = bitgrain.open_checkpoint(write_checkpoint(tmp_path / "m", tensors | extra, DEEPSEEK_V3))
    assert set(checkpoint.plan.ignored) == set(extra)
    assert any("kv_b_proj is kept as a dense copy" in note for note in checkpoint.plan.notes)
    assert all("predicts tokens after the next one" in rule for rule in checkpoint.plan.ignored.values())
    found = bitgrain.load_model(tmp_path / "m", device="cpu", dtype="float32").logits(ids_of(20))
    assert torch.equal(found, loaded(tmp_path / "bare", DEEPSEEK_V3, tensors).logits(ids_of(20)))
    for change in ({"num_nextn_predict_layers": 0}, {**DEEPSEEK_V2, "num_nextn_predict_layers": 1}):
        config = {**DEEPSEEK_V3, **change}
        with pytest.raises(BitgrainError, match=r"layers\.3\.eh_proj"):
            bitgrain.open_checkpoint(write_checkpoint(tmp_path / "other", random_tensors(config) | extra, config))


def test_published_sizes_and_settings_are_read():
    published = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001,
        "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432,
        "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
        "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings": False,
        "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
    }  # fmt: skip
    config = ModelConfig.from_dict(published, "config.json")
    assert config.latent.scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2) and config.rope.attention_factor == 1
    assert config.max_context == 163840 and config.mixtures.shared.size == 2048 and config.further_layers == 1
    routing = config.mixtures.routings[3]
    assert (config.mixtures.routings[2], routing.groups, routing.kept_groups, routing.scale, routing.per_token) == (None, 8, 4, 2.5, 8)
    lite = {
        **published, "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "q_lora_rank": None, "scoring_func": "softmax", "topk_method": "greedy",
        "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0, "n_shared_experts": 2, "first_k_dense_replace": 1,
    }  # fmt: skip
    config = ModelConfig.from_dict(lite, "config.json")
    assert config.latent.q_rank is None and config.mixtures.shared.size == 4096 and config.further_layers == 0 and config.mixtures.routings[1].groups == 1


def test_experts_in_every_second_layer():
    config = {**DEEPSEEK_V3, "num_hidden_layers": 6, "first_k_dense_replace": 1, "moe_layer_freq": 2}
    routings = ModelConfig.from_dict(config, "config.json").mixtures.routings
    assert [r is not None for r in routings] == [False, False, True, False, True, False]


@pytest.mark.parametrize(
    ("base", "change", "key"),
    [
        (DEEPSEEK_V2, {"topk_method": "noaux_tc"}, "topk_method"),
        (DEEPSEEK_V2, {"scoring_func": "sigmoid"}, "scoring_func"),
        (DEEPSEEK_V2, {"norm_topk_prob": True}, "norm_topk_prob"),
        (DEEPSEEK_V3, {"topk_method": "greedy"}, "topk_method"),
        (DEEPSEEK_V3, {"scoring_func": "softmax"}, "scoring_func"),
        (DEEPSEEK_V3, {"n_group": 3}, "n_group"),
        (DEEPSEEK_V3, {"n_group": 8}, "n_group"),
        (DEEPSEEK_V3, {"topk_group": 5}, "topk_group"),
        (DEEPSEEK_V3, {"num_experts_per_tok": 9}, "num_experts_per_tok"),
        (DEEPSEEK_V3, {"num_key_value_heads": 2}, "num_key_value_heads"),
        (DEEPSEEK_V3, {"qk_rope_head_dim": 7}, "qk_rope_head_dim"),
        (DEEPSEEK_V3, {"index_topk": 64}, "index_topk"),
        (DEEPSEEK_V3, {"kv_lora_rank": None}, "kv_lora_rank"),
    ],
)
def test_configurations_that_cannot_run_are_refused_by_key(base, change, key):
    with pytest.raises(ConfigError, match=key):
        ModelConfig.from_dict({**base, **change}, "config.json")


@pytest.mark.parametrize("key", ["kv_lora_rank", "q_lora_rank", "topk_method", "routed_scaling_factor", "n_group", "first_k_dense_replace", "rope_interleave"])
def test_other_architectures_refuse_what_they_do_not_compute(key):
    from tests.unit.models.tiny_models import LLAMA

    value = {"topk_method": "noaux_tc", "rope_interleave": True, "routed_scaling_factor": 2.5}.get(key, 4)
    with pytest.raises(ConfigError, match=key):
        ModelConfig.from_dict({**LLAMA, key: value}, "config.json")
