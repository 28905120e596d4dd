"""GGUF: names and rows of every architecture, metadata, what blocks mean, refusals by name."""

import hashlib
import json
import struct

import pytest
import torch
from safetensors import safe_open

import bitgrain
from bitgrain.checkpoint.files import open_files
from bitgrain.checkpoint.headers import TensorHeader
from bitgrain.errors import (
    BadValueError,
    BitgrainError,
    ConfigError,
    MissingTensorError,
    UnexpectedTensorError,
    UnsupportedArchitectureError,
)
from bitgrain.formats.base import ModuleKind, ModuleView
from bitgrain.formats.detect import described, gather_evidence
from bitgrain.formats.gguf import GGUFConfig
from bitgrain.formats.gguf.schemes import BlockScheme
from bitgrain.layers.decoding import ModuleReader, matrix_of
from bitgrain.layers.rotary import DividedRope, Llama3Rope
from bitgrain.models.config import ModelConfig
from bitgrain.numerics.block_types import BLOCK_TYPES
from bitgrain.resolve import ResolveOptions, resolve
from bitgrain.weights import BlockFloatWeight, IntAffineWeight, SuperBlockWeight
from tests.checkpoints import write_checkpoint
from tests.golden_checks import golden_folders
from tests.unit.checkpoint.gguf_bytes import Packed, random_blocks, write_gguf
from tests.unit.formats.gguf_models import NAMES, interleave, metadata_of, stored, write_model
from tests.unit.models.tiny_models import FAMILIES, LLAMA, QWEN2, QWEN3, QWEN3_MOE, random_tensors


def parts_only(path):
    """A reader of the file's modules that asks no architecture which ones there must be."""
    files = described(open_files(path))
    return ModuleReader(files, resolve(files, None, ResolveOptions()))


@pytest.mark.parametrize("folder", golden_folders("gguf"), ids=lambda f: f.name)
def test_golden_module_equals_golden(folder):
    checks = json.loads((folder / "case.json").read_text())["checks"]
    reader, done = parts_only(folder / "model.gguf"), 0
    with safe_open(str(folder / "golden.safetensors"), "pt") as golden:
        for check in checks:
            got = matrix_of(reader, check["name"])
            if check["type"] == "sha256":
                assert hashlib.sha256((got + 0.0).numpy().tobytes()).hexdigest() == check["of"]
            else:
                want = golden.get_tensor(f"weight/{check['name']}")
                mine = got if check["rows"] == "all" else got[check["rows"]]
                torch.testing.assert_close(mine, want, rtol=0 if check["exact"] else check["rtol"], atol=0 if check["exact"] else check["atol"])
            done += 1
    assert done


# --- whole models -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", [name for name, config in FAMILIES.items() if config["architectures"][0] in NAMES])
def test_model_computes_what_the_same_safetensors_model_computes(tmp_path, family):
    config = FAMILIES[family]
    tensors = random_tensors(config)
    path = write_model(tmp_path / "m.gguf", config, tensors)
    plain = write_checkpoint(tmp_path / "plain", tensors, config)
    checkpoint = bitgrain.open_checkpoint(path)
    assert checkpoint.plan.format == "gguf" and checkpoint.architecture == config["architectures"][0]
    for name, value in tensors.items():
        if name.endswith(".weight"):
            assert torch.equal(checkpoint.dequantize(name), value), name
    ids = torch.arange(20) * 3 % config["vocab_size"]
    models = [bitgrain.load_model(p, device="cpu", dtype=torch.float32) for p in (path, plain)]
    assert torch.equal(*(model.logits(ids) for model in models))
    assert models[0].config.eos_token_ids == (2,) and models[0].config.windows == models[1].config.windows


def test_tied_head_is_an_absent_output(tmp_path):
    tensors = random_tensors(QWEN3)
    assert "lm_head.weight" not in tensors
    config = described(open_files(write_model(tmp_path / "a.gguf", QWEN3, tensors))).config
    assert config["tie_word_embeddings"] is True
    config = described(open_files(write_model(tmp_path / "b.gguf", QWEN3, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}))).config
    assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_packed_rows_of_q_and_k_move_whole(tmp_path, kind):
    # the same bytes under an architecture whose rows stay and under one whose rows are interleaved
    config = {**LLAMA, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256, "num_hidden_layers": 1}
    blocks = {"q": random_blocks(kind, (256, 256)), "k": random_blocks(kind, (128, 256), 1)}
    more = {f"blk.0.attn_{part}.weight": block for part, block in blocks.items()}
    moved = bitgrain.open_checkpoint(write_model(tmp_path / "a.gguf", config, random_tensors(config), more=more))
    qwen = {**config, "architectures": ["Qwen2ForCausalLM"]}
    biases = random_tensors({**QWEN2, **{k: v for k, v in qwen.items() if k != "model_type"}})
    kept = bitgrain.open_checkpoint(write_model(tmp_path / "b.gguf", qwen, biases, more=more))
    for part, heads in (("q", 4), ("k", 2)):
        name = f"model.layers.0.self_attn.{part}_proj.weight"
        assert torch.equal(interleave(moved.dequantize(name), heads), kept.dequantize(name))
        assert not torch.equal(moved.dequantize(name), kept.dequantize(name))


def test_quantized_experts_are_divided(tmp_path):
    config = {**QWEN3_MOE, "hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 1}
    tensors = random_tensors(config)
    stack = random_blocks("Q8_0", (6, 64, 64))
    checkpoint = bitgrain.open_checkpoint(write_model(tmp_path / "m.gguf", config, tensors, more={"blk.0.ffn_up_exps.weight": stack}))
    size = len(stack.data) // 6
    for expert in (0, 5):
        own = torch.frombuffer(bytearray(stack.data[expert * size : (expert + 1) * size]), dtype=torch.uint8).view(64, -1)
        want = BlockScheme((64, 64), "Q8_0").to_weight({"weight": own}).dequantize()
        assert torch.equal(checkpoint.dequantize(f"model.layers.0.mlp.experts.{expert}.up_proj.weight"), want)
        assert torch.equal(checkpoint.dequantize(f"model.layers.0.mlp.experts.{expert}.gate_proj.weight"), tensors[f"model.layers.0.mlp.experts.{expert}.gate_proj.weight"])


def test_gate_and_up_in_one_stack_are_divided(tmp_path):
    tensors = random_tensors(QWEN3_MOE)
    own = stored(QWEN3_MOE, tensors)
    more = {f"blk.{i}.ffn_gate_up_exps.weight": torch.cat((own[f"blk.{i}.ffn_gate_exps.weight"], own[f"blk.{i}.ffn_up_exps.weight"]), 1) for i in range(3)}
    more |= {f"blk.{i}.ffn_{part}_exps.weight": None for i in range(3) for part in ("gate", "up")}
    checkpoint = bitgrain.open_checkpoint(write_model(tmp_path / "m.gguf", QWEN3_MOE, tensors, more=more))
    for name in ("model.layers.2.mlp.experts.4.gate_proj.weight", "model.layers.0.mlp.experts.5.up_proj.weight"):
        assert torch.equal(checkpoint.dequantize(name), tensors[name])


def test_split_model_loads(tmp_path):
    tensors = random_tensors(LLAMA)
    own = list(stored(LLAMA, tensors).items())
    for index, part in enumerate((own[:5], own[5:6], own[6:])):
        extra = {"split.no": index, "split.count": 3, "split.tensors.count": len(own)}
        write_gguf(tmp_path / f"m-{index + 1:05d}-of-00003.gguf", (metadata_of(LLAMA) if index == 0 else {}) | extra, dict(part))
    model = bitgrain.load_model(tmp_path, device="cpu", dtype=torch.float32)
    whole = bitgrain.load_model(write_model(tmp_path / "whole.gguf", LLAMA, tensors), device="cpu", dtype=torch.float32)
    assert torch.equal(model.logits(torch.arange(9)), whole.logits(torch.arange(9)))


# --- parts of models ------------------------------------------------------------------------------------------------------
BASE = {"block_count": 2, "context_length": 64, "embedding_length": 64, "feed_forward_length": 96, "attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-6}


def other_model(path, kind, tensors, **keys):
    metadata = {"general.architecture": kind} | {f"{kind}.{k}": v for k, v in {**BASE, **{k.replace("__", "."): v for k, v in keys.items()}}.items()}
    return write_gguf(path, metadata, {"token_embd.weight": torch.randn(48, 64), **tensors})


def test_mixtral_experts_have_their_names(tmp_path):
    stacks = {p: torch.randn(3, 5, 7) for p in ("gate", "up", "down")}
    tensors = {f"blk.0.ffn_{p}_exps.weight": t for p, t in stacks.items()} | {"blk.0.ffn_gate_inp.weight": torch.randn(3, 64)}
    single = {f"blk.1.ffn_{p}.{e}.weight": stacks[p][e] for p in stacks for e in range(3)}
    path = other_model(tmp_path / "m.gguf", "llama", tensors | single, expert_count=3, expert_used_count=2)
    checkpoint = parts_only(path)
    for layer in (0, 1):
        for part, name in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            assert torch.equal(matrix_of(checkpoint, f"model.layers.{layer}.block_sparse_moe.experts.2.{name}.weight"), stacks[part][2])
    assert torch.equal(matrix_of(checkpoint, "model.layers.0.block_sparse_moe.gate.weight"), tensors["blk.0.ffn_gate_inp.weight"])
    assert checkpoint.files.config["num_local_experts"] == 3


def test_second_generation_of_qwen_experts_has_a_shared_one(tmp_path):
    tensors = {"blk.0.ffn_gate_shexp.weight": torch.randn(32, 64), "blk.0.ffn_up_exps.weight": torch.randn(2, 16, 64)}
    gates = {"blk.0.ffn_gate_inp_shexp.weight": torch.randn(64), "blk.1.ffn_gate_inp_shexp.weight": torch.randn(1, 64)}  # old and new writers
    checkpoint = parts_only(other_model(tmp_path / "m.gguf", "qwen2moe", tensors | gates, expert_count=2, expert_used_count=1))
    assert torch.equal(matrix_of(checkpoint, "model.layers.0.mlp.shared_expert.gate_proj.weight"), tensors["blk.0.ffn_gate_shexp.weight"])
    for layer, gate in enumerate(gates.values()):
        assert torch.equal(matrix_of(checkpoint, f"model.layers.{layer}.mlp.shared_expert_gate.weight"), gate.view(1, 64))
    config = checkpoint.files.config
    assert config["norm_topk_prob"] is False and config["moe_intermediate_size"] == 16


LATENT = {"attention__kv_lora_rank": 32, "attention__q_lora_rank": 24, "rope__dimension_count": 8, "attention__key_length_mla": 24, "attention__value_length_mla": 16,
          "attention__head_count_kv": 1, "attention__key_length": 40, "attention__value_length": 32, "expert_count": 2, "expert_used_count": 1}  # fmt: skip


@pytest.mark.parametrize("kinds", [("F32", "F32"), ("Q8_0", "Q4_1"), ("Q4_K", "F16")])
def test_latent_keys_and_values_become_one_matrix_again(tmp_path, kinds):
    heads, nope, size, rank = 3, 256 if kinds[0] == "Q4_K" else 64, 16, 32
    made, values = [], []
    for kind, shape in zip(kinds, ((heads, rank, nope), (heads, size, rank)), strict=True):
        if kind in BLOCK_TYPES:
            made.append(random_blocks(kind, shape))
            raw = torch.frombuffer(bytearray(made[-1].data), dtype=torch.uint8).view(shape[0] * shape[1], -1)
            values.append(BlockScheme((shape[0] * shape[1], shape[2]), kind).to_weight({"weight": raw}).dequantize().view(shape))
        else:
            made.append(torch.randn(shape).to(torch.float16 if kind == "F16" else torch.float32))
            values.append(made[-1].float())
    want = torch.cat([torch.cat((values[0][h].T, values[1][h])) for h in range(heads)])
    tensors = {"blk.0.attn_k_b.weight": made[0], "blk.0.attn_v_b.weight": made[1], "blk.1.attn_kv_b.weight": torch.randn(8, 32)}
    tensors |= {"blk.0.ffn_gate_inp.weight": torch.randn(2, 64), "blk.0.exp_probs_b.bias": torch.randn(2)}
    checkpoint = parts_only(other_model(tmp_path / "m.gguf", "deepseek2", tensors, **LATENT, expert_gating_func=2))
    assert torch.equal(matrix_of(checkpoint, "model.layers.0.self_attn.kv_b_proj.weight"), want)
    assert torch.equal(matrix_of(checkpoint, "model.layers.1.self_attn.kv_b_proj.weight"), tensors["blk.1.attn_kv_b.weight"])
    assert "model.layers.0.mlp.gate.e_score_correction_bias" in checkpoint.plan.modules["model.layers.0.mlp.gate"].tensors
    config = checkpoint.files.config
    assert (config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]) == (16, 8, 16)


def test_one_latent_tensor_alone_is_refused(tmp_path):
    path = other_model(tmp_path / "m.gguf", "deepseek2", {"blk.0.attn_k_b.weight": torch.randn(3, 32, 64)}, **LATENT)
    with pytest.raises(MissingTensorError, match="v_b"):
        parts_only(path)


# --- metadata -----------------------------------------------------------------------------------------------------------
def config_of(tmp_path, extra=None, more=None, config=LLAMA):
    return described(open_files(write_model(tmp_path / "m.gguf", config, random_tensors(config), extra, more))).config


def config_refused(tmp_path, *words, **how):
    with pytest.raises(BitgrainError) as caught:
        config_of(tmp_path, **how)
    assert all(word in str(caught.value) for word in ("m.gguf", *words)), str(caught.value)


def test_numbers_are_the_decimals_that_people_write(tmp_path):
    config = config_of(tmp_path, {"llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 500000.0})
    assert config["rms_norm_eps"] == 1e-5 and config["rope_theta"] == 500000.0
    assert config_of(tmp_path, {"llama.rope.freq_base": struct.pack("<Id", 12, 1e6 / 3)})["rope_theta"] == 1e6 / 3


def test_unknown_key_is_refused_with_the_nearest_known(tmp_path):
    config_refused(tmp_path, "attention.head_countt", "attention.head_count", extra={"llama.attention.head_countt": 4})
    config_refused(tmp_path, "router_scale", extra={"llama.router_scale": 2.0})


@pytest.mark.parametrize("key", ["block_count", "embedding_length", "attention.head_count", "context_length", "attention.layer_norm_rms_epsilon", "feed_forward_length"])
def test_missing_key_is_named(tmp_path, key):
    config_refused(tmp_path, f"llama.{key}", extra={f"llama.{key}": None})


@pytest.mark.parametrize("key, value", [("attention.causal", False), ("attention.clamp_kqv", 3.0), ("attention.max_alibi_bias", 8.0), ("attention.scale", 0.5), ("nextn_predict_layers", 1), ("rope.scale_linear", 4.0), ("attention.value_length", 99), ("attention.head_count_kv", [2, 4]), ("feed_forward_length", [112, 96]), ("rope.scaling.type", "dynamic")])  # fmt: skip
def test_settings_that_would_change_numbers_are_refused(tmp_path, key, value):
    config_refused(tmp_path, f"llama.{key}", extra={f"llama.{key}": value})


def test_arrays_of_equal_sizes_are_one_size(tmp_path):
    config = config_of(tmp_path, {"llama.attention.head_count_kv": [2, 2], "llama.feed_forward_length": [112, 112]})
    assert config["num_key_value_heads"] == 2 and config["intermediate_size"] == 112


def test_vocabulary_size_may_follow_from_the_tokens_or_the_embedding(tmp_path):
    assert config_of(tmp_path, {"llama.vocab_size": None})["vocab_size"] == 96
    assert config_of(tmp_path, {"llama.vocab_size": None, "tokenizer.ggml.tokens": ["a"] * 96})["vocab_size"] == 96


def test_ends_of_texts_are_gathered(tmp_path):
    config = config_of(tmp_path, {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 2, "tokenizer.ggml.bos_token_id": 1})
    assert config["eos_token_id"] == [2, 7] and config["bos_token_id"] == 1


def test_stored_divisors_scale_the_frequencies(tmp_path):
    # how Llama 3's scaling is stored: compare with its formula
    rope = Llama3Rope(10000.0, 16, 8.0, 1.0, 4.0, 64)
    divisors = (1 / rope.periods()) / rope.frequencies(0)
    assert divisors.max() > 7 and divisors.min() == 1
    config = config_of(tmp_path, more={"rope_freqs.weight": divisors})
    read = ModelConfig.from_dict(config, "m.gguf").rope
    assert isinstance(read, DividedRope)
    torch.testing.assert_close(read.frequencies(0), rope.frequencies(0), rtol=1e-6, atol=0)
    checkpoint = bitgrain.open_checkpoint(tmp_path / "m.gguf")
    assert "rotary" in checkpoint.plan.ignored["rope_freqs.weight"]
    model = bitgrain.load_model(tmp_path / "m.gguf", device="cpu", dtype=torch.float32)
    plain = {**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}
    want = bitgrain.load_model(write_checkpoint(tmp_path / "plain", random_tensors(LLAMA), plain), device="cpu", dtype=torch.float32)
    torch.testing.assert_close(model.logits(torch.arange(40)), want.logits(torch.arange(40)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [torch.ones(7), torch.ones(8).half(), torch.tensor([1.0] * 7 + [0.0]), torch.tensor([1.0] * 7 + [float("nan")])])
def test_impossible_divisors_are_refused(tmp_path, bad):
    config_refused(tmp_path, "rope_freqs.weight", more={"rope_freqs.weight": bad})


def test_two_scalings_at_once_are_refused(tmp_path):
    config_refused(tmp_path, "rope_freqs.weight", extra={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}, more={"rope_freqs.weight": torch.ones(8)})
    config_refused(tmp_path, "rope_factors_long.weight", extra={"llama.rope.scaling.type": "longrope"})


def test_linear_and_yarn_scaling_are_read(tmp_path):
    config = config_of(tmp_path, {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0})
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 16, "yarn_beta_fast": 16.0, "finetuned": True}
    config = config_of(tmp_path, {f"qwen2.rope.scaling.{k}": v for k, v in yarn.items()}, config=QWEN2)
    assert config["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16.0}
    assert ModelConfig.from_dict(config, "m.gguf").rope.attention_factor > 1


# --- refusals -----------------------------------------------------------------------------------------------------------
def test_unknown_architecture_is_refused_by_name(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", {"general.architecture": "mamba2"}, {"token_embd.weight": torch.zeros(4, 4)})
    with pytest.raises(UnsupportedArchitectureError, match="mamba2"):
        bitgrain.open_checkpoint(path)
    with pytest.raises(ConfigError, match="general.architecture"):
        bitgrain.open_checkpoint(write_gguf(tmp_path / "n.gguf", {"general.name": "x"}, {}))


@pytest.mark.parametrize("name", ["blk.0.attx_q.weight", "blk.0.attn_q.weight_old", "blk.2.attn_q.weight", "blk.0.ffn_up.3.weight", "rope.weight", "attn_q.weight", "blk.0.attn_k_b.weight"])
def test_tensor_that_the_architecture_lacks_is_refused(tmp_path, name):
    path = write_model(tmp_path / "m.gguf", LLAMA, random_tensors(LLAMA), more={name: torch.zeros(4, 4)})
    with pytest.raises(UnexpectedTensorError, match=name):
        bitgrain.open_checkpoint(path)


@pytest.mark.parametrize("name, hf", [("blk.1.attn_k.weight", "k_proj"), ("blk.1.attn_norm.weight", "input_layernorm"), ("token_embd.weight", "embed_tokens")])
def test_absent_tensor_is_named(tmp_path, name, hf):
    with pytest.raises(BitgrainError, match=hf):
        bitgrain.open_checkpoint(write_model(tmp_path / "m.gguf", LLAMA, random_tensors(LLAMA), more={name: None}))


def test_bias_in_one_layer_only_is_refused(tmp_path):
    with pytest.raises(MissingTensorError, match="blk.0.attn_v.bias"):
        bitgrain.open_checkpoint(write_model(tmp_path / "m.gguf", LLAMA, random_tensors(LLAMA), more={"blk.1.attn_v.bias": torch.zeros(32)}))


def test_number_of_experts_must_agree(tmp_path):
    tensors = random_tensors(QWEN3_MOE)
    short = stored(QWEN3_MOE, tensors)["blk.1.ffn_up_exps.weight"][:5]
    with pytest.raises(BitgrainError, match="blk.1.ffn_up_exps.weight"):
        bitgrain.open_checkpoint(write_model(tmp_path / "m.gguf", QWEN3_MOE, tensors, more={"blk.1.ffn_up_exps.weight": short}))
    both = {"blk.0.ffn_up_exps.weight": torch.zeros(2, 4, 4), "blk.0.ffn_up.1.weight": torch.zeros(4, 4)}
    with pytest.raises(BitgrainError, match="ffn_up.1.weight"):
        bitgrain.open_checkpoint(other_model(tmp_path / "n.gguf", "llama", both, expert_count=2, expert_used_count=1))


def test_older_quantization_version_is_refused(tmp_path):
    config = {**LLAMA, "hidden_size": 64}
    more = {"blk.0.attn_v.weight": random_blocks("Q8_0", (32, 64))}
    with pytest.raises(ConfigError, match="quantization_version"):
        bitgrain.open_checkpoint(write_model(tmp_path / "m.gguf", config, random_tensors(config), {"general.quantization_version": 1}, more))


@pytest.mark.parametrize("kind, shape", [("Q4_0", (64,)), ("F64", (32, 64)), ("I32", (32, 64))])
def test_types_that_a_module_cannot_have_are_refused(tmp_path, kind, shape):
    value = random_blocks(kind, shape) if kind in BLOCK_TYPES else torch.zeros(shape, dtype=torch.float64 if kind == "F64" else torch.int32)
    name = "blk.0.attn_norm.weight" if len(shape) == 1 else "blk.0.attn_v.weight"
    with pytest.raises(BitgrainError, match="input_layernorm|v_proj"):
        bitgrain.open_checkpoint(write_model(tmp_path / "m.gguf", LLAMA, random_tensors(LLAMA), more={name: value}))


def test_scales_beside_types_that_have_none_are_refused(tmp_path):
    with pytest.raises(UnexpectedTensorError, match="v_proj.scale"):
        bitgrain.open_checkpoint(write_model(tmp_path / "m.gguf", LLAMA, random_tensors(LLAMA), more={"blk.0.attn_v.scale": torch.ones(1)}))


# --- what blocks mean ---------------------------------------------------------------------------------------------------
def scheme_of(tensors):
    """The scheme that a configuration gives a module of these tensors: Packed or torch ones by local name."""
    headers = {}
    for local, value in tensors.items():
        kind, shape = (value.kind, value.shape) if isinstance(value, Packed) else ("F32", tuple(value.shape))
        headers[local] = TensorHeader(f"model.layers.0.mlp.up_proj.{local}", kind, shape, "m.gguf", 0, 0)
    return GGUFConfig().decide(ModuleView("model.layers.0.mlp.up_proj", ModuleKind.LINEAR, headers, (next(iter(headers.values())).shape))).scheme


def decoded(tensors):
    scheme = scheme_of(tensors)
    data = {k: torch.frombuffer(bytearray(v.data), dtype=torch.uint8).view(v.shape[0], -1) if isinstance(v, Packed) else v for k, v in tensors.items()}
    weight = scheme.to_weight(data)
    assert weight.spec == scheme.weight_spec and weight.shape == scheme.shape
    return weight


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_every_type_becomes_the_weight_that_holds_it_exactly(kind):
    for blocks in (1, 3):
        weight = decoded({"weight": random_blocks(kind, (5, blocks * BLOCK_TYPES[kind].elements))})
        expected = BlockFloatWeight if kind in ("MXFP4", "NVFP4") else IntAffineWeight if kind in ("Q4_0", "Q5_0", "Q8_0", "Q2_0", "TQ2_0") else SuperBlockWeight
        assert isinstance(weight, expected) and torch.isfinite(weight.dequantize()).all()
    assert kind.lower() in scheme_of({"weight": random_blocks(kind, (5, 512))}).label


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def test_mxfp4_has_the_exponent_first_and_halves_of_nibbles():
    # every exponent but the last with every element; the smallest two are subnormal
    codes = list(range(16)) * 2
    blocks = b"".join(bytes([e]) + bytes(codes[j] | codes[j + 16] << 4 for j in range(16)) for e in range(254))
    got = decoded({"weight": Packed("MXFP4", (1, 254 * 32), blocks)}).dequantize().view(254, 32)
    want = torch.tensor([[float(torch.tensor(2.0 ** (e - 127) * E2M1[c], dtype=torch.float64).float()) for c in codes] for e in range(254)])
    assert torch.equal(got, want) and got[0].abs().max() == 6 * 2.0**-127


def nvfp4_block(scales, codes):
    return bytes(scales) + b"".join(bytes(codes[16 * s + j] | codes[16 * s + j + 8] << 4 for j in range(8)) for s in range(4))


def e4m3(code):
    if code in (0, 0x7F):
        return 0.0
    e, m = code >> 3, code & 7
    return (1 + m / 8) * 2.0 ** (e - 7) if e else m * 2.0**-9


@pytest.mark.parametrize("second", [None, 0.37])
def test_nvfp4_has_four_scales_and_perhaps_a_factor(second):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (32, 64), generator=generator).tolist()
    blocks = b"".join(nvfp4_block(range(4 * i, 4 * i + 4), codes[i]) for i in range(32))  # all codes from 0 to 127
    tensors = {"weight": Packed("NVFP4", (2, 16 * 64), blocks), "input_scale": torch.tensor([1.5])}
    got = decoded(tensors if second is None else tensors | {"scale": torch.tensor([second])}).dequantize().view(32, 64)
    want = torch.tensor([[e4m3(4 * i + j // 16) * E2M1[codes[i][j]] for j in range(64)] for i in range(32)])
    if second is None:
        assert torch.equal(got, want)
    else:
        torch.testing.assert_close(got, want * second, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [k for k in BLOCK_TYPES if k not in ("MXFP4", "NVFP4")])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scale_that_is_no_number_is_refused(kind, bad):
    from bitgrain.numerics.super_blocks import write_block_scales

    made = random_blocks(kind, (2, BLOCK_TYPES[kind].elements))
    blocks = torch.frombuffer(bytearray(made.data), dtype=torch.uint8).view(2, -1)
    write_block_scales(blocks[1:], kind, torch.tensor([bad]))
    with pytest.raises(BadValueError, match="weight"):
        decoded({"weight": Packed(kind, made.shape, blocks.numpy().tobytes())})


@pytest.mark.parametrize("kind, at, byte", [("MXFP4", 0, 255), ("NVFP4", 2, 0x80), ("NVFP4", 3, 0xFF)])
def test_one_byte_scales_that_no_writer_means_are_refused(kind, at, byte):
    made = random_blocks(kind, (1, 64))
    data = bytearray(made.data)
    data[at] = byte
    with pytest.raises(BadValueError, match="weight"):
        decoded({"weight": Packed(kind, made.shape, bytes(data))})


@pytest.mark.parametrize("local", ["scale", "input_scale"])
@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_factors_that_no_writer_means_are_refused(local, bad):
    with pytest.raises(BadValueError, match=local):
        decoded({"weight": random_blocks("NVFP4", (1, 64)), local: torch.tensor([bad])})


def test_factors_of_experts_are_one_each(tmp_path):
    config = {**QWEN3_MOE, "num_hidden_layers": 1, "moe_intermediate_size": 64}
    stack = random_blocks("NVFP4", (6, 64, 64))
    more = {"blk.0.ffn_up_exps.weight": stack, "blk.0.ffn_up_exps.scale": torch.arange(1.0, 7.0), "blk.0.ffn_up_exps.input_scale": torch.ones(6)}
    tensors = random_tensors(config)
    scaled = bitgrain.open_checkpoint(write_model(tmp_path / "a.gguf", config, tensors, more=more))
    plain = bitgrain.open_checkpoint(write_model(tmp_path / "b.gguf", config, tensors, more={"blk.0.ffn_up_exps.weight": stack}))
    for expert in range(6):
        name = f"model.layers.0.mlp.experts.{expert}.up_proj.weight"
        torch.testing.assert_close(scaled.dequantize(name), plain.dequantize(name) * (expert + 1), rtol=1e-6, atol=0)
    bitgrain.load_model(tmp_path / "a.gguf", device="cpu")


def test_detection_shows_the_types(tmp_path):
    files = open_files(write_model(tmp_path / "m.gguf", LLAMA, random_tensors(LLAMA)))
    found = GGUFConfig.detect(gather_evidence(files))
    assert found is not None and found.score == 100 and "F32" in " ".join(found.reasons)
