"""Make a GGUF file of a real shape with random float16 weights, for llama-quantize to work on and for tests of speed.

    python tools/make_gguf.py OUT.gguf --shape 1b [--vocab 32000]     about 2.2 GB
    llama-quantize OUT.gguf OUT-Q4_K_M.gguf Q4_K_M

needs the package gguf.  The file has no tokenizer: programs that read it take token ids.  Shapes are those of make_checkpoint.py,
untied.  Weights are written one tensor at a time.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
from make_checkpoint import SHAPES, Shape, modules

STEMS = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor."""
    yield "token_embd.weight", (shape.vocab, shape.hidden)
    for i in range(shape.layers):
        yield f"blk.{i}.attn_norm.weight", (shape.hidden,)
        yield f"blk.{i}.ffn_norm.weight", (shape.hidden,)
    for name, n, k in modules(shape):
        layer, stem = name.split(".")[2], STEMS[name.rpartition(".")[2]]
        yield f"blk.{layer}.{stem}.weight", (n, k)
    yield "output_norm.weight", (shape.hidden,)
    yield "output.weight", (shape.vocab, shape.hidden)


def metadata(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_context_length(8192)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("none")


def write(path: Path, shape: Shape) -> None:
    writer = gguf.GGUFWriter(str(path), "llama")
    metadata(writer, shape)
    for name, size in tensors(shape):
        dtype = np.dtype(np.float32 if len(size) == 1 else np.float16)
        writer.add_tensor_info(name, size, dtype, int(np.prod(size)) * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    generator = np.random.default_rng(0)
    for _, size in tensors(shape):
        data = np.ones(size, np.float32) if len(size) == 1 else (generator.standard_normal(size, np.float32) * 0.02).astype(np.float16)
        writer.write_tensor_data(data)
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--vocab", type=int, help="instead of the shape's")
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    write(args.out, replace(shape, vocab=args.vocab or shape.vocab, tied=False))
    print(f"{args.out}: {args.out.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
