"""Agreement with llama.cpp, a real client of the format, on files that its own tool wrote.

Needs llama-cpp-python (the extra `peers`).  llama.cpp rounds activations to 8 bits in front of packed weights, 16 in front of
16-bit ones; the bounds are what that costs: a direction within 0.1 % (cosine), or a few thousandths of the largest logit.
"""

from __future__ import annotations

import struct

import pytest
import torch

import bitgrain
from tests.checkpoints import llama_config
from tests.unit.formats.gguf_models import write_model

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (pip install llama-cpp-python)")

HIDDEN, VOCAB = 256, 64
TOKENS = [1, 7, 42, 9, 9, 3, 60, 17, 25, 33, 4, 5]
FILE_TYPES = {"F16": 1, "Q4_0": 2, "Q8_0": 7, "Q3_K_M": 12, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18, "IQ4_XS": 30, "IQ4_NL": 25}
TOKENIZER = {
    "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(chr(0x4E00 + i) for i in range(VOCAB - 3))],
    "tokenizer.ggml.scores": [0.0] * VOCAB, "tokenizer.ggml.token_type": struct.pack(f"<IIQ{VOCAB}i", 9, 5, VOCAB, 2, 3, 3, *[1] * (VOCAB - 3)), "tokenizer.ggml.bos_token_id": 1,
}  # fmt: skip


@pytest.fixture(scope="module", params=["dense", "experts"])
def source(request, tmp_path_factory):
    """A float32 file."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (128, HIDDEN), "self_attn.v_proj": (128, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN)}
    config = llama_config(hidden_size=HIDDEN, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCAB, head_dim=64)
    if request.param == "experts":
        config |= {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
        config |= {"norm_topk_prob": True}
        experts = [f"mlp.experts.{i}" for i in range(4)]
        shapes |= {"mlp.gate": (4, HIDDEN)}
    else:
        experts = ["mlp"]
    width = 512 if request.param == "dense" else 256
    for name in experts:
        shapes |= {f"{name}.gate_proj": (width, HIDDEN), f"{name}.up_proj": (width, HIDDEN), f"{name}.down_proj": (HIDDEN, width)}
    tensors = {"model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN, generator=generator), "lm_head.weight": torch.randn(VOCAB, HIDDEN, generator=generator) * 0.1}
    tensors["model.norm.weight"] = torch.ones(HIDDEN)
    for i in range(2):
        tensors |= {f"model.layers.{i}.{name}.weight": torch.randn(shape, generator=generator) * shape[1] ** -0.5 for name, shape in shapes.items()}
        tensors |= {f"model.layers.{i}.{n}_layernorm.weight": torch.ones(HIDDEN) for n in ("input", "post_attention")}
        if request.param == "experts":
            tensors |= {f"model.layers.{i}.self_attn.{n}_norm.weight": torch.ones(64) for n in "qk"}
    folder = tmp_path_factory.mktemp(request.param)
    return write_model(folder / "source.gguf", config, tensors, TOKENIZER | {"tokenizer.ggml.eos_token_id": 2})


@pytest.fixture(scope="module")
def written(source):
    """Type to the file that llama.cpp's quantizer made of the source; made when it is asked for."""

    def write(kind: str):
        target = source.with_name(f"{kind}.gguf")
        if kind == "F32":
            return source
        if not target.exists():
            params = llama_cpp.llama_model_quantize_default_params()
            params.ftype, params.nthread = FILE_TYPES[kind], 1
            assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params) == 0
        return target

    return write


def logits_of_llama(path) -> torch.Tensor:
    import numpy as np

    model = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, n_threads=1, verbose=False)
    model.eval(TOKENS)
    return torch.from_numpy(np.array(model.scores[: len(TOKENS)], dtype=np.float32))


@pytest.mark.parametrize("kind", ["F32", *FILE_TYPES])
def test_logits_agree(written, kind):
    path = written(kind)
    theirs = logits_of_llama(path)
    ours = bitgrain.load_model(path, dtype="float32").logits(torch.tensor(TOKENS))
    wide = kind in ("F32", "F16")
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < (4e-3 if wide else 8e-2)
    assert float(torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)) > (0.99999 if wide else 0.999)


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q4_0", "Q6_K"])
def test_weights_alone_differ_from_another_file_by_far_more(written, kind):
    """The bounds above would notice another matrix: the same logits against those of another type are outside."""
    ours = bitgrain.load_model(written(kind), dtype="float32").logits(torch.tensor(TOKENS))
    other = logits_of_llama(written("Q3_K_M"))
    assert float(torch.cosine_similarity(ours.flatten(), other.flatten(), dim=0)) < 0.999
