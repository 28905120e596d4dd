"""Make checkpoints of real shapes with random or absent data, for tests of size and speed.

    python tools/make_checkpoint.py OUT --shape 1b                    random W4A16 weights, about 1 GB
    python tools/make_checkpoint.py OUT --shape 1b --dense            the same modules in bfloat16, about 2.5 GB
    python tools/make_checkpoint.py OUT --shape 405b --sparse         sparse shards: headers are whole, data are holes
    python tools/make_checkpoint.py OUT --shape 30b-a3b --hollow      experts; codes are holes (zeros), all else is random: loads, takes little disk

Weights are written as GPTQ-style words (4 bits, groups of 128, symmetric), one tensor at a time: memory stays at one module.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

BYTES = {"I32": 4, "F16": 2, "BF16": 2}
GROUP = 128


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama-architecture model, or with `experts` of a Qwen3-MoE one (`intermediate` is an expert's then)."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    quantized: bool = True
    experts: int = 0
    per_token: int = 0
    head: int = 0

    @property
    def head_dim(self) -> int:
        return self.head or self.hidden // self.heads


SHAPES = {
    "tiny": Shape(256, 2, 512, 4, 2, 512, False),
    "0.6b": Shape(1024, 28, 3072, 16, 8, 151936, True),
    "1b": Shape(2048, 16, 8192, 32, 8, 128256, True),
    "8b": Shape(4096, 32, 14336, 32, 8, 128256, False),
    "tiny-moe": Shape(256, 2, 128, 4, 2, 512, False, experts=16, per_token=2, head=64),
    "30b-a3b": Shape(2048, 48, 768, 32, 4, 151936, False, experts=128, per_token=8, head=128),
    "405b": Shape(16384, 126, 53248, 128, 8, 128256, False, quantized=False),
}

Entry = tuple[str, str, list[int]]  # name, dtype, shape


def modules(shape: Shape) -> Iterator[tuple[str, int, int]]:
    """(name, N, K) of every linear module."""
    head = shape.head_dim
    for i in range(shape.layers):
        layer = f"model.layers.{i}"
        yield f"{layer}.self_attn.q_proj", shape.heads * head, shape.hidden
        yield f"{layer}.self_attn.k_proj", shape.kv_heads * head, shape.hidden
        yield f"{layer}.self_attn.v_proj", shape.kv_heads * head, shape.hidden
        yield f"{layer}.self_attn.o_proj", shape.hidden, shape.heads * head
        for mlp in [f"{layer}.mlp.experts.{e}" for e in range(shape.experts)] or [f"{layer}.mlp"]:
            yield f"{mlp}.gate_proj", shape.intermediate, shape.hidden
            yield f"{mlp}.up_proj", shape.intermediate, shape.hidden
            yield f"{mlp}.down_proj", shape.hidden, shape.intermediate


def entries(shape: Shape) -> Iterator[Entry]:
    """Every tensor of the checkpoint."""
    yield "model.embed_tokens.weight", "BF16", [shape.vocab, shape.hidden]
    for name, n, k in modules(shape):
        if shape.quantized:
            yield f"{name}.qweight", "I32", [k // 8, n]
            yield f"{name}.qzeros", "I32", [k // GROUP, n // 8]
            yield f"{name}.scales", "F16", [k // GROUP, n]
        else:
            yield f"{name}.weight", "BF16", [n, k]
    for i in range(shape.layers):
        yield f"model.layers.{i}.input_layernorm.weight", "BF16", [shape.hidden]
        yield f"model.layers.{i}.post_attention_layernorm.weight", "BF16", [shape.hidden]
        if shape.experts:
            yield f"model.layers.{i}.mlp.gate.weight", "BF16", [shape.experts, shape.hidden]
            yield f"model.layers.{i}.self_attn.q_norm.weight", "BF16", [shape.head_dim]
            yield f"model.layers.{i}.self_attn.k_norm.weight", "BF16", [shape.head_dim]
    yield "model.norm.weight", "BF16", [shape.hidden]
    if not shape.tied:
        yield "lm_head.weight", "BF16", [shape.vocab, shape.hidden]


def data_of(entry: Entry, generator: torch.Generator) -> bytes:
    """Random bytes that a quantizer could have written."""
    name, dtype, shape = entry
    if name.endswith("qzeros"):
        return struct.pack("<I", 0x77777777) * prod(shape)
    if dtype == "I32":
        return torch.randint(-(2**31), 2**31 - 1, (prod(shape),), generator=generator, dtype=torch.int32).numpy().tobytes()
    if dtype == "F16":
        return (torch.rand(prod(shape), generator=generator) * 0.004 + 0.001).half().numpy().tobytes()
    values = torch.ones(prod(shape)) if "norm" in name else torch.randn(prod(shape), generator=generator) * 0.02
    return values.bfloat16().view(torch.int16).numpy().tobytes()


def write_shard(path: Path, part: list[Entry], generator: torch.Generator | None, hollow: bool = False) -> None:
    """Write one safetensors file; without a generator its data are holes of a sparse file; hollow: those of codes are."""
    header, at = {}, 0
    for name, dtype, shape in part:
        size = prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if generator is None:
            file.truncate(8 + len(text) + at)
        else:
            for entry in part:
                if hollow and entry[0].endswith("qweight"):
                    file.seek(prod(entry[2]) * BYTES[entry[1]], os.SEEK_CUR)
                else:
                    file.write(data_of(entry, generator))
            file.truncate(8 + len(text) + at)


def write_checkpoint(out: Path, shape: Shape, sparse: bool, shard_bytes: int = 5_000_000_000, seed: int = 0, hollow: bool = False) -> int:
    """Write config.json, shards and index; returns the bytes of all tensors."""
    out.mkdir(parents=True, exist_ok=True)
    parts: list[list[Entry]] = [[]]
    size = total = 0
    for entry in entries(shape):
        nbytes = prod(entry[2]) * BYTES[entry[1]]
        if size and size + nbytes > shard_bytes:
            parts.append([])
            size = 0
        parts[-1].append(entry)
        size, total = size + nbytes, total + nbytes
    generator = None if sparse else torch.Generator().manual_seed(seed)
    weight_map = {}
    for i, part in enumerate(parts, 1):
        name = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        write_shard(out / name, part, generator, hollow)
        weight_map.update({entry[0]: name for entry in part})
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (out / "config.json").write_text(json.dumps(config(shape), indent=1))
    return total


def config(shape: Shape) -> dict[str, object]:
    """config.json of the checkpoint."""
    found: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.hidden, "num_hidden_layers": shape.layers,
        "intermediate_size": shape.intermediate, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocab,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": shape.tied, "hidden_act": "silu",
        "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if shape.experts:
        found |= {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": shape.experts, "num_experts_per_tok": shape.per_token,
            "moe_intermediate_size": shape.intermediate, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "head_dim": shape.head_dim,
        }  # fmt: skip
    if shape.quantized:
        found["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False, "checkpoint_format": "gptq"}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--dense", action="store_true", help="bfloat16 weights instead of quantized ones")
    parser.add_argument("--sparse", action="store_true", help="holes instead of data")
    parser.add_argument("--hollow", action="store_true", help="holes instead of codes")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--vocab", type=int, help="fewer tokens than the shape has, so that other modules are the largest")
    parser.add_argument("--shard-bytes", type=int, default=5_000_000_000)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    shape = replace(shape, quantized=shape.quantized and not args.dense, layers=args.layers or shape.layers, vocab=args.vocab or shape.vocab)
    total = write_checkpoint(args.out, shape, args.sparse, args.shard_bytes, hollow=args.hollow)
    print(f"{args.out}: {total / 1e9:.2f} GB in {len(list(args.out.glob('*.safetensors')))} files")


if __name__ == "__main__":
    main()
