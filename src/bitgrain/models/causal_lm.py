"""The frame of every causal language model: embedding, layers, final norm, head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bitgrain.errors import PromptTooLongError, RequestError
from bitgrain.formats.slots import ModelSlots
from bitgrain.kernels.explain import explain_rows
from bitgrain.kernels.selection import Selection
from bitgrain.kvcache.cache import SequenceCache
from bitgrain.kvcache.spec import KVCacheSpec
from bitgrain.layers.attention import Step
from bitgrain.layers.builder import ModelBuilder
from bitgrain.layers.rotary import Rotary
from bitgrain.models.batch import Batch, Segment
from bitgrain.models.config import ModelConfig, Traits
from bitgrain.models.decoder import EMBEDDING, FINAL_NORM, HEAD, DecoderLayer, layers, norm
from bitgrain.plan import Plan


class CausalLM(nn.Module):
    """A causal language model; subclasses say what their layers are.

    Attributes:
        config:      what config.json says.
        max_context: longest sequence in tokens.
        vocab_size:  number of logits per row.
    """

    traits: ClassVar[Traits] = Traits()

    def __init__(self, builder: ModelBuilder) -> None:
        super().__init__()
        config: ModelConfig = builder.config
        self.config, self.dtype = config, builder.dtype
        self.vocab_size, self.max_context = config.vocab_size, config.max_context
        self.embed = builder.embedding(EMBEDDING)
        made = [self.make_layer(builder, index, name) for index, name in layers(config)]
        self.layers = nn.ModuleList(made)
        self._cache_layout = [layer.attention.cache_spec for layer in made]
        self.norm = norm(builder, FINAL_NORM)
        self.head = builder.lm_head(HEAD, EMBEDDING if config.tie_word_embeddings else None)
        self.rotary = Rotary(config.rope, builder.dtype)
        self.plan: Plan | None = None
        self.selections: Mapping[str, Selection] = {}
        self.cache_specs: Mapping[str, KVCacheSpec] = {}

    @classmethod
    @abstractmethod
    def slots(cls, config: ModelConfig) -> ModelSlots:
        """Every module that the checkpoint must have."""

    @abstractmethod
    def make_layer(self, builder: ModelBuilder, index: int, name: str) -> DecoderLayer:
        """Layer `index`, whose modules lie under `name`."""

    def attach(self, plan: Plan, selections: Mapping[str, Selection], cache_specs: Mapping[str, KVCacheSpec]) -> None:
        """Keep what was decided while the model was built, for those who ask later."""
        self.plan, self.selections, self.cache_specs = plan, selections, cache_specs

    def explain(self) -> list[dict[str, Any]]:
        """Per group of modules that differ only in their indices: the chosen kernel, and each other candidate with its reason."""
        return explain_rows(self.selections)

    def limit_context(self, tokens: int) -> None:
        """Lower the longest sequence.

        Raises:
            RequestError: not between 1 and what the model was made for.
        """
        if not 1 <= tokens <= self.config.max_context:
            raise RequestError(
                "context_length",
                str(tokens),
                f"1 to {self.config.max_context}, which the model was made for",
                "choose a length in this range",
            )
        self.max_context = tokens

    def new_cache(self, max_tokens: int) -> SequenceCache:
        """An empty cache for one sequence of up to `max_tokens` tokens.

        Where the rotary embedding depends on the sequence's length, `max_tokens` is that length: one choice for the whole
        sequence, so that its keys agree with each other however it is cut into steps.

        Raises:
            PromptTooLongError: more than the model's context.
        """
        if max_tokens > self.max_context:
            raise PromptTooLongError(
                "sequence",
                f"{max_tokens} tokens",
                f"at most {self.max_context}, the model's context",
                "shorten the prompt, or ask for fewer tokens",
            )
        return SequenceCache(self._cache_layout, max_tokens)

    def _uncached(self, tokens: int) -> SequenceCache:
        """Room for the keys and values of one pass, in the dtype of activations."""
        self._check_context(tokens)
        return SequenceCache([KVCacheSpec()] * len(self._cache_layout), tokens)

    def _check_context(self, tokens: int) -> None:
        if tokens > self.max_context:
            raise PromptTooLongError(
                "sequence",
                f"{tokens} tokens",
                f"at most {self.max_context}, the model's context",
                "shorten the prompt, or ask for fewer tokens",
            )

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """float32 [R, V]: logits of the rows that the batch asks for; appends the tokens to their caches.

        A sequence's attention never sees the rest of the batch.

        Raises:
            RequestError: the batch contradicts itself or its caches.
        """
        _check(batch, self.vocab_size)
        device = self.norm.weight.device
        lengths = tuple((s.length, s.cache.max_tokens) for s in batch.segments)
        cosine, sine = self.rotary.angles(batch.positions.to(device), lengths)
        step = Step(cosine, sine, tuple((s.cache, s.start, s.length) for s in batch.segments))
        x: Tensor = self.embed(batch.tokens.to(device))
        for layer in self.layers:
            x = layer(x, step)
        wanted = x[batch.logit_rows.to(device)]
        if not len(wanted):  # parts of prompts only: no kernel is asked for a product without rows
            return x.new_zeros(0, self.vocab_size, dtype=torch.float32)
        logits: Tensor = self.head(self.norm(wanted))
        return logits.float()

    def logits(self, input_ids: Tensor) -> Tensor:
        """float32 [T, V]: the logits after each token of one sequence, read at once.

        Nothing is cached, so a quantized KV cache has no part in them.

        Args:
            input_ids: int64 [T], ids of the vocabulary, 1 <= T <= max_context.
        Raises:
            RequestError, PromptTooLongError: they are not.
        """
        ids = torch.as_tensor(input_ids)
        if ids.dim() != 1 or not ids.numel() or ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool:
            raise RequestError("input_ids", f"{ids.dtype} {list(ids.shape)}", "integers [T] with T >= 1", "give one sequence of token ids")
        rows = torch.arange(ids.numel())
        return self.forward(Batch(ids.long(), rows, (Segment(self._uncached(ids.numel()), 0, ids.numel()),), rows))


def _check(batch: Batch, vocab_size: int) -> None:
    """Raise RequestError unless tokens, positions, segments and caches fit each other; mends caches that a failed step left uneven."""
    count = batch.tokens.numel()
    _check_range("tokens", batch.tokens, vocab_size)
    expected: list[int] = []
    for segment in batch.segments:
        done = segment.cache.length
        segment.cache.truncate(done)
        if segment.start != len(expected) or segment.length < 1 or done + segment.length > segment.cache.max_tokens:
            found = f"{segment.length} rows from {segment.start}, after {done} of {segment.cache.max_tokens} cached tokens"
            needed = f"at least one row from {len(expected)}, within the cache's room"
            raise RequestError("batch: segments", found, needed, "correct the batch")
        expected += range(done, done + segment.length)
    repeated = len({id(s.cache) for s in batch.segments}) < len(batch.segments)
    if repeated or len(expected) != count or batch.positions.tolist() != expected:
        found = "one cache twice" if repeated else "positions or rows that do not continue the caches"
        raise RequestError("batch", found, "the next tokens of each sequence, each sequence once", "correct the batch")
    if batch.logit_rows.numel():
        _check_range("logit_rows", batch.logit_rows, count)


def _check_range(name: str, values: Tensor, size: int) -> None:
    if not values.numel():
        raise RequestError(f"batch: {name}", "none", "at least one", "correct the batch")
    low, high = (int(v) for v in values.aminmax())
    if low < 0 or high >= size:
        raise RequestError(f"batch: {name}", f"values from {low} to {high}", f"values from 0 to {size - 1}", "correct the batch")
