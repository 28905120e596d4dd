"""Dense state dicts rewritten as quantized checkpoints, by writers that share nothing with the package's decoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# (name of the module, dense weight) to (stored tensors by local name, the weight that they mean)
Writer = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]

GROUP = 32


def _codes(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unsigned 4-bit codes [N, K], float32 scales [N, K / GROUP], and the weight (code - 8) * scale."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    scale = (groups.abs().amax(-1) / 7).half().float()
    codes = (groups / scale[..., None]).round().clamp(-8, 7) + 8
    return codes.flatten(1).long(), scale, ((codes - 8) * scale[..., None]).flatten(1)


def _words(values: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """int32 [R, C / 8]: eight values a word, place i holds value order[i]."""
    words = sum(values.unflatten(1, (-1, 8))[..., taken] << (4 * place) for place, taken in enumerate(order))
    return torch.where(words > 2**31 - 1, words - 2**32, words).int()


def packed_int4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    codes, scale, meant = _codes(weight)
    return {"weight_packed": _words(codes), "weight_scale": scale.half(), "weight_shape": torch.tensor(weight.shape)}, meant


def gptq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    codes, scale, meant = _codes(weight)
    zeros = torch.full((scale.shape[1], scale.shape[0]), 7)  # one less than they are
    index = torch.arange(weight.shape[1], dtype=torch.int32) // GROUP
    return {"qweight": _words(codes).t().contiguous(), "qzeros": _words(zeros), "scales": scale.half().t().contiguous(), "g_idx": index}, meant


def awq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    codes, scale, meant = _codes(weight)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    zeros = torch.full((scale.shape[1], scale.shape[0]), 8)
    return {"qweight": _words(codes.t(), order), "qzeros": _words(zeros, order), "scales": scale.half().t().contiguous()}, meant


def fp8_blocks(weight: Tensor, size: int = 32) -> tuple[dict[str, Tensor], Tensor]:
    n, k = weight.shape
    blocks = weight.float().unflatten(1, (k // size, size)).unflatten(0, (n // size, size))
    scale = blocks.abs().amax((1, 3)) / 448
    stored = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    meant = (stored.float() * scale[:, None, :, None]).flatten(2).flatten(0, 1)
    return {"weight": stored.flatten(2).flatten(0, 1), "weight_scale_inv": scale}, meant


def fp8_channel(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    stored = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale": scale}, stored.float() * scale


def _compressed(storage: str, weights: Mapping[str, object], inputs: Mapping[str, object] | None) -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": dict(weights), "input_activations": inputs, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": storage, "quantization_status": "compressed", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


DYNAMIC = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
# name to (writer, section of config.json)
PRODUCERS: Mapping[str, tuple[Writer, dict[str, object]]] = {
    "packed-int4": (packed_int4, _compressed("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": True}, None)),
    "float8-channel": (fp8_channel, _compressed("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}, DYNAMIC)),
    "float8-blocks": (fp8_blocks, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32], "fmt": "e4m3"}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
}  # fmt: skip


def quantize(tensors: Mapping[str, Tensor], writer: Writer, dense: Callable[[str], bool] = lambda module: False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the checkpoint with its linear modules quantized, the same with the weights that those mean).

    Args:
        dense: whether a module stays as it is, by name; embeddings, heads and vectors always do.
    """
    stored, meant = {}, {}
    for name, value in tensors.items():
        module, _, local = name.rpartition(".")
        if local != "weight" or value.dim() != 2 or not module.endswith("_proj") or dense(module):
            stored[name] = meant[name] = value
            continue
        parts, meant[name] = writer(value)
        stored |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    return stored, meant
