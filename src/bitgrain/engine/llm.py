"""The engine for programs: prompts in, completions out."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitgrain.checkpoint.files import open_files
from bitgrain.engine.engine import Engine, EngineOptions
from bitgrain.engine.request import Collected, Delta, FinishReason, Request
from bitgrain.engine.sampler import TokenLogprob
from bitgrain.engine.sampling import SEED_RANGE, SamplingParams
from bitgrain.engine.tokenizer import Tokenizer
from bitgrain.errors import RequestError

Prompt = str | Sequence[int]
DEFAULTS = EngineOptions()


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished completion.

    Args:
        prompt:        text of the prompt; None if it was given as tokens.
        token_ids:     generated tokens, the end token included.
        finish_reason: "stop", "length" or "cancelled".
        matched:       for "stop": the stop string or the end token's id.
        logprobs:      one per token if they were asked for, else empty.
    """

    prompt: str | None
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    matched: str | int | None
    prompt_tokens: int
    completion_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()


class LLM:
    """A loaded model with its tokenizer and a running engine; close it, or use it in a `with` statement.

    Args:
        path:                 folder, file or name of a checkpoint, as for load_model().
        max_running_requests, chunked_prefill_size: see EngineOptions.
        load_options:         every other option goes to load_model().
    """

    def __init__(
        self,
        path: str | Path,
        *,
        max_running_requests: int = DEFAULTS.max_running_requests,
        chunked_prefill_size: int = DEFAULTS.chunked_prefill_size,
        **load_options: Any,
    ) -> None:
        from bitgrain import load_model

        options = EngineOptions(max_running_requests, chunked_prefill_size)
        # the tokenizer first: it is read in a moment, and a missing one should not cost the time to load a model
        tokenizer = Tokenizer.from_checkpoint(open_files(path))
        self._start(load_model(path, **load_options), tokenizer, options)

    @classmethod
    def from_parts(cls, model: Any, tokenizer: Tokenizer | None, options: EngineOptions | None = None) -> LLM:
        """An LLM around a model that is loaded already."""
        llm = cls.__new__(cls)
        llm._start(model, tokenizer, options or EngineOptions())
        return llm

    def _start(self, model: Any, tokenizer: Tokenizer | None, options: EngineOptions) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.engine = Engine(model, tokenizer, options)
        # the engine's thread keeps the engine alive, so a forgotten LLM has to end it
        self._finalizer = weakref.finalize(self, self.engine.close)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Completions in the order of the prompts (n of each together when `n` > 1).

        Args:
            prompts: text, token ids, or a list of either.
            sampling_params: one for all prompts, or one per prompt; None takes what the checkpoint suggests.
        Raises:
            RequestError: a prompt or a parameter cannot be honoured; nothing has been generated then.
        """
        every = _prompt_list(prompts)
        params = _params_list(sampling_params or SamplingParams(**self.engine.suggested_sampling), len(every))
        requests: list[Request] = []
        completed = []
        try:
            for prompt, wanted in zip(every, params, strict=True):
                ids = self._encode(prompt)
                requests += [self.engine.submit(ids, one) for one in split_choices(wanted)]
            texts = [p if isinstance(p, str) else None for p, wanted in zip(every, params, strict=True) for _ in range(wanted.n)]
            for request, text in zip(requests, texts, strict=True):
                completed.append(_completion(request, request.collect(), text))
        finally:
            for request in requests:
                request.cancel()  # does nothing to those that have ended
        return completed

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[Delta]:
        """The deltas of one completion as they come; leaving the loop early cancels it."""
        return _until_left(self.engine.submit(self._encode(prompt), sampling_params))

    def chat(self, messages: Sequence[Mapping[str, Any]], sampling_params: SamplingParams | None = None) -> Completion:
        """The assistant's answer to a conversation (`role` and `content` per message), by the checkpoint's chat template."""
        return self.generate([self._require_tokenizer().encode_chat(messages)], sampling_params)[0]

    def stream_chat(self, messages: Sequence[Mapping[str, Any]], sampling_params: SamplingParams | None = None) -> Iterator[Delta]:
        """The deltas of the assistant's answer."""
        return self.stream(self._require_tokenizer().encode_chat(messages), sampling_params)

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError("prompt", "text, but there is no tokenizer", "token ids", "give token ids, or load with a tokenizer")
        return self.tokenizer

    def _encode(self, prompt: Prompt) -> Sequence[int]:
        return self._require_tokenizer().encode(prompt) if isinstance(prompt, str) else prompt

    def close(self) -> None:
        """Stop the engine; may be called twice."""
        self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def split_choices(params: SamplingParams) -> list[SamplingParams]:
    """Parameters of `n` separate requests; a stated seed counts up, so that the choices differ and can be repeated."""
    if params.n == 1:
        return [params]
    low, high = SEED_RANGE
    seeds = [None if params.seed is None else low + (params.seed - low + i) % (high - low + 1) for i in range(params.n)]
    return [replace(params, n=1, seed=seed) for seed in seeds]


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    every = list(prompts)
    if every and all(isinstance(p, int) for p in every):
        return [every]  # type: ignore[list-item]
    bad = sorted({type(p).__name__ for p in every if not isinstance(p, (str, Sequence))})
    if bad:
        raise RequestError("prompts", f"values of type {', '.join(bad)}", "text or lists of token ids", "correct the prompts")
    return every  # type: ignore[return-value]


def _params_list(params: SamplingParams | Sequence[SamplingParams], count: int) -> list[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise RequestError("sampling_params", f"{len(params)} for {count} prompts", "one for all, or one per prompt", "correct the list")
    return list(params)


def _until_left(request: Request) -> Iterator[Delta]:
    try:
        for delta in request:
            if delta.finish is not None and delta.finish.error is not None:
                raise delta.finish.error
            yield delta
    finally:
        request.cancel()


def _completion(request: Request, whole: Collected, prompt: str | None) -> Completion:
    finish = whole.finish
    if finish is None:
        raise RuntimeError("a request's stream ended without a finish")
    if finish.error is not None:
        raise finish.error
    return Completion(
        prompt,
        whole.text,
        tuple(whole.token_ids),
        finish.reason,
        finish.matched,
        len(request.prompt_ids),
        len(whole.token_ids),
        tuple(whole.logprobs),
    )
