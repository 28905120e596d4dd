"""Small checkpoints made in memory: headers and evidence of given tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.checkpoint.headers import TORCH_DTYPES, TensorHeader
from bitgrain.formats.base import ModuleKind, ModuleView
from bitgrain.formats.evidence import Evidence

CODES = {dtype: code for code, dtype in TORCH_DTYPES.items()}
NAME = "model.layers.0.mlp.down_proj"


def header(name: str, tensor: Tensor) -> TensorHeader:
    return TensorHeader(name, CODES[tensor.dtype], tuple(tensor.shape), "model.safetensors", 0, tensor.nbytes)


def view(tensors: dict[str, Tensor], name: str = NAME, kind: ModuleKind = ModuleKind.LINEAR, shape=None) -> ModuleView:
    """A module whose local tensors are given."""
    return ModuleView(name, kind, {local: header(f"{name}.{local}", t) for local, t in tensors.items()}, shape)


def evidence(section: dict | None, tensors: dict[str, Tensor] | None = None, sidecars=None) -> Evidence:
    """Evidence of a configuration section and of tensors by full name."""
    headers = {name: header(name, t) for name, t in (tensors or {}).items()}
    suffixes: dict[str, str] = {}
    for name in headers:
        suffixes.setdefault(name.rpartition(".")[2], name)
    return Evidence({"quantization_config": section}, section, sidecars or {}, headers, suffixes)


def ramp(*shape: int, dtype=torch.float32) -> Tensor:
    """Reproducible values around zero."""
    torch.manual_seed(sum(shape))
    return (torch.randn(*shape) * 0.1).to(dtype)
