"""Writes the W4A16 and W8A8 versions of the demo checkpoint in the compressed-tensors layouts.

W4A16 (`pack-quantized`): symmetric int4 in groups along the input dimension, rounded with GPTQ: the error of each
column is pushed into the columns not yet rounded, weighted by what the calibration problems show of the inputs.
W8A8 (`int-quantized`): symmetric int8 per output channel; activations are quantized per token when the model runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from packing import batches
from problems import training_documents

CALIBRATION_SEED = 77
CALIBRATION_BATCHES = 8
CALIBRATION_TOKENS = 4_096
DAMPING = 0.01
SHRINKS = [1.0 - 0.02 * step for step in range(26)]
COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def _arguments(bits: int, strategy: str, group: int | None, dynamic: bool) -> dict[str, Any]:
    """One QuantizationArgs object of compressed-tensors."""
    observer = None if dynamic else "memoryless_mse" if bits == 4 else "memoryless_minmax"
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": dynamic,
        "group_size": group,
        "num_bits": bits,
        "observer": observer,
        "observer_kwargs": {},
        "strategy": strategy,
        "symmetric": True,
        "type": "int",
    }


def quantization_config(layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    group = {
        "format": layout,
        "input_activations": inputs,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
    }
    return {
        "config_groups": {"group_0": group},
        "format": layout,
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "version": "0.17.0",
    }


def pack_int4(codes: Tensor) -> Tensor:
    """Eight codes (-8..7, stored as 0..15) per int32 along the last dimension, lowest bits first."""
    unsigned = (codes.to(torch.int64) + 8).unflatten(-1, (-1, 8))
    words = (unsigned << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of `pack_int4`."""
    return ((packed.to(torch.int64)[..., None] >> (4 * torch.arange(8))) & 15).flatten(-2) - 8


def group_scale(block: Tensor, importance: Tensor) -> Tensor:
    """Per row, the bfloat16 scale with the least weighted squared error; `block` is [rows, group]."""
    widest = (block.abs().amax(1, keepdim=True) / 7.5).clamp_min(1e-8)
    best, best_error = widest, torch.full_like(widest, float("inf"))
    for shrink in SHRINKS:
        scale = (widest * shrink * 1.07).to(torch.bfloat16).float()
        rounded = (block / scale).round().clamp(-8, 7) * scale
        error = ((rounded - block).square() * importance).sum(1, keepdim=True)
        best = torch.where(error < best_error, scale, best)
        best_error = torch.minimum(error, best_error)
    return best


def gptq(weight: Tensor, hessian: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes [N, K] and scales [N, G] of a weight matrix."""
    weight, columns = weight.clone(), weight.shape[1]
    importance = hessian.diagonal().clone().clamp_min(1e-8)
    damped = hessian + DAMPING * importance.mean() * torch.eye(columns)
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    codes, scales = torch.empty_like(weight), []
    for column in range(columns):
        if column % group == 0:
            span = slice(column, column + group)
            scales.append(group_scale(weight[:, span], importance[span]))
        scale = scales[-1][:, 0]
        code = (weight[:, column] / scale).round().clamp(-8, 7)
        codes[:, column] = code
        error = (weight[:, column] - code * scale) / inverse[column, column]
        weight[:, column + 1 :] -= error[:, None] * inverse[column, column + 1 :]
    return codes.to(torch.int8), torch.cat(scales, 1)


def calibration(tokenizer: Tokenizer) -> list[Tensor]:
    """Rows of training problems (a seed of their own; never held-out ones)."""
    stream = batches(training_documents(CALIBRATION_SEED), tokenizer, CALIBRATION_TOKENS, (256,))
    return [ids for ids, _ in itertools.islice(stream, CALIBRATION_BATCHES)]


def hessians(model: LlamaForCausalLM, layers: dict[str, nn.Linear], data: list[Tensor]) -> dict[str, Tensor]:
    """For each layer the mean of x xᵀ over its inputs x."""
    sums = {name: torch.zeros(layer.in_features, layer.in_features) for name, layer in layers.items()}

    def watch(name: str, inputs: Tensor) -> None:
        rows = inputs.flatten(0, -2)
        sums[name] += rows.T @ rows / len(rows)

    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: watch(name, args[0]))
        for name, layer in layers.items()
    ]
    for ids in data:
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return sums


def block_linears(model: LlamaForCausalLM, index: int) -> dict[str, nn.Linear]:
    """The Linear layers of one decoder block by their full names."""
    prefix = f"model.layers.{index}."
    return {name: m for name, m in model.named_modules() if name.startswith(prefix) and isinstance(m, nn.Linear)}


@torch.no_grad()
def four_bit(source: Path, group: int) -> dict[str, Tensor]:
    """Tensors of the W4A16 checkpoint; each block is calibrated behind the blocks already rounded."""
    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    data = calibration(Tokenizer.from_file(str(source / "tokenizer.json")))
    tensors = load_file(source / "model.safetensors")
    for index in range(model.config.num_hidden_layers):
        layers = block_linears(model, index)
        measured = hessians(model, layers, data)
        for name, layer in layers.items():
            codes, scales = gptq(layer.weight, measured[name], group)
            layer.weight.copy_(codes * scales.repeat_interleave(group, 1))
            del tensors[f"{name}.weight"]
            tensors[f"{name}.weight_packed"] = pack_int4(codes)
            tensors[f"{name}.weight_scale"] = scales.to(torch.bfloat16)
            tensors[f"{name}.weight_shape"] = torch.tensor(codes.shape, dtype=torch.int64)
    return tensors


def eight_bit(source: Path) -> dict[str, Tensor]:
    """Tensors of the W8A8 checkpoint."""
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name].float()
        scale = (weight.abs().amax(1, keepdim=True) / 127.5).clamp_min(1e-8).to(torch.bfloat16)
        tensors[name] = (weight / scale.float()).round().clamp(-128, 127).to(torch.int8)
        tensors[f"{name}_scale"] = scale
    return tensors


def write(source: Path, folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Saves a complete checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text(encoding="utf-8")) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    for name in COPIED:
        shutil.copyfile(source / name, folder / name)


def main() -> None:
    """Quantizes the bfloat16 folder into its two neighbours."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundled", type=Path, default=Path("src/bitgrain/bundled"))
    parser.add_argument("--group", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    source = arguments.bundled / "arithmetic-bf16"
    w4 = quantization_config("pack-quantized", _arguments(4, "group", arguments.group, False), None)
    write(source, arguments.bundled / "arithmetic-w4a16", four_bit(source, arguments.group), w4)
    w8 = quantization_config("int-quantized", _arguments(8, "channel", None, False), _arguments(8, "token", None, True))
    write(source, arguments.bundled / "arithmetic-w8a8", eight_bit(source), w8)


if __name__ == "__main__":
    main()
