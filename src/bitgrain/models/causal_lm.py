"""The frame of every causal language model: embedding, layers, final norm, head."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from bitgrain.formats.slots import ModelSlots
from bitgrain.kernels.decode_step import StepDescription, Undescribed
from bitgrain.kvcache.cache import SequenceCache
from bitgrain.kvcache.spec import KVCacheSpec
from bitgrain.layers.attention import Step
from bitgrain.layers.builder import ModelBuilder
from bitgrain.layers.rotary import Rotary
from bitgrain.models.batch import Batch, check_batch
from bitgrain.models.config import ModelConfig, Traits
from bitgrain.models.decode_step import Decoder
from bitgrain.models.decoder import DecoderLayer, layers, norm
from bitgrain.models.language_model import LanguageModel


class CausalLM(LanguageModel):
    """A causal language model; subclasses say what their layers are.

    Attributes:
        config:      what config.json says.
        max_context: longest sequence in tokens.
        vocab_size:  number of logits per row.
        interleaved: rotary pairs are neighbours.
        wide_rope:   rotary angles, and what they turn, are float32.
    """

    traits: ClassVar[Traits] = Traits()
    interleaved: ClassVar[bool] = False
    wide_rope: ClassVar[bool] = False

    def __init__(self, builder: ModelBuilder) -> None:
        super().__init__()
        config: ModelConfig = builder.config
        self.config, self.dtype = config, builder.dtype
        self.vocab_size, self.max_context = config.vocab_size, config.max_context
        self.embed = builder.embedding(config.names.embedding)
        made = [self.make_layer(builder, index, name) for index, name in layers(config)]
        self.layers = nn.ModuleList(made)
        self._cache_layout = [layer.attention.cache_spec for layer in made]
        self.norm = norm(builder, config.names.final_norm)
        self.head = builder.lm_head(config.names.head, config.names.embedding if config.tie_word_embeddings else None)
        angles = torch.float32 if self.wide_rope else builder.dtype
        self.rotary = Rotary(config.rope, angles, self.interleaved)
        self.local_rotary = None if config.local_rope is None else Rotary(config.local_rope, angles, self.interleaved)
        self.decoder = Decoder.of(self, builder)

    @classmethod
    @abstractmethod
    def slots(cls, config: ModelConfig) -> ModelSlots:
        """Every module that the checkpoint must have."""

    @abstractmethod
    def make_layer(self, builder: ModelBuilder, index: int, name: str) -> DecoderLayer:
        """Layer `index`, whose modules lie under `name`."""

    def new_cache(self, max_tokens: int) -> SequenceCache:
        """An empty cache for one sequence of up to `max_tokens` tokens.

        Where the rotary embedding depends on the sequence's length, `max_tokens` is that length: one choice for the whole
        sequence, so that its keys agree with each other however it is cut into steps.

        Raises:
            PromptTooLongError: more than the model's context.
        """
        self.check_context(max_tokens)
        return SequenceCache(self._cache_layout, max_tokens)

    def uncached(self, tokens: int) -> SequenceCache:
        """Room for the keys and values of one pass, in the dtype of activations."""
        self.check_context(tokens)
        return SequenceCache([KVCacheSpec()] * len(self._cache_layout), tokens)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """float32 [R, V]: logits of the rows that the batch asks for; appends the tokens to their caches.

        A sequence's attention never sees the rest of the batch.

        Raises:
            RequestError: the batch contradicts itself or its caches.
        """
        check_batch(batch, self.vocab_size)
        device = self.norm.weight.device
        step = self._step(batch, device)
        x: Tensor = self.embed(batch.tokens.to(device))
        if self.config.embedding_scale is not None:
            x = x * float(torch.tensor(self.config.embedding_scale, dtype=x.dtype))  # rounded as the library does; a host's number
        stores = None if self.decoder is None else self.decoder.stores(batch)
        if self.decoder is not None and stores is not None:
            return self._capped(self.decoder.run(x, step, batch, stores))
        for layer in self.layers:
            x = layer(x, step)
        wanted = x[batch.logit_rows.to(device)]
        if not len(wanted):  # parts of prompts only: no kernel is asked for a product without rows
            return x.new_zeros(0, self.vocab_size, dtype=torch.float32)
        return self._capped(self.head(self.norm(wanted)))

    def describe_step(self, step: StepDescription) -> None:
        """Add the operations of a decode step, from the embedded tokens to the logits.

        Raises:
            Undescribed: a module cannot say what it does.
        """
        if self.config.query_growth is not None:
            raise Undescribed("queries grow with their positions")
        if self.rotary.dtype != self.dtype:
            raise Undescribed("rotary angles are float32, and activations are not")
        x = step.place("x", self.config.hidden_size)
        for layer in self.layers:
            step.through(layer, x, "layer")
        step.through(self.head, step.through(self.norm, x, "final"), "logits")

    def _capped(self, logits: Tensor) -> Tensor:
        cap = self.config.logit_cap
        return (logits if cap is None else torch.tanh(logits / cap) * cap).float()

    def _step(self, batch: Batch, device: torch.device) -> Step:
        """What the layers need to know of the batch."""
        positions = batch.positions.to(device)
        lengths = tuple((s.length, s.cache.max_tokens) for s in batch.segments)
        cosine, sine = self.rotary.angles(positions, lengths)
        local = None if self.local_rotary is None else self.local_rotary.angles(positions, lengths)
        growth = self.config.query_growth
        scale = None if growth is None else growth.at(positions)[:, None, None].to(self.dtype)
        return Step(cosine, sine, tuple((s.cache, s.start, s.length) for s in batch.segments), local, scale)
