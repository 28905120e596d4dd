"""Architectures without a file of ours run through the transformers library's modelling code, with our modules in it."""

from __future__ import annotations

import json

import pytest
import torch

import bitgrain
from bitgrain.engine.engine import EngineOptions
from bitgrain.engine.llm import LLM
from bitgrain.errors import BitgrainError, MissingTensorError, RequestError, UnexpectedTensorError, UnsupportedArchitectureError
from bitgrain.models.batch import Batch, Segment
from bitgrain.models.registry import models
from tests.hosts.small_models import CONFIGS, IDS, SPARSE, edit, emulate_input, fill, quantize, reference, relative, saved_model


def load(folder, **options):
    return bitgrain.load_model(folder, **{"dtype": "float32", "model_impl": "transformers", **options})


@pytest.mark.parametrize("kind", [*CONFIGS, *SPARSE])
def test_dense_checkpoint_equals_the_library(kind, tmp_path):
    model, folder = saved_model(kind, tmp_path)
    hosted = bitgrain.load_model(folder, dtype="float32")
    assert type(model).__name__ not in models.names(), "bitgrain has a file for it now: test another architecture here"
    assert hosted.plan.modelling.startswith("transformers ") and type(model).__name__ in hosted.plan.modelling
    assert relative(hosted.logits(IDS), reference(model)) < 1e-4
    held = [*hosted.named_parameters(remove_duplicate=False), *hosted.named_buffers(remove_duplicate=False)]
    assert not [name for name, tensor in held if tensor.is_meta]
    check_steps(hosted, reference(model))


def check_steps(hosted, want):
    """Two sequences, one of them in parts, in one batch: the same logits as each sequence read at once."""
    first, second = hosted.new_cache(20), hosted.new_cache(20)
    hosted.forward(Batch(IDS[:5], torch.arange(5), (Segment(first, 0, 5),), torch.tensor([], dtype=torch.int64)))
    both = torch.cat([IDS[5:11], IDS[:4]])
    got = hosted.forward(Batch(both, torch.cat([torch.arange(5, 11), torch.arange(4)]), (Segment(first, 0, 6), Segment(second, 6, 4)), torch.tensor([2, 5, 9])))
    assert relative(got, want[[7, 10, 3]]) < 1e-4
    assert first.length == 11 and second.length == 4 and first.nbytes > 0


@pytest.mark.parametrize(("kind", "producer"), [
    ("gpt_neox", "w4a16"), ("cohere", "nf4"), ("falcon", "gptq"), ("starcoder2", "w4a16"), ("phi", "nf4"), ("nemotron", "gptq"), ("opt", "w4a16"),
])  # fmt: skip
def test_quantized_checkpoint_equals_the_library_with_the_same_weights(kind, producer, tmp_path):
    model, folder = saved_model(kind, tmp_path)
    names = quantize(folder, producer)
    checkpoint = bitgrain.open_checkpoint(folder)
    assert all(not checkpoint.plan.modules[name].label.startswith("dense") for name in names) and len(names) >= 8
    dense = reference(model)
    fill(model, folder, names, checkpoint)
    want = reference(model)
    assert relative(want, dense) > 1e-3, "quantization must show, or the comparison proves nothing"
    assert relative(load(folder).logits(IDS), want) < 1e-4


@pytest.mark.parametrize("kind", ["gpt_neox", "stablelm"])
def test_quantized_input_is_part_of_the_product(kind, tmp_path):
    model, folder = saved_model(kind, tmp_path)
    names = quantize(folder, "fp8-dynamic")
    checkpoint = bitgrain.open_checkpoint(folder)
    fill(model, folder, names, checkpoint)
    alone = reference(model)
    assert relative(load(folder, activations="none").logits(IDS), alone) < 1e-4
    emulate_input(model, names, checkpoint)
    assert relative(reference(model), alone) > 1e-3
    assert relative(load(folder, forbid=("cpu",)).logits(IDS), reference(model)) < 1e-4


def test_stored_transposed_weights_are_turned_and_packed_ones_are_not(tmp_path):
    model, folder = saved_model("gpt2", tmp_path)
    plan = bitgrain.open_checkpoint(folder).plan
    assert plan.modules["transformer.h.0.attn.c_attn"].shape == (192, 64)  # stored [64, 192]
    names = quantize(folder, "gptq")
    checkpoint = bitgrain.open_checkpoint(folder)
    fill(model, folder, names, checkpoint)
    assert len(names) == 8 and relative(load(folder).logits(IDS), reference(model)) < 1e-4


def test_bfloat16_is_the_library_within_its_rounding(tmp_path):
    model, folder = saved_model("gpt_neox", tmp_path, torch.bfloat16)
    hosted = bitgrain.load_model(folder)
    assert hosted.dtype is torch.bfloat16 and relative(hosted.logits(IDS), reference(model)) < 3e-2


def test_buffers_are_what_the_library_computes(tmp_path):
    model, folder = saved_model("smollm3", tmp_path, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0})
    hosted = load(folder)
    assert torch.equal(hosted.model.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert relative(hosted.logits(IDS), reference(model)) < 1e-4


def test_rotary_frequencies_that_grow_do_not_remember_longer_sequences(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model, folder = saved_model("stablelm", tmp_path, max_position_embeddings=16, rope_parameters=rope)
    hosted = load(folder)
    hosted.max_context = 64
    longest = IDS.repeat(2)
    shorter = hosted.logits(longest[:20])  # past 16, so its frequencies have grown too, by less
    longer = hosted.logits(longest)
    assert torch.equal(hosted.logits(longest[:20]), shorter)
    assert relative(shorter, reference(model, longest[:20])) < 1e-4 and relative(longer, reference(model, longest)) < 1e-4


# ---- names ----


def test_names_without_the_models_prefix_are_found(tmp_path):
    model, folder = saved_model("gpt2", tmp_path)
    edit(folder, lambda held: [held.__setitem__(name.removeprefix("transformer."), held.pop(name)) for name in list(held)])
    hosted = load(folder)
    assert "h.0.attn.c_attn" in hosted.plan.modules
    assert relative(hosted.logits(IDS), reference(model)) < 1e-4


def test_renamed_and_merged_weights_are_found_under_their_stored_names(tmp_path):
    _, folder = saved_model("phimoe", tmp_path)
    checkpoint = bitgrain.open_checkpoint(folder)
    stored = [name for name in checkpoint.files.tensors if ".experts." in name]
    assert stored and all("block_sparse_moe.experts" in name for name in stored)
    assert checkpoint.plan.modules["model.layers.1.block_sparse_moe.experts.3.w2"].kind.value == "expert"


@pytest.mark.parametrize(("kind", "producer"), [("phimoe", "w4a16"), ("minimax_m2", "gptq")])
def test_quantized_experts_equal_the_library_with_the_same_weights(kind, producer, tmp_path):
    model, folder = saved_model(kind, tmp_path)
    names = quantize(folder, producer)
    checkpoint = bitgrain.open_checkpoint(folder)
    experts = [name for name in names if ".experts." in name]
    assert len(experts) == 24
    fill(model, folder, [n for n in names if n not in experts], checkpoint)
    for index, layer in enumerate(model.model.layers):
        stack = layer.mlp.experts
        for e in range(4):
            gate, up, down = (checkpoint.effective_weight(f"model.layers.{index}.block_sparse_moe.experts.{e}.{own}.weight") for own in ("w1", "w3", "w2"))
            stack.gate_up_proj.data[e], stack.down_proj.data[e] = torch.cat([gate, up]), down
    assert relative(load(folder).logits(IDS), reference(model)) < 1e-4


def test_experts_stored_as_the_library_stacks_them_give_the_same_logits(tmp_path):
    model, folder = saved_model("ernie4_5_moe", tmp_path)
    apart = load(folder).logits(IDS)

    def stack(held):
        for name, parameter in model.named_parameters():
            if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
                held[name] = parameter.detach().clone()
        for name in [n for n in held if ".experts." in n and n.endswith(".weight")]:
            del held[name]

    edit(folder, stack)
    stacked = load(folder)
    assert torch.equal(stacked.logits(IDS), apart)
    assert stacked.plan.modules["model.layers.1.mlp.experts.3.up_proj"].label == "dense float32"


def test_unread_tensors_are_left_out_under_the_librarys_rule(tmp_path):
    model, folder = saved_model("gpt_neox", tmp_path)
    edit(folder, lambda held: held.update({"gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9)}))
    hosted = load(folder)
    assert "does not read it" in hosted.plan.ignored["gpt_neox.layers.0.attention.masked_bias"]
    assert relative(hosted.logits(IDS), reference(model)) < 1e-4


# ---- the ledger ----


@pytest.mark.parametrize("name", ["gpt_neox.layers.1.input_layernorm.bias", "gpt_neox.layers.0.mlp.dense_h_to_4h.weight", "gpt_neox.layers.0.mlp.dense_h_to_4h.bias", "gpt_neox.embed_in.weight"])
def test_missing_tensor_is_named(name, tmp_path):
    _, folder = saved_model("gpt_neox", tmp_path)
    edit(folder, lambda held: held.pop(name))
    with pytest.raises(MissingTensorError, match=name.removesuffix(".weight").replace(".", r"\.")):
        load(folder)


def test_unexpected_tensor_is_named(tmp_path):
    _, folder = saved_model("gpt_neox", tmp_path)
    edit(folder, lambda held: held.update({"gpt_neox.layers.0.mlp.gate.weight": torch.ones(4, 4)}))
    with pytest.raises(UnexpectedTensorError, match=r"mlp\.gate"):
        load(folder)


def test_missing_expert_is_named(tmp_path):
    _, folder = saved_model("phimoe", tmp_path)
    edit(folder, lambda held: held.pop("model.layers.1.block_sparse_moe.experts.2.w3.weight"))
    with pytest.raises(MissingTensorError, match=r"experts\.2\.w3"):
        load(folder)


def test_wrong_shape_is_named(tmp_path):
    _, folder = saved_model("gpt_neox", tmp_path)
    edit(folder, lambda held: held.update({"gpt_neox.final_layer_norm.bias": torch.ones(65)}))
    with pytest.raises(BitgrainError, match=r"final_layer_norm\.bias"):
        load(folder)


# ---- the engine ----


@pytest.mark.parametrize("kind", ["gpt_neox", "phimoe"])
def test_engine_generates_for_sequences_of_different_lengths(kind, tmp_path):
    model, folder = saved_model(kind, tmp_path)
    names = quantize(folder, "w4a16") if kind == "gpt_neox" else []
    fill(model, folder, names, bitgrain.open_checkpoint(folder))
    hosted = load(folder)
    prompts = [IDS[:13].tolist(), IDS[13:16].tolist()]
    params = bitgrain.SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    with LLM.from_parts(hosted, None, EngineOptions(chunked_prefill_size=4)) as llm:
        done = llm.generate(prompts, params)
    for prompt, completion in zip(prompts, done, strict=True):
        tokens = list(prompt)
        for _ in range(6):
            tokens.append(int(reference(model, torch.tensor(tokens))[-1].argmax()))
        assert list(completion.token_ids) == tokens[len(prompt) :]


def test_cache_forgets_what_a_failed_step_has_stored(tmp_path):
    _, folder = saved_model("gpt_neox", tmp_path)
    hosted = load(folder)
    cache, want = hosted.new_cache(12), hosted.logits(IDS[:9])
    whole = lambda start, stop: Batch(IDS[start:stop], torch.arange(start, stop), (Segment(cache, 0, stop - start),), torch.arange(stop - start))  # noqa: E731
    hosted.forward(whole(0, 6))
    last = hosted.model.gpt_neox.layers[1]
    handle = last.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hosted.forward(whole(6, 9))
    handle.remove()
    assert cache.length == 6
    torch.testing.assert_close(hosted.forward(whole(6, 9)), want[6:], rtol=1e-5, atol=1e-5)
    cache.truncate(0)
    assert cache.length == 0
    torch.testing.assert_close(hosted.forward(whole(0, 6)), want[:6], rtol=1e-5, atol=1e-5)


# ---- what is asked for ----


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_both_implementations_of_one_architecture_agree(kind, tmp_path):
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16} if kind == "qwen3_moe" else {}
    _, folder = saved_model(kind, tmp_path, **sizes)
    quantize(folder, "w4a16")
    own, hosted = bitgrain.load_model(folder, dtype="float32"), load(folder)
    assert own.plan.modelling == "bitgrain" and hosted.plan.modelling.startswith("transformers") and own.plan.hash != hosted.plan.hash
    assert relative(hosted.logits(IDS), own.logits(IDS)) < 1e-5


def test_own_code_that_was_asked_for_is_not_replaced(tmp_path):
    _, folder = saved_model("phi", tmp_path)
    assert bitgrain.open_checkpoint(folder, model_impl="bitgrain").plan.modelling.startswith("none")
    with pytest.raises(UnsupportedArchitectureError, match="PhiForCausalLM"):
        bitgrain.load_model(folder, model_impl="bitgrain")
    with pytest.raises(RequestError, match="--model-impl"):
        bitgrain.load_model(folder, model_impl="vllm")


@pytest.mark.parametrize(("kind", "config", "why"), [
    ("gpt_neox", {"architectures": ["GrainForCausalLM"]}, "does not know it"),
    ("gpt_neox", {"architectures": ["GPTNeoXForTokenClassification"]}, "not as a causal language model"),
    ("mamba", {}, "running state"),
])  # fmt: skip
def test_architecture_that_cannot_run_is_refused_with_the_reason_and_still_inspected(kind, config, why, tmp_path):
    _, folder = saved_model(kind, tmp_path)
    edit(folder, None, lambda values: values.update(config))
    checkpoint = bitgrain.open_checkpoint(folder)
    assert checkpoint.plan.modelling.startswith("none: ") and why in checkpoint.plan.modelling and checkpoint.plan.modules
    for options in ({}, {"model_impl": "transformers"}):
        with pytest.raises(UnsupportedArchitectureError, match=why):
            bitgrain.load_model(folder, **options)


def test_shared_memory_of_other_kinds_is_refused_by_name(tmp_path):
    _, folder = saved_model("xlm-roberta", tmp_path, is_decoder=True)
    with pytest.raises(BitgrainError, match=r"lm_head\.decoder\.\w+ shares its memory"):
        bitgrain.load_model(folder)


def test_configuration_that_the_library_refuses_is_an_error(tmp_path):
    _, folder = saved_model("gpt_neox", tmp_path)
    edit(folder, None, lambda values: values.update(hidden_size="wide"))
    with pytest.raises(BitgrainError, match="transformers refuses it"):
        bitgrain.open_checkpoint(folder)


def test_quantized_cache_is_refused_unless_a_plain_one_is_asked_for(tmp_path):
    model, folder = saved_model("gpt_neox", tmp_path)
    with pytest.raises(RequestError, match="cache holds no other"):
        load(folder, kv_cache="int8")
    quantize(folder, "w4a16")
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    edit(folder, None, lambda values: values["quantization_config"].update(kv_cache_scheme=cache))
    scales = {f"gpt_neox.layers.{i}.attention.{which}_scale": torch.tensor([0.5]) for i in range(2) for which in "kv"}
    edit(folder, lambda held: held.update(scales))
    with pytest.raises(RequestError, match=r"layers\.0\.attention.*\n?.*kv_cache='16bit'|kv_cache='16bit'"):
        load(folder)
    fill(model, folder, [n for n, row in bitgrain.open_checkpoint(folder).plan.modules.items() if row.label.startswith("W4")], bitgrain.open_checkpoint(folder))
    assert relative(load(folder, kv_cache="16bit").logits(IDS), reference(model)) < 1e-4


def test_context_is_the_models_or_less(tmp_path):
    _, folder = saved_model("bloom", tmp_path)
    assert load(folder).max_context >= 1 << 20  # slopes reach any position
    _, other = saved_model("opt", tmp_path / "opt")
    assert load(other, context_length=20).max_context == 20
    with pytest.raises(RequestError, match="context_length"):
        load(other, context_length=1000)


def test_unquantized_checkpoint_is_quantized_on_the_way(tmp_path):
    model, folder = saved_model("gpt2", tmp_path)
    hosted = load(folder, quantization="int8")
    assert hosted.plan.modules["transformer.h.1.mlp.c_fc"].label.startswith("online int8")
    assert 1e-6 < relative(hosted.logits(IDS), reference(model)) < 0.1


# ---- code of a checkpoint ----

CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class GrainConfig(LlamaConfig):
    model_type = "grain"

class GrainForCausalLM(LlamaForCausalLM):
    config_class = GrainConfig

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2 {more}
        return out
"""


def remote(folder, monkeypatch, more=""):
    """A model whose code is in the checkpoint."""
    model, _ = saved_model("llama", folder)
    (folder / "modeling_grain.py").write_text(CODE.replace("{more}", more))
    names = {"AutoConfig": "modeling_grain.GrainConfig", "AutoModelForCausalLM": "modeling_grain.GrainForCausalLM"}
    edit(folder, None, lambda values: values.update(architectures=["GrainForCausalLM"], model_type="grain", auto_map=names))
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(folder / "cache"))
    return model, folder


def test_code_of_a_checkpoint_runs_only_when_it_is_trusted(tmp_path, monkeypatch):
    model, folder = remote(tmp_path / "grain_one", monkeypatch)
    with pytest.raises(UnsupportedArchitectureError, match="--trust-remote-code"):
        bitgrain.load_model(folder)
    hosted = bitgrain.load_model(folder, dtype="float32", trust_remote_code=True)
    assert "code of the checkpoint" in hosted.plan.modelling
    assert relative(hosted.logits(IDS), 2 * reference(model)) < 1e-4


def test_code_that_computes_with_a_packed_weight_is_refused_when_it_is_loaded(tmp_path, monkeypatch):
    _, folder = remote(tmp_path / "grain_two", monkeypatch, "+ self.lm_head.weight.sum()")
    with pytest.raises(UnsupportedArchitectureError, match="computes with the weight itself"):
        bitgrain.load_model(folder, trust_remote_code=True)


def test_trust_where_there_is_no_code_is_refused(tmp_path):
    _, folder = saved_model("phi", tmp_path)
    with pytest.raises(RequestError, match="auto_map"):
        bitgrain.load_model(folder, trust_remote_code=True)


# ---- what people see ----


def test_commands_say_whose_code_runs(tmp_path, capsys):
    from bitgrain.cli.main import main

    _, folder = saved_model("phi", tmp_path)
    assert main(["inspect", str(folder)]) == 0
    assert "modelling code: transformers 5" in capsys.readouterr().out
    assert main(["inspect", str(folder), "--model-impl", "bitgrain", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["modelling"].startswith("none")
    assert main(["explain", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["modelling"].startswith("transformers") and any("dense" in row["modules"] or "fc1" in row["modules"] for row in told["modules"])
    assert main(["doctor", "--json"]) == 0
    assert [row["code"] for row in json.loads(capsys.readouterr().out)["modelling"]] == ["bitgrain", "transformers"]


def test_explain_before_and_after_loading_agree(tmp_path, capsys):
    from bitgrain.cli.main import main

    _, folder = saved_model("phimoe", tmp_path)
    quantize(folder, "w4a16")
    assert main(["explain", str(folder), "--dtype", "float32", "--json"]) == 0
    planned = {row["modules"]: row["kernel"] for row in json.loads(capsys.readouterr().out)["modules"]}
    loaded = {row["modules"]: row["kernel"] for row in bitgrain.load_model(folder, dtype="float32").explain()}
    assert loaded.items() <= planned.items() and any("experts" in name for name in loaded)
