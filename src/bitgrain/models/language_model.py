"""What every runnable language model offers, whoever wrote its modelling code."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitgrain.errors import PromptTooLongError, RequestError
from bitgrain.kernels.explain import explain_rows
from bitgrain.kernels.selection import Selection
from bitgrain.kvcache.spec import KVCacheSpec
from bitgrain.models.batch import Batch, Segment
from bitgrain.plan import Plan


class LanguageModel(nn.Module):
    """A causal language model that an engine can run.

    Attributes:
        config:      what config.json says; `max_context` and `eos_token_ids` at least.
        dtype:       of activations.
        vocab_size:  number of logits per row.
        max_context: longest sequence in tokens.
    """

    config: Any
    dtype: torch.dtype
    vocab_size: int
    max_context: int

    def __init__(self) -> None:
        super().__init__()
        self.plan: Plan | None = None
        self.selections: Mapping[str, Selection] = {}
        self.cache_specs: Mapping[str, KVCacheSpec] = {}
        self.step_selections: Mapping[str, Selection] = {}

    @abstractmethod
    def forward(self, batch: Batch) -> Tensor:
        """float32 [R, V]: logits of the rows that the batch asks for; appends the tokens to their caches."""

    @abstractmethod
    def new_cache(self, max_tokens: int) -> Any:
        """An empty cache for one sequence of up to `max_tokens` tokens."""

    @abstractmethod
    def uncached(self, tokens: int) -> Any:
        """Room for the keys and values of one pass, in the dtype of activations."""

    def attach(
        self, plan: Plan, selections: Mapping[str, Selection], cache_specs: Mapping[str, KVCacheSpec], steps: Mapping[str, Selection] | None = None
    ) -> None:
        """Keep what was decided while the model was built, for those who ask later.

        Args:
            selections: of the plan's modules.
            steps:      of what is computed between them: norms, rotary embedding, gates, attention.
        """
        self.plan, self.selections, self.cache_specs, self.step_selections = plan, selections, cache_specs, steps or {}

    def explain(self) -> list[dict[str, Any]]:
        """Per group of modules that differ only in their indices, and per computation between them: the chosen kernel, and each
        other candidate with its reason."""
        return explain_rows({**self.selections, **self.step_selections})

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

    def check_context(self, tokens: int) -> None:
        """Raise PromptTooLongError for more tokens than the model's context."""
        if tokens > self.max_context:
            raise PromptTooLongError(
                "sequence",
                f"{tokens} tokens",
                f"at most {self.max_context}, the model's context",
                "shorten the prompt, or ask for fewer tokens",
            )

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
        return self.forward(Batch(ids.long(), rows, (Segment(self.uncached(ids.numel()), 0, ids.numel()),), rows))
