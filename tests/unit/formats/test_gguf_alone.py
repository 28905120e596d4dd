"""A GGUF file and nothing else on disk: text in and out, errors that name the file, the Mistral 3 architecture, scales that nobody applies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import bitgrain
from bitgrain.checkpoint.files import open_files
from bitgrain.engine import LLM, SamplingParams, Tokenizer
from bitgrain.errors import BitgrainError, ConfigError, ConflictingConfigError, MissingTensorError
from bitgrain.formats.detect import described
from bitgrain.layers.rotary import QueryGrowth
from bitgrain.models.config import ModelConfig
from tests.unit.checkpoint.gguf_bytes import random_blocks, write_gguf
from tests.unit.formats.gguf_models import metadata_of, stored, write_model
from tests.unit.models.tiny_models import LLAMA, random_tensors

K = "tokenizer.ggml."
GOLDEN = Path(__file__).parents[2] / "golden" / "tokenizers"
LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]
TOKENS = ["<unk>", "<s>", "</s>", "▁", *LETTERS, "▁a", "▁ab", "<|u|>"]
TOKENIZER = {
    f"{K}model": "llama", f"{K}tokens": TOKENS, f"{K}scores": [float(-i) for i in range(len(TOKENS))],
    f"{K}token_type": [2, 3, 3, *[1] * (len(TOKENS) - 4), 3], f"{K}bos_token_id": 1, f"{K}eos_token_id": 2, f"{K}eot_token_id": len(TOKENS) - 1,
    "tokenizer.chat_template": "{% for m in messages %}<|u|>{{ m.content }}{% endfor %}",
}  # fmt: skip
SMALL = LLAMA | {"vocab_size": 64}


def lone(path: Path, **extra) -> Path:
    return write_model(path / "lone.gguf", SMALL, random_tensors(SMALL), TOKENIZER | extra)


def test_text_and_chat_work_with_the_file_alone(tmp_path):
    path = lone(tmp_path)
    with LLM(path, device="cpu", dtype="float32") as llm:
        (done,) = llm.generate("abc", SamplingParams(max_tokens=4, temperature=0))
        assert llm.tokenizer.encode("abc") == [1, TOKENS.index("▁ab"), TOKENS.index("c")]
        ids = [*llm.tokenizer.encode("abc"), *done.token_ids]
        want = llm.model.logits(torch.tensor(ids)).argmax(-1)[2 : 2 + len(done.token_ids)]
        assert list(done.token_ids) == want.tolist()
        answer = llm.chat([{"role": "user", "content": "ab"}], SamplingParams(max_tokens=2, temperature=0))
        assert answer.prompt_tokens == 2  # <|u|> and ▁ab
        assert llm.tokenizer.eos_token_ids == {2, len(TOKENS) - 1}


def test_folder_with_the_file_works_too_and_its_own_tokenizer_wins_over_one_beside_it(tmp_path):
    lone(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert Tokenizer.from_checkpoint(open_files(tmp_path)).encode("ab", add_special_tokens=False) == [TOKENS.index("▁ab")]


def test_tokenizer_beside_the_file_serves_where_it_holds_none(tmp_path):
    path = lone(tmp_path, **{f"{K}model": "none"})
    with pytest.raises(ConfigError, match=r"lone\.gguf: tokenizer\.ggml\.model: 'none'"):
        Tokenizer.from_checkpoint(open_files(path))
    whole = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    assert Tokenizer.from_checkpoint(open_files(path)).encode("ab") == [0, 1]


def test_model_computes_from_ids_whatever_its_tokenizer_is(tmp_path):
    path = lone(tmp_path, **{f"{K}model": "bert"})
    logits = bitgrain.load_model(path, device="cpu", dtype="float32").logits(torch.tensor([3, 4, 5]))
    assert logits.shape == (3, 64) and torch.isfinite(logits).all()
    with pytest.raises(ConfigError, match="'bert'"):
        LLM(path, device="cpu")


def test_more_tokens_than_the_model_has_are_refused(tmp_path):
    small = LLAMA | {"vocab_size": 16}
    path = write_model(tmp_path / "m.gguf", small, random_tensors(small), TOKENIZER)
    with pytest.raises(ConflictingConfigError, match=r"m\.gguf"):
        LLM(path, device="cpu")


@pytest.mark.parametrize(
    ("extra", "more"),
    [
        ({"llama.embedding_length": 32}, {}),
        ({"llama.block_count": 3}, {}),
        ({"llama.feed_forward_length": 96}, {}),
        ({"llama.vocab_size": 63}, {}),
        ({"llama.attention.head_count_kv": 1}, {}),
        ({"llama.attention.head_count": 3}, {}),
        ({"llama.rope.dimension_count": 3}, {}),
        ({"llama.rope.scaling.type": "other"}, {}),
        ({}, {"blk.0.attn_q.weight": None}),
        ({}, {"blk.0.attn_norm.weight": torch.ones(7)}),
        ({}, {"token_embd.weight": None}),
    ],
    ids=str,
)
def test_errors_name_the_file_and_never_one_that_it_does_not_have(tmp_path, extra, more):
    path = write_model(tmp_path / "named.gguf", SMALL, random_tensors(SMALL), TOKENIZER | extra, more)
    with pytest.raises(BitgrainError) as caught:
        bitgrain.load_model(path, device="cpu")
    for problem in getattr(caught.value, "problems", (caught.value,)):
        assert "named.gguf" in str(problem) and "config.json" not in str(problem), str(problem)


def test_key_that_is_read_twice_is_one_problem(tmp_path):
    path = write_model(tmp_path / "m.gguf", SMALL, random_tensors(SMALL), {"llama.block_count": None})
    with pytest.raises(ConfigError) as caught:
        described(open_files(path))
    assert caught.value.where == "m.gguf: llama.block_count" and caught.value.found == "absent"


def mistral3(path: Path, extra: dict) -> Path:
    """The tiny Llama model under another architecture's name."""
    keys = {key.replace("llama.", "mistral3.", 1): value for key, value in metadata_of(SMALL).items()}
    named = {f"mistral3.{key}": value for key, value in extra.items()}
    return write_gguf(path / "m3.gguf", keys | {"general.architecture": "mistral3"} | named, stored(SMALL, random_tensors(SMALL)))


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}


def test_mistral3_without_growing_queries_is_mistral_with_rows_of_llama(tmp_path):
    ids = torch.tensor([3, 1, 4, 1, 5, 9])
    mine = bitgrain.load_model(mistral3(tmp_path, {}), device="cpu", dtype="float32")
    same = bitgrain.load_model(write_model(tmp_path / "llama.gguf", SMALL, random_tensors(SMALL)), device="cpu", dtype="float32")
    assert described(open_files(tmp_path / "m3.gguf")).config["architectures"] == ["MistralForCausalLM"]
    torch.testing.assert_close(mine.logits(ids), same.logits(ids), rtol=0, atol=0)


def test_mistral3_with_growing_queries_is_ministral(tmp_path):
    extra = {**YARN, "rope.scaling.yarn_log_multiplier": 0.5, "attention.temperature_scale": 0.25}
    config = described(open_files(mistral3(tmp_path, extra))).config
    assert config["architectures"] == ["Ministral3ForCausalLM"] and config["rope_scaling"]["llama_4_scaling_beta"] == 0.25
    read = ModelConfig.from_dict(config, "m3.gguf")
    assert (read.rope.mscale, read.rope.mscale_all_dim) == (1.0, 0.5) and read.query_growth == QueryGrowth(0.25, 32)


@pytest.mark.parametrize(("extra", "key"), [({"attention.temperature_scale": 0.1}, "attention.temperature_scale"), ({"expert_count": 4}, "expert_count")])
def test_mistral3_that_no_model_computes_is_refused_by_its_key(tmp_path, extra, key):
    with pytest.raises(ConfigError, match=rf"m3\.gguf: mistral3\.{key}"):
        described(open_files(mistral3(tmp_path, extra)))


def test_scales_of_four_bit_inputs_are_left_out_under_a_named_rule(tmp_path):
    config = LLAMA | {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    packed = random_blocks("NVFP4", (64, 64))
    more = {"blk.0.attn_q.weight": packed, "blk.0.attn_q.input_scale": torch.tensor([3.0]), "blk.0.attn_k.weight": random_blocks("NVFP4", (64, 64))}
    with_scale = bitgrain.open_checkpoint(write_model(tmp_path / "a.gguf", config, random_tensors(config), more=more))
    without = bitgrain.open_checkpoint(write_model(tmp_path / "b.gguf", config, random_tensors(config), more={k: v for k, v in more.items() if "input" not in k}))
    query, key = (with_scale.plan.modules[f"model.layers.0.self_attn.{name}_proj"] for name in "qk")
    assert "input_scale is checked and not applied" in query.why and "input_scale" not in key.why
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(with_scale.dequantize(name), without.dequantize(name))


def test_absent_tensor_is_named_with_the_file(tmp_path):
    path = write_model(tmp_path / "m.gguf", SMALL, random_tensors(SMALL), more={"output_norm.weight": None})
    with pytest.raises(MissingTensorError, match=r"model\.norm\.weight.*[\s\S]*correct m\.gguf: metadata"):
        bitgrain.open_checkpoint(path)
