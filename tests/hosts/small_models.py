"""Small models of the transformers library with random weights, saved as it saves them, and quantized by hand."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

import bitgrain
from bitgrain.formats.base import ModuleKind
from bitgrain.numerics.bitpack import pack_padded

VOCAB = 96
IDS = torch.randint(3, VOCAB, (17,), generator=torch.Generator().manual_seed(1))
_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
_USUAL = {
    **_TOKENS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}  # fmt: skip
_OLDER = {**_TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 96}

# model_type to its configuration; none of these architectures has a file in bitgrain.models
CONFIGS = {
    "bloom": {**_TOKENS, "hidden_size": 64, "n_layer": 2, "n_head": 4},  # slopes instead of positions, a norm behind the embedding
    "cohere": _USUAL,  # tied, one norm for both branches, scaled logits
    "exaone4": _USUAL,
    "falcon": {**_USUAL, "ffn_hidden_size": 96, "bias": True},  # a linear class of its own, which multiplies with its weight itself
    "gpt2": _OLDER,  # weights are stored [K, N]
    "gpt_neox": _USUAL,
    "nemotron": _USUAL,
    "opt": {**_USUAL, "ffn_dim": 96, "word_embed_proj_dim": 64},  # an embedding class of its own, for positions
    "phi": _USUAL,  # a head with a bias
    "smollm3": _USUAL,
    "stablelm": _USUAL,
    "starcoder2": _USUAL,
}
# ... and with experts
SPARSE = {
    "ernie4_5_moe": {**_USUAL, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    "granitemoe": {**_USUAL, "num_local_experts": 4, "num_experts_per_tok": 2},  # stacked under names of its own
    "minimax_m2": {**_USUAL, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "phimoe": {**_USUAL, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def saved_model(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **changes):
    """A random model of a kind, and the folder in which the library has saved it."""
    config = AutoConfig.for_model(kind, **{**(CONFIGS | SPARSE).get(kind, _USUAL), **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases of zero and norms of one would hide where they go
                parameter.add_(0.1 * torch.randn_like(parameter))
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    return model, folder


def reference(model, ids: Tensor = IDS) -> Tensor:
    """float32 [T, V] by the library."""
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0].float()


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def edit(folder: Path, tensors=None, config=None) -> Path:
    """Change the tensors or the configuration of a saved model in place."""
    if tensors is not None:
        held = load_file(folder / "model.safetensors")
        tensors(held)
        save_file({name: t.contiguous() for name, t in held.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        values = json.loads((folder / "config.json").read_text())
        config(values)
        (folder / "config.json").write_text(json.dumps(values))
    return folder


def quantize(folder: Path, producer: str) -> list[str]:
    """Rewrite every linear layer and expert of a saved model as `producer` stores it; the names of those."""
    checkpoint = bitgrain.open_checkpoint(folder, model_impl="transformers")
    rows = [r for r in checkpoint.plan.modules.values() if r.kind in (ModuleKind.LINEAR, ModuleKind.EXPERT) and not r.name.endswith((".gate", ".router", "router.layer"))]
    pack, section = PRODUCERS[producer]
    packed = {row.name: pack(checkpoint.effective_weight(f"{row.name}.weight")) for row in rows}

    def replace(held: dict[str, Tensor]) -> None:
        for name, tensors in packed.items():
            del held[f"{name}.weight"]
            held.update({f"{name}.{local}": tensor for local, tensor in tensors.items()})

    edit(folder, replace, lambda values: values.update(quantization_config={**section, **({"ignore": ["lm_head"]} if "ignore" in section else {})}))
    return list(packed)


def fill(model, folder: Path, names: list[str], checkpoint: bitgrain.Checkpoint, stored: dict[str, str] | None = None) -> None:
    """Put what quantized layers mean into the library's model."""
    for name in names:
        module = model.get_submodule((stored or {}).get(name, name))
        weight = checkpoint.effective_weight(f"{name}.weight")
        module.weight.data = (weight.T if isinstance(module, Conv1D) else weight).contiguous()


def _grouped(weight: Tensor, size: int = 32) -> tuple[Tensor, Tensor]:
    """(unsigned 4-bit codes [N, K] around 8, scale [N, K / size])."""
    n, k = weight.shape
    groups = weight.view(n, k // size, size)
    scale = (groups.abs().amax(-1) / 7).clamp(min=1e-6).half().float()
    codes = torch.round(groups / scale[..., None]).clamp(-8, 7) + 8
    return codes.view(n, k).to(torch.uint8), scale


def _words(weight: Tensor) -> dict[str, Tensor]:
    codes, scale = _grouped(weight)
    return {"weight_packed": pack_padded(codes, 4), "weight_scale": scale.bfloat16(), "weight_shape": torch.tensor(weight.shape)}


def _float8(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 448
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def _transposed_words(weight: Tensor) -> dict[str, Tensor]:
    codes, scale = _grouped(weight)
    zeros = torch.full(tuple(scale.shape), 7, dtype=torch.uint8)  # one less than they are
    index = torch.arange(weight.shape[1], dtype=torch.int32) // 32
    return {"qweight": _words_along_rows(codes.T), "qzeros": _words_along_rows(zeros).T, "scales": scale.T.half(), "g_idx": index}


def _words_along_rows(codes: Tensor) -> Tensor:
    """int32 [M / 8, N]: eight rows of 4-bit codes in a word, the first lowest."""
    words = sum(codes[place::8].long() << (4 * place) for place in range(8))
    return words.to(torch.int32)


_NF4 = torch.tensor([-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0])


def _lookup(weight: Tensor) -> dict[str, Tensor]:
    blocks = weight.reshape(-1, 64)
    largest = blocks.abs().amax(1)
    codes = (blocks / largest[:, None]).flatten()[:, None].sub(_NF4).abs().argmin(1).to(torch.uint8).view(-1, 2)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {"weight": (codes[:, 0] << 4 | codes[:, 1])[:, None], "weight.absmax": largest, "weight.quant_map": _NF4.clone(), "weight.quant_state.bitsandbytes__nf4": text}


def _group(weights: dict, inputs: dict | None = None) -> dict:
    return {"g": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}


_CT = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": []}
PRODUCERS = {
    "w4a16": (_words, {**_CT, "format": "pack-quantized", "config_groups": _group({"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32})}),
    "fp8-dynamic": (_float8, {**_CT, "format": "float-quantized", "config_groups": _group(
        {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
        {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True},
    )}),
    "gptq": (_transposed_words, {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}),
    "nf4": (_lookup, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32", "bnb_4bit_use_double_quant": False}),
}  # fmt: skip


def emulate_input(model, names: list[str], checkpoint: bitgrain.Checkpoint) -> None:
    """Make the library's layers quantize their input as the plan says."""
    for name in names:
        scheme = checkpoint.plan.modules[name].scheme
        def quantize_input(module, args, spec=scheme.activation):
            x = args[0]
            return (spec.fake_quantize(x.flatten(0, -2)).view(x.shape).to(x.dtype), *args[1:])

        model.get_submodule(name).register_forward_pre_hook(quantize_input)
