"""What users call: open a checkpoint, load a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitgrain.checkpoint.described_tokenizer import TokenizerDescription
from bitgrain.checkpoint.files import CheckpointFiles, open_files
from bitgrain.errors import BitgrainError, ManyProblemsError, RequestError
from bitgrain.formats.detect import TEXT_SECTIONS, described, described_tokenizer
from bitgrain.layers.builder import parse_dtype
from bitgrain.layers.decoding import ModuleReader, matrix_of
from bitgrain.plan import Plan
from bitgrain.resolve import ResolveOptions, resolve

if TYPE_CHECKING:
    from bitgrain.models.implementation import Implementation
    from bitgrain.models.language_model import LanguageModel


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint: its headers were read and every module was resolved; no data was.

    Args:
        plan:         what every module means.
        modelling:    whose modelling code would run it.
        architecture: the first entry of `architectures` in config.json, else what its `model_type` stands for, or "".
    """

    files: CheckpointFiles
    plan: Plan
    architecture: str
    modelling: Implementation

    def dequantize(self, name: str) -> Tensor:
        """float32 [N, K] of the weight `name` ("model.layers.0.mlp.down_proj.weight"): the stored value."""
        return matrix_of(ModuleReader(self.files, self.plan), name)

    def effective_weight(self, name: str) -> Tensor:
        """float32 [N, K]: W in y = x W^T, with the module's transforms and pre-scales included."""
        return matrix_of(ModuleReader(self.files, self.plan), name, effective=True)

    def dtype(self, asked: str = "auto") -> str:
        """Name of the dtype of activations: the asked one, or for "auto" the one that config.json names."""
        config = self.files.config
        sections = (config, *(config[s] for s in TEXT_SECTIONS if isinstance(config.get(s), Mapping)))
        stored = next((found for section in sections if (found := section.get("dtype") or section.get("torch_dtype"))), None)
        return str(parse_dtype(asked, stored)).removeprefix("torch.")


def open_checkpoint(
    path: str | Path,
    *,
    quantization: str | None = None,
    trust_tensors: bool = False,
    ignore: Sequence[str] = (),
    rules: Mapping[str, str] | None = None,
    model_impl: str = "auto",
    trust_remote_code: bool = False,
) -> Checkpoint:
    """Read headers and resolve the plan; takes seconds for a checkpoint of any size.

    Args:
        path:          a folder, a .safetensors or .gguf file, or a hub id.
        quantization:  a format's name or alias, which must agree with what the files show; or, for an unquantized
                       checkpoint, what its modules become while they are loaded: "int8", "fp8", "mxfp4", ...
        ignore:        with such a quantization: modules that stay as they are, by whole dotted segments or with * wildcards.
        rules:         module pattern to what those become; wins over `quantization` and `ignore`.
        trust_tensors: where a rule of the configuration excludes a module that has quantized tensors, believe the tensors.
        model_impl:    whose modelling code: "bitgrain", "transformers", or "auto": bitgrain's where it has a file for the architecture.
        trust_remote_code: run modelling code that the checkpoint brings, where neither of them knows the architecture.
    Raises:
        BitgrainError: everything that is wrong, together.
    """
    files = described(open_files(path))
    architecture = _architecture(files.config)
    modelling = _modelling(files, architecture, model_impl, trust_remote_code)
    options = ResolveOptions(quantization, trust_tensors, tuple(ignore), dict(rules or {}))
    try:
        plan = replace(resolve(files, modelling.slots(), options), modelling=modelling.name)
    except BitgrainError as problem:
        reason = getattr(modelling, "problem", None) if architecture else None
        if reason is None:
            raise
        # where nobody knows the architecture, what is wrong with its modules may follow from that
        raise ManyProblemsError(files.label, [reason, *(problem.problems if isinstance(problem, ManyProblemsError) else [problem])]) from None
    return Checkpoint(files, plan, architecture, modelling)


def own_tokenizer(files: CheckpointFiles) -> TokenizerDescription | None:
    """The tokenizer that the checkpoint's container holds; None: it stands in the files beside it.

    Raises:
        BitgrainError: it cannot be used.
    """
    return described_tokenizer(files)


def _architecture(config: Mapping[str, Any]) -> str:
    from bitgrain.models.registry import architecture_of

    return architecture_of(config)


def _modelling(files: CheckpointFiles, architecture: str, asked: str, trust_remote_code: bool) -> Implementation:
    from bitgrain.models.implementation import choose_implementation

    return choose_implementation(files, architecture, asked, trust_remote_code)


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
    model_impl: str = "auto",
    trust_remote_code: bool = False,
    prepared_folder: str | Path | None = None,
) -> LanguageModel:
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
        quantization, ignore, rules, model_impl, trust_remote_code: see open_checkpoint().
        dequantize:  keep every quantized weight in memory as a dense one in `dtype`, rounded once.
        prepared_folder: where weights are kept in the layouts of their kernels, so that the next start with the same files and
                     options needs neither to decode nor to pack them; its files may be deleted at any time.
    Raises:
        BitgrainError: what is wrong with the files, the request or this machine.
    """
    from bitgrain.models.loading import LoadOptions

    checkpoint = open_checkpoint(
        path, quantization=quantization, trust_tensors=trust_tensors, ignore=ignore, rules=rules, model_impl=model_impl, trust_remote_code=trust_remote_code
    )
    if tensor_parallel != 1:
        raise RequestError(f"tensor_parallel = {tensor_parallel}", "more than one process was asked for", "1", "this version runs one process; split the model with a host engine")
    options = LoadOptions(
        device=device, dtype=dtype, activations=activations, fidelity=fidelity, kernels=dict(kernels or {}), kv_cache=kv_cache, forbid=tuple(forbid),
        require=require, progress=progress, context_length=context_length, dequantize=dequantize, prepared_folder=prepared_folder,
    )  # fmt: skip
    return checkpoint.modelling.build(checkpoint.plan, options)
