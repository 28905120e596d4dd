"""Builds a model's modules from a planned checkpoint, one at a time: read, decode, choose a kernel, prepare, free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bitgrain.errors import ConflictingConfigError, RequestError, ShapeMismatchError
from bitgrain.kernels.base import EmbeddingProblem, LinearProblem
from bitgrain.kernels.selection import Policy, Selection, select
from bitgrain.kvcache.spec import KVCacheSpec
from bitgrain.layers.cache_choice import choose_cache
from bitgrain.layers.decoding import ModuleReader
from bitgrain.layers.embedding import Embedding
from bitgrain.layers.linear import FusedLinear, Linear, ParallelLinear
from bitgrain.platforms.host_memory import return_free_memory
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, DenseWeight, Transform, Transformed, Weight

# Stored bytes that are decoded between two calls that return free memory: a call costs about a millisecond.
FREE_AFTER_BYTES = 8_000_000

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How modules are built.

    Args:
        dtype:       of activations.
        device:      torch device.
        platform:    platform key that kernels are chosen for.
        activations: "scheme" (the checkpoint's meaning) or "none" (input quantization left out, to study weights).
        kv_cache:    "auto" or the name of a cache type.
        dequantize:  quantized weights become dense ones of `dtype`.
    """

    dtype: torch.dtype
    device: torch.device
    platform: str
    activations: str = "scheme"
    kv_cache: str = "auto"
    policy: Policy = field(default_factory=Policy)
    progress: Callable[[int, int], None] | None = None
    dequantize: bool = False


class ModelBuilder:
    """Serves model constructors; every call reads, prepares and frees one module or one fused group.

    Peak memory is what was prepared so far plus one module's stored tensors and decoding.
    """

    def __init__(self, reader: ModuleReader, config: Any, options: BuildOptions) -> None:
        self.reader, self.config, self.options = reader, config, options
        self.dtype = options.dtype
        self.selections: dict[str, Selection] = {}
        self.cache_specs: dict[str, KVCacheSpec] = {}
        self._fused = {fusion.modules: fusion for fusion in reader.plan.fusions}
        self._embeddings: dict[str, Weight] = {}
        self._dtype_name = str(options.dtype).removeprefix("torch.")
        self._done = self._decoded = 0

    def linear(self, name: str) -> Linear:
        """One linear module with its bias, if one is stored."""
        weight, activation, bias = self._read(name)
        return self._prepare(name, weight, activation, bias)

    def linears(self, names: Sequence[str]) -> nn.Module:
        """Several linear modules on one input: `layer(x)` gives one output per name, fused inside if the plan says so."""
        fusion = self._fused.get(tuple(names))
        if fusion is None or not fusion.fused:
            return ParallelLinear([self.linear(name) for name in names])
        if fusion.joint:
            return FusedLinear(self.linear(fusion.joint), fusion.heights, fusion.places)
        parts = [self._read(name) for name in names]
        weights = [part[0] for part in parts]
        biases = [part[2] for part in parts if part[2] is not None]
        stacked = type(weights[0]).concat(weights)
        label = f"{names[0].rpartition('.')[0]}.{{{','.join(n.rpartition('.')[2] for n in names)}}}"
        linear = self._prepare(label, stacked, parts[0][1], torch.cat(biases) if biases else None)
        return FusedLinear(linear, [w.shape[0] for w in weights])

    def embedding(self, name: str) -> Embedding:
        """A token embedding."""
        weight, _, _ = self._read(name)
        problem = EmbeddingProblem(weight.spec, *weight.shape, self._dtype_name)
        selection = self._select(name, problem)
        self._embeddings[name] = weight  # for a head that shares it: the same tensors, not copies
        return Embedding(name, selection.kernel, selection.kernel.prepare(weight, NO_ACTIVATION), self.dtype)

    def lm_head(self, name: str, tied_to: str | None) -> Linear:
        """The output head; with `tied_to` it shares that embedding's weight, unless the checkpoint stores a quantized one."""
        row = self.reader.row(name)
        if tied_to is None or row.tied_to is None:
            return self.linear(name)
        shared = self._embeddings[tied_to]
        if row.tensors:
            own, _, _ = self._read(name)
            if own.spec != shared.spec or not all(torch.equal(a, b) for a, b in zip(own.data_tensors().values(), shared.data_tensors().values(), strict=True)):
                raise ConflictingConfigError(
                    f"{name}.weight", f"stored, and different from {tied_to}.weight, though config.json says tie_word_embeddings",
                    "equal tensors, or tie_word_embeddings false", "correct config.json, or fetch the right checkpoint",
                )  # fmt: skip
        return self._prepare(name, shared, NO_ACTIVATION, None)

    def vector(self, name: str, size: int) -> Tensor:
        """A one-dimensional parameter [size] in the dtype of activations."""
        stored = self.reader.vector(name)
        if tuple(stored.shape) != (size,):
            raise ShapeMismatchError(name, f"shape {list(stored.shape)}", f"[{size}]", "correct config.json, or fetch the right checkpoint")
        self._advance(name)
        return stored.to(self.options.device, self.dtype, copy=True)

    def optional_vector(self, name: str, size: int) -> Tensor | None:
        """As vector(), or None where the plan has no such tensor."""
        return self.vector(name, size) if self.reader.has_tensor(name) else None

    def kv_cache_spec(self, attention: str) -> KVCacheSpec:
        """The cache of one attention module, by the checkpoint and the run's choice."""
        row = self.reader.plan.modules.get(attention)
        scales: Mapping[str, tuple[float, ...]] = self.reader.cache_scales(row) if row else {}
        spec = choose_cache(attention, row.kv_cache if row else None, scales, self.options.kv_cache)
        self.cache_specs[attention] = spec
        if row:
            self._advance(attention)
        return spec

    def head_transforms(self, attention: str, head_dim: int) -> tuple[tuple[Transform, ...], tuple[Transform, ...]]:
        """(maps of queries, maps of keys) of one attention module, each in the order in which they run.

        Raises:
            ShapeMismatchError: a map of another number of entries than a head has.
        """
        row = self.reader.plan.modules.get(attention)
        queries, keys = self.reader.head_transforms(row, head_dim) if row else ((), ())
        for transform in (*queries, *keys):
            if not transform.fits(head_dim):
                raise ShapeMismatchError(attention, f"{transform.describe()} of queries or keys", f"a divisor of {head_dim}, the size of a head", "correct the configuration")
        return self._moved(queries), self._moved(keys)

    def _moved(self, transforms: tuple[Transform, ...]) -> tuple[Transform, ...]:
        return tuple(t.map_tensors(lambda tensor: tensor.to(self.options.device)) for t in transforms)

    def finish(self) -> None:
        """Close the ledger."""
        self._embeddings.clear()
        self.reader.close()

    def _read(self, name: str) -> tuple[Weight, ActivationSpec, Tensor | None]:
        row = self.reader.row(name)
        weight, activation, bias = self.reader.weight(row)
        self._advance(name)
        self._count_memory(row.nbytes)
        if self.options.activations == "none":
            activation = NO_ACTIVATION
        return self._dense(weight) if self.options.dequantize else weight, activation, bias

    def _dense(self, weight: Weight) -> Weight:
        """The weight in the dtype of activations; transforms of the input stay what they are."""
        if isinstance(weight, Transformed):
            return replace(weight, inner=self._dense(weight.inner))
        return weight if isinstance(weight, DenseWeight) else DenseWeight(weight.dequantize().to(self.dtype))

    def _prepare(self, label: str, weight: Weight, activation: ActivationSpec, bias: Tensor | None) -> Linear:
        transforms: tuple[Transform, ...] = ()
        outputs: tuple[Transform, ...] = ()
        low_rank = None
        if isinstance(weight, Transformed):
            transforms, low_rank, outputs, weight = self._moved(weight.inputs), weight.low_rank, self._moved(weight.outputs), weight.inner
            low_rank = None if low_rank is None else low_rank.map_tensors(lambda tensor: tensor.to(self.options.device))
        problem = LinearProblem(weight.spec, activation.without_values(), *weight.shape, self._dtype_name)
        selection = self._select(label, problem)
        prepared = selection.kernel.prepare(weight, activation)
        moved = None if bias is None else bias.to(self.options.device, self.dtype, copy=True)
        return Linear(label, selection.kernel, prepared, moved, transforms, low_rank, outputs, activation.of_output())

    def _count_memory(self, nbytes: int) -> None:
        """Note what was decoded, and return free memory before the gaps grow larger than a module."""
        self._decoded += nbytes
        if self._decoded > FREE_AFTER_BYTES:
            self._decoded = 0
            return_free_memory()

    def _select(self, label: str, problem: LinearProblem | EmbeddingProblem) -> Selection:
        selection = select(problem, self.options.platform, self.options.policy)
        self.selections[label] = selection
        return selection

    def _advance(self, name: str) -> None:
        self._done += 1
        if self.options.progress is not None:
            self.options.progress(self._done, len(self.reader.plan.modules))


def parse_dtype(asked: str | torch.dtype, stored: str | None) -> torch.dtype:
    """The dtype of activations: the asked one, or for "auto" the one that config.json names (bfloat16 if none).

    Raises:
        RequestError: not one of the three floating-point types.
    """
    if isinstance(asked, torch.dtype):
        asked = str(asked).removeprefix("torch.")
    name = (stored or "bfloat16") if asked == "auto" else {"half": "float16", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(asked, asked)
    if name not in DTYPES:
        raise RequestError(f"dtype = {asked!r}", name, f"auto or one of {', '.join(DTYPES)}", "choose one of them")
    return DTYPES[name]
