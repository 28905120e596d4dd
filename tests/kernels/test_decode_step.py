"""Decode steps in one native call: the bits of the modules one by one, and the reasons for which they are not taken."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import bitgrain
from bitgrain.engine.llm import LLM
from bitgrain.errors import RequestError, RunError
from bitgrain.kernels.cpu import library
from bitgrain.models.batch import Batch, Segment
from tests.checkpoints import write_checkpoint
from tests.unit.models.tiny_models import BASE, random_tensors

pytestmark = pytest.mark.skipif(bool(library.missing()), reason=library.missing() or "the native library is there")

SIZES = {**BASE, "max_position_embeddings": 128, "vocab_size": 50, "num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16"}
FLOOR = {"kernels": {"decode_step": "reference.decode_step"}}


def written(folder, **changes):
    config = {**SIZES, **changes}
    return write_checkpoint(folder, random_tensors(config), config)


def decode_row(model) -> dict:
    return next(row for row in model.explain() if row["modules"] == "decode step")


def refused(model) -> str:
    row = decode_row(model)
    assert row["kernel"] == "reference.decode_step" and model.decoder is None
    return next(c["reason"] for c in row["candidates"] if c["kernel"] == "cpu.decode_step")


def prompted(model, lengths) -> list:
    caches = [model.new_cache(100) for _ in lengths]
    for cache, length in zip(caches, lengths, strict=True):
        if length:
            model.forward(Batch(torch.arange(length) % 40, torch.arange(length), (Segment(cache, 0, length),), torch.tensor([length - 1])))
    return caches


def step(model, caches, tokens=None, rows=None) -> torch.Tensor:
    count = len(caches)
    segments = tuple(Segment(cache, row, 1) for row, cache in enumerate(caches))
    tokens = torch.arange(3, 3 + count) if tokens is None else tokens
    return model.forward(Batch(tokens, torch.tensor([c.length for c in caches]), segments, torch.arange(count) if rows is None else rows))


def assert_equal_caches(found, wanted) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.length == theirs.length
        for layer in range(2):
            assert all(torch.equal(a, b) for a, b in zip(ours.read(layer, torch.float32), theirs.read(layer, torch.float32), strict=True))


CASES = {
    "dense-bf16": (LLAMA, {"dtype": "bfloat16"}),
    "dense-f16-bias": ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, {"dtype": "float16"}),
    "dense-f32": (LLAMA, {"dtype": "float32"}),
    "tied": ({**LLAMA, "tie_word_embeddings": True}, {"dtype": "bfloat16"}),
    "int4": (QWEN3, {"quantization": "int4"}),
    "int4-f16": (QWEN3, {"quantization": "int4", "dtype": "float16"}),
    "int4-fast": (QWEN3, {"quantization": "int4", "fidelity": "fast"}),
    "int8": (QWEN3, {"quantization": "int8"}),
    "fp8": (LLAMA, {"quantization": "fp8", "activations": "none"}),
    "mxfp4": (LLAMA, {"quantization": "mxfp4"}),
    "nvfp4": (QWEN3, {"quantization": "nvfp4"}),
    "interleaved": ({"architectures": ["GlmForCausalLM"], "model_type": "glm", "partial_rotary_factor": 0.5, "attention_bias": True}, {"dtype": "bfloat16"}),
    "window": ({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 6}, {"dtype": "bfloat16"}),
    "norms-behind": ({"architectures": ["Glm4ForCausalLM"], "model_type": "glm4", "partial_rotary_factor": 0.5}, {"dtype": "bfloat16"}),
}


@pytest.fixture(scope="module", params=sorted(CASES))
def pair(request, tmp_path_factory):
    """(a model with native steps, the same without)."""
    changes, options = CASES[request.param]
    place = written(tmp_path_factory.mktemp(request.param), **changes)
    both = bitgrain.load_model(place, device="cpu", **options), bitgrain.load_model(place, device="cpu", **options, **FLOOR)
    assert decode_row(both[0])["kernel"] == "cpu.decode_step" and decode_row(both[1])["kernel"] == "reference.decode_step"
    return both


@pytest.mark.parametrize("lengths", [(0,), (5, 60), (1, 9, 64, 0, 33)], ids=len)
@pytest.mark.parametrize("threads", [1, 2])
def test_steps_have_the_bits_of_the_modules(pair, lengths, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        native, floor = pair
        ours, theirs = prompted(native, lengths), prompted(floor, lengths)
        for at in range(8):  # past a cache that grows
            tokens = (torch.arange(len(lengths)) * 7 + at) % 50
            found, wanted = step(native, ours, tokens), step(floor, theirs, tokens)
            assert found.dtype == torch.float32 and torch.equal(found, wanted)
        assert_equal_caches(ours, theirs)
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """As `pair`, of integers of four bits."""
    place = written(tmp_path_factory.mktemp("models"), **QWEN3)
    return bitgrain.load_model(place, device="cpu", quantization="int4"), bitgrain.load_model(place, device="cpu", quantization="int4", **FLOOR)


@pytest.fixture
def taken(models, monkeypatch):
    """Rows of each step that runs natively."""
    runnable, counts = models[0].decoder.runnable, []
    before = type(runnable).run
    monkeypatch.setattr(type(runnable), "run", lambda self, rows: counts.append(len(rows.lengths)) or before(self, rows))
    return counts


def test_both_ways_alternate_on_the_same_caches(models, taken):
    native, floor = models
    ours, theirs = prompted(native, (3, 7)), prompted(floor, (3, 7))
    for model in (native, floor, native, native, floor):
        assert torch.equal(step(model, ours), step(floor, theirs))
    assert_equal_caches(ours, theirs)
    assert taken == [2, 2, 2]


def test_more_rows_than_before_and_fewer_again(models, taken):
    native, floor = models
    lengths = (3, 0, 12, 1, 1, 30, 2)
    ours, theirs = prompted(native, lengths), prompted(floor, lengths)
    taken.clear()
    for count in (1, 7, 2, 7):
        assert torch.equal(step(native, ours[:count]), step(floor, theirs[:count]))
    assert_equal_caches(ours, theirs)
    assert taken == [1, 7, 2, 7]


def test_row_has_its_bits_whatever_the_others(models):
    model = models[0]
    lengths = (3, 0, 12, 1, 1, 30, 2)
    together = step(model, prompted(model, lengths))
    for row, length in enumerate(lengths):
        assert torch.equal(together[row], step(model, prompted(model, (length,)), torch.tensor([3 + row]))[0])


def test_long_context_is_shared_among_threads(models):
    native, floor = models
    ours, theirs = prompted(native, (99, 2)), prompted(floor, (99, 2))
    before = torch.get_num_threads()
    for cache in (*ours, *theirs):
        cache.truncate(min(cache.length, 98))
    torch.set_num_threads(3)
    try:
        assert torch.equal(step(native, ours), step(floor, theirs))
    finally:
        torch.set_num_threads(before)


def test_prompts_mixed_batches_and_other_logits_run_by_modules(models, taken):
    model = models[0]
    caches = prompted(model, (3, 3, 3))
    rows = tuple(Segment(cache, row, 1) for row, cache in enumerate(caches[:2]))
    mixed = Batch(torch.arange(4), torch.tensor([3, 3, 3, 4]), (*rows, Segment(caches[2], 2, 2)), torch.tensor([0, 1, 3]))
    assert model.forward(mixed).shape == (3, 50)
    assert step(model, caches, rows=torch.tensor([2, 0])).shape == (2, 50)
    assert taken == [] and [c.length for c in caches] == [5, 5, 6]


def test_head_of_more_rows_than_the_dense_product_takes_runs_behind_the_call(models, taken, monkeypatch):
    native, floor = models
    ours, theirs = prompted(native, (2, 5, 3)), prompted(floor, (2, 5, 3))
    monkeypatch.setattr(native.decoder.runnable, "_rows_with_head", 2)
    for count in (3, 2, 1, 3):
        assert torch.equal(step(native, ours[:count]), step(floor, theirs[:count]))
    assert taken == [3, 2, 1, 3]


def test_more_rows_than_a_step_takes_run_by_modules(models, taken, monkeypatch):
    native, floor = models
    monkeypatch.setattr(native.decoder.runnable, "most_rows", 2)
    ours, theirs = prompted(native, (2, 2, 2)), prompted(floor, (2, 2, 2))
    assert torch.equal(step(native, ours), step(floor, theirs)) and taken == []


def test_cache_of_another_kind_runs_by_modules(models, taken, tmp_path):
    model = models[0]
    other = bitgrain.load_model(written(tmp_path, **QWEN3), device="cpu", quantization="int4", kv_cache="int8")
    cache = other.new_cache(20)
    assert cache.addresses(model.decoder.shapes, torch.bfloat16) is None
    assert step(model, [cache]).shape == (1, 50)
    assert taken == [] and cache.length == 1


def test_cache_of_another_dtype_has_no_addresses(models):
    (cache,) = prompted(models[0], (3,))
    shapes = models[0].decoder.shapes
    assert cache.addresses(shapes, torch.bfloat16).numel() == 4
    assert cache.addresses(shapes, torch.float32) is None and cache.addresses(((4, 16),) * 2, torch.bfloat16) is None


def test_full_cache_is_refused_and_stays_as_it_is(models, taken):
    model = models[0]
    cache = model.new_cache(4)
    model.forward(Batch(torch.arange(4), torch.arange(4), (Segment(cache, 0, 4),), torch.tensor([3])))
    with pytest.raises(RequestError, match="cache's room"):
        step(model, [cache])
    with pytest.raises(RequestError, match="at most 4"):
        cache.addresses(model.decoder.shapes, torch.bfloat16)
    assert taken == [] and cache.length == 4


def test_failed_call_leaves_the_lengths_and_the_next_step_its_bits(models, monkeypatch):
    native, floor = models
    ours, theirs = prompted(native, (5,)), prompted(floor, (5,))
    with monkeypatch.context() as patch:
        patch.setattr(type(native.decoder.runnable._kernel), "apply", lambda *given: library.check(3, "decode step"))
        with pytest.raises(RunError, match="decode step"):
            step(native, ours)
    assert ours[0].length == 5
    assert torch.equal(step(native, ours), step(floor, theirs))


def test_engine_gives_the_tokens_of_the_floor(models, taken):
    prompts = [[5, 9, 17], [2, 2], [33, 1, 4, 4, 8]]
    found = []
    for model in models:
        with LLM.from_parts(model, None) as llm:
            found.append([c.token_ids for c in llm.generate(prompts, bitgrain.SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True))])
    assert found[0] == found[1] and taken


REFUSALS = {
    "experts": ({**QWEN3, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
                 "moe_intermediate_size": 64, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}, {}, "SparseMLP does not describe itself"),
    "cache": (LLAMA, {"kv_cache": "int8"}, "keeps a KV cache in int8"),
    "gate": ({"architectures": ["GemmaForCausalLM"], "model_type": "gemma", "hidden_act": "gelu_pytorch_tanh"}, {}, "reference.gate runs where cpu.gate"),
    "norm": (LLAMA, {"forbid": ("cpu.norm",)}, "reference.norm runs where cpu.norm"),
    "linear": (LLAMA, {"quantization": "int4", "kernels": {"linear": "reference.linear"}}, "reference.linear is not a function"),
    "activation": (LLAMA, {"quantization": "mxfp4-a8"}, "its input is quantized"),
    "angles": ({"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}, {"dtype": "bfloat16"}, "angles are float32"),
    "forbidden": (LLAMA, {"forbid": ("cpu.decode_step",)}, "forbidden"),
}  # fmt: skip


@pytest.mark.parametrize("what", sorted(REFUSALS))
def test_refusal_says_why_and_the_modules_run(what, tmp_path):
    changes, options, reason = REFUSALS[what]
    model = bitgrain.load_model(written(tmp_path, **changes), device="cpu", **options)
    assert reason in refused(model)
    assert step(model, prompted(model, (3,))).shape == (1, 50)


def test_threads_that_share_a_model_wait_for_each_other(tmp_path):
    model = bitgrain.load_model(written(tmp_path / "model", **LLAMA), dtype="bfloat16")
    assert decode_row(model)["kernel"] == "cpu.decode_step"
    tokens = [torch.full((4,), token) for token in range(4)]

    def generated(token: torch.Tensor) -> torch.Tensor:
        caches = prompted(model, [0, 0, 0, 0])
        return torch.stack([step(model, caches, token) for _ in range(40)])

    wanted = [generated(token) for token in tokens]
    with ThreadPoolExecutor(len(tokens)) as pool:
        found = list(pool.map(generated, tokens))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
