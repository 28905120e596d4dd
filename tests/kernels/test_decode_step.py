"""Decode steps in one native call: the bits of the modules one by one, and the reasons for which they are not taken."""

from __future__ import annotations

import pytest
import torch

import bitgrain
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
