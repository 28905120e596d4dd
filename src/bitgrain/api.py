"""What users call: open a checkpoint, load a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitgrain.checkpoint.files import CheckpointFiles, open_files
from bitgrain.errors import RequestError
from bitgrain.layers.builder import parse_dtype
from bitgrain.layers.decoding import ModuleReader, matrix_of
from bitgrain.plan import Plan
from bitgrain.resolve import ResolveOptions, resolve

if TYPE_CHECKING:
    from bitgrain.models.causal_lm import CausalLM


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint: its headers were read and every module was resolved; no data was.

    Args:
        plan:         what every module means.
        architecture: the first entry of `architectures` in config.json, else what its `model_type` stands for, or "".
    """

    files: CheckpointFiles
    plan: Plan
    architecture: str

    def dequantize(self, name: str) -> Tensor:
        """float32 [N, K] of the weight `name` ("model.layers.0.mlp.down_proj.weight"): the stored value."""
        return matrix_of(ModuleReader(self.files, self.plan), name)

    def effective_weight(self, name: str) -> Tensor:
        """float32 [N, K]: W in y = x W^T, with the module's transforms and pre-scales included."""
        return matrix_of(ModuleReader(self.files, self.plan), name, effective=True)

    def dtype(self, asked: str = "auto") -> str:
        """Name of the dtype of activations: the asked one, or for "auto" the one that config.json names."""
        stored = self.files.config.get("dtype") or self.files.config.get("torch_dtype")
        return str(parse_dtype(asked, stored)).removeprefix("torch.")


def open_checkpoint(
    path: str | Path,
    *,
    quantization: str | None = None,
    trust_tensors: bool = False,
    ignore: Sequence[str] = (),
    rules: Mapping[str, str] | None = None,
) -> Checkpoint:
    """Read headers and resolve the plan; takes seconds for a checkpoint of any size.

    Args:
        path:          a folder, a .safetensors file, or a hub id.
        quantization:  a format's name or alias, which must agree with what the files show; or, for an unquantized
                       checkpoint, what its modules become while they are loaded: "int8", "fp8", "mxfp4", ...
        ignore:        with such a quantization: modules that stay as they are, by whole dotted segments or with * wildcards.
        rules:         module pattern to what those become; wins over `quantization` and `ignore`.
        trust_tensors: where a rule of the configuration excludes a module that has quantized tensors, believe the tensors.
    Raises:
        BitgrainError: everything that is wrong, together.
    """
    files = open_files(path)
    architecture = _architecture(files.config)
    slots = _slots(files, architecture)
    options = ResolveOptions(quantization, trust_tensors, tuple(ignore), dict(rules or {}))
    return Checkpoint(files, resolve(files, slots, options), architecture)


def _architecture(config: Mapping[str, Any]) -> str:
    from bitgrain.models.registry import architecture_of

    return architecture_of(config)


def _slots(files: CheckpointFiles, architecture: str) -> Any:
    from bitgrain.models.config import ModelConfig
    from bitgrain.models.registry import find_model

    model = find_model(architecture)
    return model.slots(ModelConfig.from_dict(files.config, "config.json")) if model else None


def load_model(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    activations: str = "scheme",
    fidelity: str = "exact",
    kernels: Mapping[str, str] | None = None,
    kv_cache: str = "auto",
    tensor_parallel: int = 1,
    *,
    quantization: str | None = None,
    trust_tensors: bool = False,
    forbid: Sequence[str] = (),
    require: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    context_length: int | None = None,
    ignore: Sequence[str] = (),
    rules: Mapping[str, str] | None = None,
    dequantize: bool = False,
) -> CausalLM:
    """Load a checkpoint as a model that computes logits.

    Args:
        device:      torch device; None is the default platform's.
        dtype:       of activations: "auto" (config.json's), "bfloat16", "float16" or "float32".
        activations: "scheme": quantize inputs as the checkpoint specifies; "none": leave that out.
        fidelity:    "exact": kernels keep the checkpoint's numerics; "fast" admits those that change them.
        kernels:     operation to kernel name, to force.
        kv_cache:    "auto" or a cache type.
        forbid, require: kernels or backends not to use; "native" to refuse the reference floor.
        progress:    called with (modules done, all modules).
        context_length: tokens per sequence, at most what the model was made for.
        quantization, ignore, rules: see open_checkpoint().
        dequantize:  keep every quantized weight in memory as a dense one in `dtype`, rounded once.
    Raises:
        BitgrainError: what is wrong with the files, the request or this machine.
    """
    from bitgrain.models.loading import LoadOptions, build_model

    checkpoint = open_checkpoint(path, quantization=quantization, trust_tensors=trust_tensors, ignore=ignore, rules=rules)
    if tensor_parallel != 1:
        raise RequestError(f"tensor_parallel = {tensor_parallel}", "more than one process was asked for", "1", "this version runs one process; split the model with a host engine")
    options = LoadOptions(
        device=device, dtype=dtype, activations=activations, fidelity=fidelity, kernels=dict(kernels or {}), kv_cache=kv_cache, forbid=tuple(forbid),
        require=require, progress=progress, context_length=context_length, dequantize=dequantize,
    )  # fmt: skip
    return build_model(checkpoint.files, checkpoint.plan, checkpoint.architecture, options)
