"""Small checkpoints made by the tests: a dense Llama of random weights, and edits of any checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

HIDDEN, LAYERS, INTERMEDIATE, HEADS, KV_HEADS, VOCAB = 64, 2, 96, 4, 2, 48
HEAD_DIM = HIDDEN // HEADS


def llama_config(**changes) -> dict:
    """config.json of the small Llama."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB, "hidden_act": "silu",
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": 2, **changes,
    }  # fmt: skip


def linear_shapes() -> dict[str, tuple[int, int]]:
    """(N, K) of every linear module."""
    shapes = {}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.self_attn.q_proj"] = (HEADS * HEAD_DIM, HIDDEN)
        shapes[f"{layer}.self_attn.k_proj"] = (KV_HEADS * HEAD_DIM, HIDDEN)
        shapes[f"{layer}.self_attn.v_proj"] = (KV_HEADS * HEAD_DIM, HIDDEN)
        shapes[f"{layer}.self_attn.o_proj"] = (HIDDEN, HEADS * HEAD_DIM)
        shapes[f"{layer}.mlp.gate_proj"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{layer}.mlp.up_proj"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{layer}.mlp.down_proj"] = (HIDDEN, INTERMEDIATE)
    return shapes


def llama_tensors(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Random weights of the small Llama by tensor name."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) * 0.1 for name, shape in linear_shapes().items()}
    tensors["model.embed_tokens.weight"] = torch.randn(VOCAB, HIDDEN, generator=generator)
    tensors["lm_head.weight"] = torch.randn(VOCAB, HIDDEN, generator=generator) * 0.1
    norms = ["model.norm", *(f"model.layers.{i}.{n}_layernorm" for i in range(LAYERS) for n in ("input", "post_attention"))]
    tensors |= {f"{name}.weight": 1 + 0.1 * torch.randn(HIDDEN, generator=generator) for name in norms}
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], config: dict) -> Path:
    """Write model.safetensors and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_tokenizer(folder: Path) -> Path:
    """A word-level tokenizer of fewer words than VOCAB beside the checkpoint."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB - 4)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


def small_llama(folder: Path, **changes) -> Path:
    """The dense small Llama on disk."""
    return write_checkpoint(folder, llama_tensors(), llama_config(**changes))


def edited(source: Path, target: Path, tensors: Callable[[dict], object] | None = None, config: Callable[[dict], object] | None = None) -> Path:
    """A copy of a checkpoint with its tensors or its config.json edited in place by the callbacks."""
    shutil.copytree(source, target)
    if tensors is not None:
        held = load_file(target / "model.safetensors")
        tensors(held)
        save_file(held, target / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        values = json.loads((target / "config.json").read_text())
        config(values)
        (target / "config.json").write_text(json.dumps(values))
    return target
