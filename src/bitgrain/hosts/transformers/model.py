"""A model that runs the library's modelling code with chosen kernels in it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from bitgrain.checkpoint.files import CheckpointFiles
from bitgrain.errors import BitgrainError, RequestError
from bitgrain.formats.slots import ModelSlots
from bitgrain.hosts.transformers.cache import HostedCache, cache_problem
from bitgrain.hosts.transformers.experts import host_experts
from bitgrain.hosts.transformers.layout import Layout, parameter_dtypes, read_layout
from bitgrain.hosts.transformers.library import empty_model, library_name, model_class, refused, require_own_code
from bitgrain.hosts.transformers.modules import host_embedding, host_linear
from bitgrain.layers.builder import BuildOptions, ModelBuilder
from bitgrain.layers.decoding import ModuleReader
from bitgrain.models.batch import Batch, check_batch
from bitgrain.models.language_model import LanguageModel
from bitgrain.models.loading import LoadOptions, build_options, with_prepared
from bitgrain.plan import Plan

__all__ = ["HostedImplementation", "HostedLM", "require_own_code"]

# Longest sequence of an architecture that has no limit of its own (its positions are slopes, not a table).
UNLIMITED = 1 << 20


@dataclass(frozen=True, slots=True)
class HostedImplementation:
    """The library's class for one checkpoint, and where its modules are in it.

    Args:
        config:  the library's configuration object.
        remote:  the class comes with the checkpoint.
        problem: why this host cannot run the model though it knows its modules; None if it can.
    """

    files: CheckpointFiles
    architecture: str
    cls: Any
    config: Any
    layout: Layout
    remote: bool
    problem: BitgrainError | None

    @staticmethod
    def find(files: CheckpointFiles, architecture: str, trust_remote_code: bool) -> HostedImplementation:
        """The implementation of an architecture, from headers.

        Raises:
            UnsupportedArchitectureError: the library does not know the architecture, or its modules cannot be found in a checkpoint.
            MissingDependencyError: the library is not installed.
            ConfigError: the library refuses config.json.
        """
        cls, config = model_class(files, architecture, trust_remote_code)
        model = empty_model(cls, config, torch.bfloat16, architecture)
        layout = read_layout(model, files, architecture)
        return HostedImplementation(files, architecture, cls, config, layout, not cls.__module__.startswith("transformers.models."), cache_problem(model, architecture) or layout.problem)

    @property
    def name(self) -> str:
        return f"{library_name()} ({'code of the checkpoint, ' if self.remote else ''}{self.cls.__name__})"

    def slots(self) -> ModelSlots:
        return self.layout.slots

    def build(self, plan: Plan, options: LoadOptions) -> HostedLM:
        """Fill an empty model module by module and close the ledger; as models.loading.build_model()."""
        stored = self.files.config.get("dtype") or self.files.config.get("torch_dtype")
        build = with_prepared(build_options(options, stored if isinstance(stored, str) else None), self.files, plan, options.prepared_folder)
        model = empty_model(self.cls, self.config, build.dtype, self.architecture)
        filler = _Filler(model, self, plan, build)
        with torch.inference_mode():
            filler.fill()
            hosted = HostedLM(model, self.config, build.dtype, build.device, self.architecture)
        hosted.attach(plan, filler.selections(), filler.wide.cache_specs | filler.builder.cache_specs)
        if options.context_length is not None:
            hosted.limit_context(options.context_length)
        return hosted.eval()


class _Filler:
    """Gives every module of an empty model what the plan has for it."""

    def __init__(self, model: Any, of: HostedImplementation, plan: Plan, build: BuildOptions) -> None:
        self.model, self.layout, self.architecture, self.device = model, of.layout, of.architecture, build.device
        self.dtypes = parameter_dtypes(model, build.dtype)
        if build.progress is not None:
            told, done = build.progress, count(1)
            build = replace(build, progress=lambda _, every: told(next(done), every))  # two builders, one count
        reader = ModuleReader(of.files, plan)
        self.builder = ModelBuilder(reader, of.config, build)
        self.wide = ModelBuilder(reader, of.config, replace(build, dtype=torch.float32))  # for modules that the library keeps in float32
        self.asked_cache = build.kv_cache

    def selections(self) -> dict[str, Any]:
        return {**self.builder.selections, **self.wide.selections}

    def fill(self) -> None:
        layout = self.layout
        for name, stored in layout.embeddings.items():
            host_embedding(self.model.get_submodule(name), self.builder.embedding(stored))
        for name, stored in layout.linears.items():
            self._linear(name, stored)
        for name, stored in layout.matrices.items():
            self._matrix(name, stored)
        for name, stored in layout.tensors.items():
            module, _, local = name.rpartition(".")
            self._assign(self.model.get_submodule(module), local, self.builder.parameter(stored, self.model.state_dict()[name].shape, self.dtypes[name]))
        for name, experts in layout.experts.items():
            host_experts(self.model.get_submodule(name), self.builder, experts.parent)
        for attention in layout.attention:
            self._check_attention(attention)
        self._move_buffers()
        self._check_full()
        self.wide.finish()
        self.builder.finish()

    def _builder_of(self, parameter: str) -> ModelBuilder:
        return self.builder if self.dtypes.get(parameter, self.builder.dtype) == self.builder.dtype else self.wide

    def _linear(self, name: str, stored: str) -> None:
        builder = self._builder_of(f"{name}.weight")
        tied = self.layout.head is not None and self.layout.head[0] == name
        if tied and self.layout.head is not None:
            chosen = builder.lm_head(stored, self.layout.embeddings[self.layout.head[1]])
        else:
            chosen = builder.linear(stored)
        host_linear(self.model.get_submodule(name), chosen, builder.dtype)

    def _matrix(self, name: str, stored: str) -> None:
        module = self.model.get_submodule(name)
        weight, bias = self._builder_of(f"{name}.weight").dense_matrix(stored, self.dtypes[f"{name}.weight"])
        self._assign(module, "weight", weight)
        if bias is not None:
            if module._parameters.get("bias") is None:
                raise refused(self.architecture, f"{stored}.bias is stored, and the modelling code adds none", "a checkpoint of this architecture")
            self._assign(module, "bias", bias)

    def _assign(self, module: nn.Module, local: str, value: Tensor) -> None:
        if local in module._parameters:
            module._parameters[local] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[local] = value

    def _check_attention(self, name: str) -> None:
        """Raise where the checkpoint, or the run, asks for a cache or for transforms that the library's cache has no place for."""
        row = self.builder.reader.plan.modules.get(name)
        if row is not None and row.kv_cache is not None and row.kv_cache.heads is not None:
            raise refused(self.architecture, f"{name} transforms queries and keys", "attention without transforms of its own")
        spec = self.builder.kv_cache_spec(name)
        if spec.element != "none":
            raise RequestError(
                name, f"a KV cache of {spec.describe()}, {'by the checkpoint' if self.asked_cache == 'auto' else 'as asked'}", "a 16-bit cache: transformers' modelling code runs the model, and its cache holds no other",
                "ask for kv_cache='16bit' (--kv-cache-dtype 16bit)",
            )  # fmt: skip

    def _move_buffers(self) -> None:
        for module in self.model.modules():
            for local, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[local] = buffer.to(self.device)

    def _check_full(self) -> None:
        """Raise if anything of the model was given no value."""
        empty = [name for name, tensor in _all_tensors(self.model) if tensor.is_meta]
        if empty:
            raise refused(self.architecture, f"nothing fills {', '.join(empty[:5])}", "a checkpoint that fills every parameter")


def _all_tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


class _HostedConfig:
    """What an engine asks of a configuration, by the library's.

    Attributes:
        library: the library's object.
    """

    def __init__(self, config: Any) -> None:
        self.library, text = config, config.get_text_config(decoder=True)
        limits = [getattr(text, key, None) for key in ("max_position_embeddings", "max_sequence_length", "max_seq_len", "seq_length", "n_positions")]
        self.max_context = next((limit for limit in limits if isinstance(limit, int) and limit > 0), UNLIMITED)
        eos = getattr(config, "eos_token_id", None)
        self.eos_token_ids = tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (eos,)


class HostedLM(LanguageModel):
    """A causal language model of the library; the sequences of a batch run one after another."""

    def __init__(self, model: Any, config: Any, dtype: torch.dtype, device: torch.device, architecture: str) -> None:
        super().__init__()
        self.model, self.dtype, self.device, self.architecture = model, dtype, device, architecture
        self.config = _HostedConfig(config)
        self.max_context = self.config.max_context
        taken = inspect.signature(model.forward).parameters
        self._takes_positions, self._takes_rows = "position_ids" in taken, "logits_to_keep" in taken
        self._growing = [m for m in model.modules() if hasattr(m, "max_seq_len_cached") and hasattr(m, "original_inv_freq")]
        self.vocab_size = self._first_pass()

    def _first_pass(self) -> int:
        """Run one token; the number of logits.

        Raises:
            UnsupportedArchitectureError: the modelling code does something that a chosen kernel's module does not offer.
        """
        try:
            return self._run(torch.zeros(1, dtype=torch.int64), HostedCache(self.config.library, 1), torch.zeros(1, dtype=torch.int64)).shape[-1]
        except Exception as error:  # modelling code may raise anything
            found = f"its modelling code does not run with replaced modules: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise refused(self.architecture, found, "modelling code that calls its linear layers and embeddings as modules") from None

    def new_cache(self, max_tokens: int) -> HostedCache:
        """An empty cache for one sequence of up to `max_tokens` tokens.

        Raises:
            PromptTooLongError: more than the model's context.
        """
        self.check_context(max_tokens)
        return HostedCache(self.config.library, max_tokens)

    def uncached(self, tokens: int) -> HostedCache:
        return self.new_cache(tokens)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """float32 [R, V]: logits of the rows that the batch asks for; appends the tokens to their caches.

        Raises:
            RequestError: the batch contradicts itself or its caches.
        """
        check_batch(batch, self.vocab_size)
        out = torch.empty(batch.logit_rows.numel(), self.vocab_size, dtype=torch.float32, device=self.device)
        for segment in batch.segments:
            stop = segment.start + segment.length
            wanted = (batch.logit_rows >= segment.start) & (batch.logit_rows < stop)
            rows = batch.logit_rows[wanted] - segment.start
            logits = self._run(batch.tokens[segment.start : stop], segment.cache, rows)
            out[wanted.to(self.device)] = logits.float()
        return out

    def _run(self, tokens: Tensor, cache: Any, rows: Tensor) -> Tensor:
        """[R, V]: the logits of some rows of the next tokens of one sequence."""
        for rotary in self._growing:  # each pass chooses its frequencies by its own length, not by those before it
            rotary.max_seq_len_cached = rotary.original_max_seq_len
            rotary.inv_freq = rotary.original_inv_freq
        ids, kept = tokens.to(self.device)[None], rows.to(self.device)
        extra: dict[str, Any] = {}
        if self._takes_positions:
            extra["position_ids"] = torch.arange(cache.length, cache.length + ids.shape[1], device=self.device)[None]
        if self._takes_rows:
            extra["logits_to_keep"] = kept if kept.numel() else 1
        result: Tensor = self.model(input_ids=ids, past_key_values=cache.stored, use_cache=True, return_dict=True, **extra).logits[0]
        if not kept.numel():
            return result[:0]
        return result if self._takes_rows else result[kept]
