"""From a planned checkpoint to a running model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from bitgrain.checkpoint.files import CheckpointFiles
from bitgrain.errors import RequestError
from bitgrain.kernels.selection import Policy
from bitgrain.layers.builder import BuildOptions, ModelBuilder, parse_dtype
from bitgrain.layers.decoding import ModuleReader
from bitgrain.layers.prepared_file import PreparedFile
from bitgrain.models.causal_lm import CausalLM
from bitgrain.models.config import ModelConfig
from bitgrain.models.registry import model_class
from bitgrain.plan import Plan
from bitgrain.platforms.probe import default_device, platform_of
from bitgrain.platforms.processors import limit_threads

ACTIVATIONS = ("scheme", "none")


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """The options of bitgrain.load_model; see there."""

    device: str | torch.device | None = None
    dtype: str | torch.dtype = "auto"
    activations: str = "scheme"
    fidelity: str = "exact"
    kernels: Mapping[str, str] = field(default_factory=dict)
    kv_cache: str = "auto"
    forbid: tuple[str, ...] = ()
    require: str | None = None
    progress: Callable[[int, int], None] | None = None
    context_length: int | None = None
    dequantize: bool = False
    prepared_folder: str | Path | None = None


def build_options(options: LoadOptions, stored_dtype: str | None) -> BuildOptions:
    """How modules are built, from what was asked; checked.

    Args:
        stored_dtype: of activations as config.json names it.
    """
    if options.activations not in ACTIVATIONS:
        raise RequestError(f"activations = {options.activations!r}", "no such mode", f"one of {', '.join(ACTIVATIONS)}", "choose one of them")
    device = str(options.device or default_device())
    policy = Policy(options.fidelity, options.kernels, frozenset(options.forbid), options.require)
    platform, dtype = platform_of(device), parse_dtype(options.dtype, stored_dtype)
    policy.check(platform.key)
    limit_threads()
    return BuildOptions(dtype, torch.device(device), platform.key, options.activations, options.kv_cache, policy, options.progress, options.dequantize)


def with_prepared(options: BuildOptions, files: CheckpointFiles, plan: Plan, folder: str | Path | None) -> BuildOptions:
    """The options with what an earlier start with the same plan and options has prepared, in `folder`; None: nothing is kept.

    Raises:
        RequestError: a device with memory of its own, whose weights are not read from files.
    """
    if folder is None:
        return options
    if options.device != torch.empty(0).device:
        raise RequestError("prepared weights", f"device {options.device}", "the host, whose memory files are read into", "leave the folder of prepared weights out")
    policy = (options.policy.fidelity, sorted(options.policy.force.items()), sorted(options.policy.forbid))
    key = hashlib.sha256(repr((plan.hash, options.platform, options.dtype, options.activations, options.dequantize, policy)).encode()).hexdigest()[:32]
    sources = {header.file: files.root / header.file for header in files.tensors.values()}
    return replace(options, ready=PreparedFile(Path(folder) / f"{key}.prepared", sources))


def build_model(files: CheckpointFiles, plan: Plan, architecture: str, options: LoadOptions) -> CausalLM:
    """Build the architecture's modules one by one and close the ledger.

    Memory: what was prepared so far, one module's stored tensors and its decoding.
    """
    model_type = model_class(architecture)
    config = ModelConfig.from_dict(files.config, files.config_name, files.tensors)
    builder = ModelBuilder(ModuleReader(files, plan), config, with_prepared(build_options(options, config.dtype), files, plan, options.prepared_folder))
    with torch.inference_mode():
        model: CausalLM = model_type(builder)
    builder.finish()
    model.attach(plan, builder.selections, builder.cache_specs, builder.step_selections)
    if options.context_length is not None:
        model.limit_context(options.context_length)
    return model.eval()
