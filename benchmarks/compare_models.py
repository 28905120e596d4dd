"""One random model in the forms that the systems of compare.py read, all rounded to nearest from the same float weights.

    python benchmarks/compare_models.py FOLDER --shape 1b [--llama-bin FOLDER] [--openvino PYTHON]

    FOLDER/bf16       safetensors, bfloat16
    FOLDER/w4         compressed-tensors, four bits, groups of 128, symmetric; the head stays in bfloat16
    FOLDER/w8a8       compressed-tensors, bytes per channel, activations quantized per token
    FOLDER/*.gguf     f16, and Q4_0 and Q8_0 by llama-quantize; needs the package gguf and --llama-bin
    FOLDER/ov-w4      and ov-w8a8, w4 and w8a8 as models of OpenVINO, the same weights, by compare_openvino.py; activations stay floats
    FOLDER/ov-w4-h8   and ov-w8a8-h8, the same with a head of bytes

Shapes are those of tools/make_checkpoint.py with a vocabulary of 32000, untied, and "small", which takes seconds.  What exists is
kept.  f16.gguf may be deleted once the others are there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import torch
from safetensors.torch import save_file
from torch import Tensor

# instead of this folder, whose gguf.py would hide the package
sys.path[0] = str(Path(__file__).resolve().parents[1] / "tools")
import make_checkpoint  # noqa: E402

GROUP, VOCAB = 128, 32000


def weight(name: str, *shape: int) -> Tensor:
    """bfloat16 [shape] that depends on nothing but its name."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=torch.Generator().manual_seed(crc32(name.encode()))) * 0.02).bfloat16()


def tensors(shape: make_checkpoint.Shape) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """(name, shape, whether it is quantized) of every tensor, a module at a time."""
    for name, dtype, size in make_checkpoint.entries(replace(shape, quantized=False)):
        assert dtype == "BF16"
        yield name, tuple(size), len(size) == 2 and "embed_tokens" not in name and "lm_head" not in name


def quantized(form: str, base: str, w: Tensor) -> dict[str, Tensor]:
    """A matrix as compressed-tensors stores it; w is bfloat16 [N, K]."""
    n, k = w.shape
    if form == "w4":
        grouped = w.float().view(n, k // GROUP, GROUP)
        scale = (grouped.abs().amax(-1, keepdim=True) / 7.5).clamp_min(1e-8).bfloat16()
        codes = (torch.round(grouped / scale.float()) + 8).clamp(0, 15).to(torch.int32).view(n, k // 8, 8)
        packed = (codes << (4 * torch.arange(8, dtype=torch.int32))).sum(-1, dtype=torch.int64)
        words = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
        return {f"{base}.weight_packed": words, f"{base}.weight_scale": scale.squeeze(-1), f"{base}.weight_shape": torch.tensor([n, k])}
    scale = (w.float().abs().amax(1, keepdim=True) / 127).clamp_min(1e-8).bfloat16()
    return {f"{base}.weight": torch.round(w.float() / scale.float()).clamp(-127, 127).to(torch.int8), f"{base}.weight_scale": scale}


def configuration(form: str, shape: make_checkpoint.Shape) -> dict[str, object]:
    found = make_checkpoint.config(replace(shape, quantized=False))
    if form != "bf16":
        four = form == "w4"
        weights = {"num_bits": 4 if four else 8, "type": "int", "symmetric": True, "dynamic": False, "strategy": "group" if four else "channel", "group_size": GROUP if four else None}
        inputs = None if four else {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
        found["quantization_config"] = {
            "quant_method": "compressed-tensors", "format": "pack-quantized" if four else "int-quantized", "quantization_status": "compressed", "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}},
        }  # fmt: skip
    return found


def write_safetensors(folder: Path, form: str, shape: make_checkpoint.Shape) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    held: dict[str, Tensor] = {}
    for name, size, linear in tensors(shape):
        w = weight(name, *size)
        held |= quantized(form, name.removesuffix(".weight"), w) if linear and form != "bf16" else {name: w}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    # last: a folder with it is whole
    (folder / "config.json").write_text(json.dumps(configuration(form, shape), indent=1))


def write_gguf(path: Path, shape: make_checkpoint.Shape) -> None:
    """float16; heads of q and k are in llama.cpp's order of rotated halves."""
    import gguf
    import make_gguf
    import numpy

    stems = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate"}
    stems |= {"mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}

    def renamed(name: str) -> str:
        if name in outer:
            return outer[name]
        _, _, layer, stem = name.removesuffix(".weight").split(".", 3)
        return f"blk.{layer}.{stems[stem]}.weight"

    def stored(name: str, size: tuple[int, ...]) -> numpy.ndarray:
        w = weight(name, *size)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = size[0] // shape.head_dim
            w = w.view(heads, 2, shape.head_dim // 2, size[1]).transpose(1, 2).reshape(size)
        return w.to(torch.float32 if len(size) == 1 else torch.float16).numpy()

    writer = gguf.GGUFWriter(str(path), "llama")
    make_gguf.metadata(writer, shape)
    for name, size, _ in tensors(shape):
        kind = numpy.dtype(numpy.float32 if len(size) == 1 else numpy.float16)
        writer.add_tensor_info(renamed(name), size, kind, int(numpy.prod(size)) * kind.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, size, _ in tensors(shape):
        writer.write_tensor_data(stored(name, size))
    writer.close()


def write_all(folder: Path, shape: make_checkpoint.Shape, llama: Path | None, openvino: Path | None) -> dict[str, str]:
    """Write what is missing; what could not be written, and why."""
    failed = {}
    for form in ("bf16", "w4", "w8a8"):
        if not (folder / form / "config.json").exists():
            write_safetensors(folder / form, form, shape)
    try:
        wanted = [kind for kind in ("Q4_0", "Q8_0") if llama and not (folder / f"{kind}.gguf").exists()]
        if wanted and not (folder / "f16.gguf").exists():
            write_gguf(folder / "part.gguf", shape)
            (folder / "part.gguf").rename(folder / "f16.gguf")
        for kind in wanted:
            subprocess.run([llama / "llama-quantize", folder / "f16.gguf", folder / f"{kind}.gguf", kind], check=True, capture_output=True)
    except (ImportError, OSError, subprocess.CalledProcessError) as error:
        failed["llama.cpp"] = f"its files could not be written: {error}"
    for form, bits in itertools.product(("w4", "w8a8"), (16, 8)) if openvino else ():
        out = folder / f"ov-{form}{'' if bits == 16 else '-h8'}"
        if not (out / "config.json").exists():
            # a process of its own: its environment differs, and its memory goes back
            command = [openvino, Path(__file__).with_name("compare_openvino.py"), folder / form, out, "--head-bits", str(bits)]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                last = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1:]
                failed[f"openvino {out.name}"] = f"its files could not be written: {' '.join(last)}"
    return failed


def shape_of(name: str) -> make_checkpoint.Shape:
    if name == "small":
        return make_checkpoint.Shape(hidden=1024, layers=2, intermediate=2048, heads=16, kv_heads=8, vocab=8000, tied=False)
    return replace(make_checkpoint.SHAPES[name], vocab=VOCAB, tied=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="1b", choices=("small", *make_checkpoint.SHAPES))
    parser.add_argument("--llama-bin", type=Path, help="folder of llama.cpp's programs")
    parser.add_argument("--openvino", type=Path, metavar="PYTHON", help="of an environment that has openvino")
    args = parser.parse_args()
    for system, why in write_all(args.folder, shape_of(args.shape), args.llama_bin, args.openvino).items():
        print(f"{system}: {why}")


if __name__ == "__main__":
    main()
