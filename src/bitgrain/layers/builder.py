"""Builds a model's modules from a planned checkpoint, one at a time: read, decode, choose a kernel, prepare, free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bitgrain.errors import ConflictingConfigError, RequestError, ShapeMismatchError
from bitgrain.kernels.base import (
    EmbeddingProblem,
    ExpertsKernel,
    ExpertsProblem,
    HadamardProblem,
    Kernel,
    LinearProblem,
    Prepared,
    StepProblem,
)
from bitgrain.kernels.decode_step import DecodeStepProblem, RunnableStep, StepDescription
from bitgrain.kernels.selection import Policy, Selection, refuse_linears, select, select_experts
from bitgrain.kvcache.spec import KVCacheSpec
from bitgrain.layers.cache_choice import choose_cache, of_latents
from bitgrain.layers.decoding import ModuleReader
from bitgrain.layers.embedding import Embedding
from bitgrain.layers.linear import FusedLinear, Linear, ParallelLinear
from bitgrain.layers.prepared_file import PreparedFile, ReadyLinear, build_of
from bitgrain.layers.transform import KernelTransform
from bitgrain.platforms.host_memory import return_free_memory
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, DenseWeight, Hadamard, Transform, Transformed, Weight, WeightSpec

# Stored bytes that are decoded between two calls that return free memory: a call costs about a millisecond.
FREE_AFTER_BYTES = 8_000_000

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# linear kernels that can use a prepared table of an embedding, and the table
Table = tuple[tuple[str, ...], Prepared | None]


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
        ready:       linear layers that an earlier start has prepared, and to which new ones are added.
    """

    dtype: torch.dtype
    device: torch.device
    platform: str
    activations: str = "scheme"
    kv_cache: str = "auto"
    policy: Policy = field(default_factory=Policy)
    progress: Callable[[int, int], None] | None = None
    dequantize: bool = False
    ready: PreparedFile | None = None


class ModelBuilder:
    """Serves model constructors; every call reads, prepares and frees one module or one fused group.

    Peak memory is what was prepared so far plus one module's stored tensors and decoding.
    """

    def __init__(self, reader: ModuleReader, config: Any, options: BuildOptions) -> None:
        self.reader, self.config, self.options = reader, config, options
        self.dtype = options.dtype
        self.selections: dict[str, Selection] = {}
        self.step_selections: dict[str, Selection] = {}
        self.cache_specs: dict[str, KVCacheSpec] = {}
        self._fused = {fusion.modules: fusion for fusion in reader.plan.fusions}
        self._embeddings: dict[str, Weight] = {}
        self._tables: dict[str, Table] = {}
        self.dtype_name = str(options.dtype).removeprefix("torch.")
        self._done = self._decoded = 0
        self._note = ""

    def linear(self, name: str, wide: bool = False) -> Linear:
        """One linear module with its bias, if one is stored.

        Args:
            wide: its input and output are float32, whatever the dtype of activations.
        """
        return self._linear((name,), torch.float32 if wide else None)

    def linears(self, names: Sequence[str]) -> nn.Module:
        """Several linear modules on one input: `layer(x)` gives one output per name, fused inside if the plan says so."""
        fusion = self._fused.get(tuple(names))
        if fusion is None or not fusion.fused:
            return ParallelLinear([self.linear(name) for name in names])
        if fusion.joint:
            return FusedLinear(self.linear(fusion.joint), fusion.heights, fusion.places)
        return FusedLinear(self._linear(names), [self.reader.row(name).shape[0] for name in names])

    def _linear(self, names: Sequence[str], dtype: torch.dtype | None = None) -> Linear:
        """The linear layer of one module, or of several as one matrix; out of the file of prepared ones, where it is there."""
        label, found = joint_label(names), self.ready(names)
        if found is not None:
            activation = found.prepared.activation
            problem = LinearProblem(found.weight, activation.without_values(), *found.prepared.shape, str(dtype or self.dtype).removeprefix("torch."))
            kernel = self._select(label, problem).kernel
            if found.is_of(kernel):
                self.skip(names)
                return Linear(label, kernel, found.prepared, found.bias, quantized_output=activation.of_output())
        layer = self.prepared(label, *self.matrix(names), dtype)
        if layer.is_plain:
            self.keep_ready(names, layer.kernel, self.selections[label].problem.weight, layer.prepared, layer.bias)
        return layer

    def ready(self, names: Sequence[str]) -> ReadyLinear | None:
        """The matrix of one module, or of several as one, as an earlier start has prepared it; None where there is no such file or matrix."""
        return None if self.options.ready is None else self.options.ready.get(joint_label(names))

    def keep_ready(self, names: Sequence[str], kernel: Kernel, weight: WeightSpec, prepared: Prepared, bias: Tensor | None) -> None:
        """Let the next start find a prepared matrix; dense ones are read as fast from the checkpoint."""
        if self.options.ready is not None and weight.kind != "dense":
            self.options.ready.put(joint_label(names), ReadyLinear(weight, kernel.name, build_of(kernel), prepared, bias))

    def skip(self, names: Sequence[str]) -> None:
        """Account for modules that are not read, since they were prepared before."""
        for name in names:
            self.reader.skip(self.reader.row(name))
            self._advance(name)

    def joint_linear(self, name: str, heights: Sequence[int]) -> nn.Module:
        """One linear module that stands for several, of these out features each: `layer(x)` gives one output for each."""
        return FusedLinear(self.linear(name), heights)

    def matrix(self, names: Sequence[str]) -> tuple[Weight, ActivationSpec, Tensor | None]:
        """(weight, activation, bias) of modules that the plan fuses, stacked; the same of a single one."""
        return _stacked([self._read(name) for name in names])

    def embedding(self, name: str) -> Embedding:
        """A token embedding."""
        weight, _, _ = self._read(name)
        problem = EmbeddingProblem(weight.spec, *weight.shape, self.dtype_name, self._head_kernel(name, weight))
        selection = self._select(name, problem)
        prepared = selection.kernel.prepare(weight, NO_ACTIVATION)
        self._embeddings[name] = weight  # for a head that shares it: the same tensors, not copies
        self._tables[name] = (getattr(selection.kernel, "heads", ()), prepared)
        return Embedding(name, selection.kernel, prepared, self.dtype)

    def _head_kernel(self, embedding: str, weight: Weight) -> str:
        """Name of the kernel of the head that shares an embedding's weight; "" where none does."""
        if isinstance(weight, Transformed) or not any(row.tied_to == embedding and not row.tensors for row in self.reader.plan.modules.values()):
            return ""
        problem = LinearProblem(weight.spec, NO_ACTIVATION, *weight.shape, self.dtype_name)
        name: str = select(problem, self.options.platform, self.options.policy).kernel.name
        return name

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
        return self.prepared(name, shared, NO_ACTIVATION, None, table=self._tables[tied_to])

    def step_kernel(self, operation: str, size: int = 0, detail: str = "") -> Kernel:
        """What computes the norms, rotary embeddings, gates or attention of this size; see kernels.step."""
        problem = StepProblem(operation, size, self.dtype_name, detail)
        if problem.label not in self.step_selections:
            self.step_selections[problem.label] = select(problem, self.options.platform, self.options.policy)
        return self.step_selections[problem.label].kernel

    def decode_step(self, step: StepDescription | None, obstacle: str) -> RunnableStep | None:
        """What runs a model's decode steps at once; None: its modules one by one."""
        problem = DecodeStepProblem(self.dtype_name, step, obstacle)
        selection = self.step_selections[problem.label] = select(problem, self.options.platform, self.options.policy)
        runnable: RunnableStep | None = None if step is None else selection.kernel.prepare(step)
        return runnable

    def vector(self, name: str, size: int, wide: bool = False) -> Tensor:
        """A one-dimensional parameter [size] in the dtype of activations; `wide`: in float32."""
        stored = self.reader.vector(name)
        if tuple(stored.shape) != (size,):
            raise ShapeMismatchError(name, f"shape {list(stored.shape)}", f"[{size}]", "correct config.json, or fetch the right checkpoint")
        self._advance(name)
        return stored.to(self.options.device, torch.float32 if wide else self.dtype, copy=True)

    def parameter(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A parameter of any shape, as the plan has it, in `dtype`."""
        stored = self.reader.vector(name)
        if tuple(stored.shape) != tuple(shape):
            raise ShapeMismatchError(name, f"shape {list(stored.shape)}", str(list(shape)), "correct config.json, or fetch the right checkpoint")
        self._advance(name)
        return stored.to(self.options.device, dtype, copy=True)

    def dense_matrix(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """(weight [N, K] dequantized and rounded once to `dtype`, bias) of a module whose product its caller computes.

        Raises:
            RequestError: the module quantizes its input, which only a linear layer does.
        """
        weight, activation, bias = self._read(name)
        if not activation.is_none:
            raise RequestError(name, f"activation {activation.describe()}", "weights alone that are quantized, as its product is computed by modelling code", 'load it with activations="none"')
        moved = None if bias is None else bias.to(self.options.device, dtype, copy=True)
        return weight.effective().to(self.options.device, dtype), moved

    def optional_vector(self, name: str, size: int) -> Tensor | None:
        """As vector(), or None where the plan has no such tensor."""
        return self.vector(name, size) if self.reader.has_tensor(name) else None

    def kv_cache_spec(self, attention: str, latent: bool = False) -> KVCacheSpec:
        """The cache of one attention module, by the checkpoint and the run's choice.

        Args:
            latent: it is a module of latent attention.
        """
        row = self.reader.plan.modules.get(attention)
        scales: Mapping[str, tuple[float, ...]] = self.reader.cache_scales(row) if row else {}
        spec = choose_cache(attention, row.kv_cache if row else None, scales, self.options.kv_cache)
        self.cache_specs[attention] = spec = of_latents(attention, spec) if latent else spec
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
        return self._moved(f"{attention} queries", queries), self._moved(f"{attention} keys", keys)

    def moved_bias(self, bias: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
        """A copy of it in the dtype of activations, or in another."""
        return None if bias is None else bias.to(self.options.device, dtype or self.dtype, copy=True)

    def _moved(self, label: str, transforms: tuple[Transform, ...], dtype: torch.dtype | None = None) -> tuple[Transform, ...]:
        """The transforms on the device, run by kernels where there are any for them; `dtype` as in prepared()."""
        return tuple(self._runnable(label, t.map_tensors(lambda tensor: tensor.to(self.options.device)), dtype or self.dtype) for t in transforms)

    def _runnable(self, label: str, transform: Transform, dtype: torch.dtype) -> Transform:
        if not isinstance(transform, Hadamard):
            return transform
        problem = HadamardProblem(transform.size, 1 if transform.base is None else transform.base.shape[0], str(dtype).removeprefix("torch."))
        # what a run requires is said of products with weights; the floor of a transform serves every platform
        selection = select(problem, self.options.platform, replace(self.options.policy, require=None))
        self.selections[f"{label}, {transform.describe()}"] = selection
        return KernelTransform(transform, selection.kernel, selection.kernel.prepare(transform))

    def finish(self) -> None:
        """Close the ledger."""
        self._embeddings.clear()
        self._tables.clear()
        self.reader.close()
        if self.options.ready is not None:
            self.options.ready.write()

    def _read(self, name: str) -> tuple[Weight, ActivationSpec, Tensor | None]:
        row = self.reader.row(name)
        weight, activation, bias = self.reader.weight(row)
        self._advance(name)
        self._count_memory(row.nbytes)
        if self.options.activations == "none":
            activation = NO_ACTIVATION
        # kernels convert layouts where they run
        weight = weight.map_tensors(lambda tensor: tensor.to(self.options.device))
        return self._dense(weight) if self.options.dequantize else weight, activation, bias

    def _dense(self, weight: Weight) -> Weight:
        """The weight in the dtype of activations; transforms of the input stay what they are."""
        if isinstance(weight, Transformed):
            return replace(weight, inner=self._dense(weight.inner))
        return weight if isinstance(weight, DenseWeight) else DenseWeight(weight.dequantize().to(self.dtype))

    def prepared(
        self, label: str, weight: Weight, activation: ActivationSpec, bias: Tensor | None, dtype: torch.dtype | None = None, table: Table = ((), None)
    ) -> Linear:
        """A linear layer of a weight that has been read.

        Args:
            dtype: of its input and output; None: that of activations.
            table: of an embedding that has the same weight.
        """
        transforms: tuple[Transform, ...] = ()
        outputs: tuple[Transform, ...] = ()
        low_rank = None
        if isinstance(weight, Transformed):
            inputs, results = self._moved(f"{label} input", weight.inputs, dtype), self._moved(f"{label} output", weight.outputs, dtype)
            transforms, low_rank, outputs, weight = inputs, weight.low_rank, results, weight.inner
            low_rank = None if low_rank is None else low_rank.map_tensors(lambda tensor: tensor.to(self.options.device))
        problem = LinearProblem(weight.spec, activation.without_values(), *weight.shape, str(dtype or self.dtype).removeprefix("torch."))
        selection = self._select(label, problem)
        heads, ready = table
        prepared = ready if ready is not None and selection.kernel.name in heads else selection.kernel.prepare(weight, activation)
        return Linear(label, selection.kernel, prepared, self.moved_bias(bias, dtype), transforms, low_rank, outputs, activation.of_output())

    def _count_memory(self, nbytes: int) -> None:
        """Note what was decoded, and return free memory before the gaps grow larger than a module."""
        self._decoded += nbytes
        if self._decoded > FREE_AFTER_BYTES:
            self._decoded = 0
            return_free_memory()

    def _select(self, label: str, problem: LinearProblem | EmbeddingProblem) -> Selection:
        selection = select(problem, self.options.platform, self.options.policy)
        self.selections[label] = selection.noted(self._note)
        return selection

    def experts_kernel(self, label: str, problem: ExpertsProblem) -> tuple[ExpertsKernel | None, str]:
        """(the kernel that runs the experts, "") or (None, why their matrices run as linear modules)."""
        selection, why = select_experts(problem, self.options.platform, self.options.policy)
        if selection is not None:
            self.selections[label] = selection
        return (None if selection is None else selection.kernel), why

    @contextmanager
    def linears_of_experts(self, name: str, why: str) -> Iterator[None]:
        """Linear modules made here are those of experts; `why` stands in their selections.

        Raises:
            NoKernelError: a kernel of experts was asked for.
        """
        refuse_linears(name, why, self.options.policy)
        self._note = why
        try:
            yield
        finally:
            self._note = ""

    def _advance(self, name: str) -> None:
        self._done += 1
        if self.options.progress is not None:
            self.options.progress(self._done, len(self.reader.plan.modules))


def joint_label(names: Sequence[str]) -> str:
    """The name of a module, or "prefix.{a,b}" of several."""
    if len(names) == 1:
        return names[0]
    return f"{names[0].rpartition('.')[0]}.{{{','.join(n.rpartition('.')[2] for n in names)}}}"


def _stacked(parts: Sequence[tuple[Weight, ActivationSpec, Tensor | None]]) -> tuple[Weight, ActivationSpec, Tensor | None]:
    """Modules with equal schemes as one: (weight, activation, bias)."""
    weights = [part[0] for part in parts]
    if len(weights) == 1:
        return parts[0]
    biases = [part[2] for part in parts if part[2] is not None]
    return type(weights[0]).concat(weights), parts[0][1], torch.cat(biases) if biases else None


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
