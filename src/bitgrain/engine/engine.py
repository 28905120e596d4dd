"""Continuous batching: one thread that runs the model for all requests."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bitgrain.engine.request import Delta, Finish, Request, engine_stopped
from bitgrain.engine.sampler import Sampled, sample
from bitgrain.engine.sampling import SamplingParams, Unstated
from bitgrain.engine.sequence import Sequence
from bitgrain.engine.statistics import EngineStatistics
from bitgrain.engine.tokenizer import Tokenizer
from bitgrain.errors import BitgrainError, PromptTooLongError, RequestError, RunError
from bitgrain.models.batch import Batch, Segment


class Model(Protocol):
    """What the engine needs of a model."""

    vocab_size: int
    max_context: int
    config: Any  # with eos_token_ids

    def forward(self, batch: Batch) -> Tensor:
        """float32 [R, V] for the R rows that the batch asks for."""

    def new_cache(self, max_tokens: int) -> Any:
        """An empty cache with room for `max_tokens` tokens."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How requests share the model.

    Args:
        max_running_requests: sequences in one batch at most; the others wait in order of arrival.
        chunked_prefill_size: prompt tokens in one step at most, over all sequences; tokens being generated come on top.
    """

    max_running_requests: int = 32
    chunked_prefill_size: int = 512

    def __post_init__(self) -> None:
        for name in ("max_running_requests", "chunked_prefill_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RequestError(f"option {name}", repr(value), "a whole number ≥ 1", "correct the option")


class Engine:
    """Runs requests on a model in a background thread.

    Each step takes one token of every sequence that is generating and up to `chunked_prefill_size` tokens of prompts, first come first
    served, as one ragged batch.  When a batch fails, its sequences run one by one, so that an error ends the request that causes it alone.

    Args:
        tokenizer: for text; None: prompts and completions are tokens only, and stop strings are refused.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer | None = None, options: EngineOptions | None = None) -> None:
        if tokenizer is not None:
            tokenizer.check_vocabulary(model.vocab_size)
        self.model, self.tokenizer, self.options = model, tokenizer, options or EngineOptions()
        self.statistics = EngineStatistics()
        self._eos = frozenset(model.config.eos_token_ids or ()) | (tokenizer.eos_token_ids if tokenizer else frozenset())
        self._wake = threading.Condition()
        self._waiting: deque[Request] = deque()  # guarded by _wake
        self._running: list[Sequence] = []  # the engine's thread only
        self._closing = False
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._run, name="bitgrain-engine", daemon=True)
        self._thread.start()

    # ---- any thread ----

    @property
    def suggested_sampling(self) -> dict[str, Any]:
        """Sampling values that the checkpoint suggests, for requests that state none."""
        return {} if self.tokenizer is None else self.tokenizer.suggested_sampling

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def submit(self, prompt_ids: Sequence_[int], params: SamplingParams | None = None, request_id: str | None = None) -> Request:
        """Queue a prompt.

        Raises:
            RequestError: the prompt is empty or holds ids that the vocabulary does not have, or stop strings without a tokenizer.
            PromptTooLongError: prompt and completion do not fit the model's context.
        """
        params = params or SamplingParams(**self.suggested_sampling)
        prompt = self._checked_prompt(prompt_ids)
        if params.stop and self.tokenizer is None:
            raise RequestError("sampling parameters: stop", "the engine has no tokenizer", "a tokenizer", "use stop_token_ids")
        request = Request(
            request_id or f"bitgrain-{next(self._numbers)}",
            prompt,
            params,
            self._room(len(prompt), params.max_tokens),
            engine_is_alive=lambda: self.is_alive,
            on_cancel=self._notify,
        )
        with self._wake:
            if not self.is_alive:
                raise engine_stopped("engine")
            self._waiting.append(request)
            self.statistics.submitted += 1
            self.statistics.waiting = len(self._waiting)
            self._wake.notify_all()
        return request

    def _checked_prompt(self, prompt_ids: Sequence_[int]) -> tuple[int, ...]:
        prompt = tuple(prompt_ids)
        if not prompt:
            raise RequestError("prompt", "it has no tokens", "at least one token", "send a prompt that is not empty")
        size = self.model.vocab_size
        bad = [i for i in prompt if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < size]
        if bad:
            shown = ", ".join(map(repr, bad[:8])) + (" …" if len(bad) > 8 else "")
            raise RequestError("prompt", f"token ids {shown}", f"whole numbers from 0 to {size - 1}", "use the model's own tokenizer")
        return prompt

    def _room(self, prompt: int, wanted: int | None) -> int:
        """How many tokens may be generated; a stated number is kept or refused, a default may be lowered."""
        limit = self.model.max_context
        room = limit - prompt
        stated = wanted is not None and not isinstance(wanted, Unstated)
        if room < 1 or (stated and wanted is not None and wanted > room):
            asked = f" and {wanted} tokens to generate are {prompt + int(wanted or 0)} tokens" if stated else ""
            raise PromptTooLongError(
                "prompt",
                f"a prompt of {prompt} tokens{asked}, the model's context is {limit} tokens",
                f"prompt and completion together at most {limit} tokens",
                f"shorten the prompt by {1 - room} or more tokens" if room < 1 else f"ask for at most {room} tokens, or shorten the prompt",
            )
        return room if wanted is None else min(int(wanted), room)

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify_all()

    def close(self) -> None:
        """Stop the thread; requests that have not ended end with "cancelled".  May be called twice."""
        self._closing = True
        self._notify()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- the engine's thread ----

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._await_work():
                    self._drop_cancelled()
                    self._admit()
                    if self._running:
                        self._step(self._schedule())
        finally:
            self._closing = True
            self._end_all()

    def _await_work(self) -> bool:
        """Sleep until there is something to do; False: time to stop."""
        with self._wake:
            while not (self._closing or self._waiting or self._running):
                self._wake.wait()
            return not self._closing

    def _end_all(self) -> None:
        for sequence in list(self._running):
            self._finish(sequence, Finish("cancelled"))
        with self._wake:
            waiting, self._waiting = list(self._waiting), deque()
        for request in waiting:
            self._end_unstarted(request, Finish("cancelled"))

    def _drop_cancelled(self) -> None:
        for sequence in [s for s in self._running if s.request.is_cancelled]:
            self._finish(sequence, Finish("cancelled"))
        with self._wake:
            gone = [r for r in self._waiting if r.is_cancelled]
            self._waiting = deque(r for r in self._waiting if not r.is_cancelled)
        for request in gone:
            self._end_unstarted(request, Finish("cancelled"))

    def _admit(self) -> None:
        """Start waiting requests, in order, while there is a place in the batch."""
        while len(self._running) < self.options.max_running_requests:
            with self._wake:
                if not self._waiting:
                    break
                request = self._waiting.popleft()
            try:
                cache = self.model.new_cache(len(request.prompt_ids) + request.max_tokens)
            except Exception as error:  # as in _step
                self._end_unstarted(request, Finish("error", error=_as_run_error(error)))
                continue
            own = frozenset() if request.params.ignore_eos else self._eos
            stream = self.tokenizer.stream() if self.tokenizer else None
            self._running.append(Sequence(request, cache, own | frozenset(request.params.stop_token_ids), stream))
        self._count_queues()

    def _count_queues(self) -> None:
        self.statistics.running, self.statistics.waiting = len(self._running), len(self._waiting)

    def _schedule(self) -> list[tuple[Sequence, int]]:
        """(sequence, number of its tokens) for the next step."""
        budget = self.options.chunked_prefill_size
        work = []
        for sequence in self._running:
            count = 1
            if sequence.is_prefilling:
                count = min(sequence.pending, budget)
                budget -= count
            if count:
                work.append((sequence, count))
        return work

    def _step(self, work: list[tuple[Sequence, int]]) -> None:
        started = time.monotonic()
        done = [sequence for sequence, count in work if count == sequence.pending]
        try:
            logits = self._forward(work, len(done))
        except Exception as error:  # the model is not ours to trust: what it raises ends requests, never the engine
            self._isolate(work, error)
            return
        for sequence, count in work:
            self.statistics.prompt_tokens += count if sequence.is_prefilling else 0
            sequence.computed += count
        results = sample(logits, [s.state for s in done]) if done else []
        for sequence, result in zip(done, results, strict=True):
            self._accept(sequence, result)
        self.statistics.steps += 1
        self.statistics.step_seconds += time.monotonic() - started

    def _forward(self, work: list[tuple[Sequence, int]], rows: int) -> Tensor:
        logits = self.model.forward(_batch(work))
        if logits.shape != (rows, self.model.vocab_size):
            raise RuntimeError(f"logits of shape {list(logits.shape)}, expected {[rows, self.model.vocab_size]}")
        return logits

    def _isolate(self, work: list[tuple[Sequence, int]], error: Exception) -> None:
        """After a failed step: end the one sequence, or run each alone, so that only the culprit ends."""
        for sequence, count in work:
            if len(work) == 1:
                self._finish(sequence, Finish("error", error=_as_run_error(error)))
            else:
                sequence.cache.truncate(sequence.computed)
                self._step([(sequence, count)])

    def _accept(self, sequence: Sequence, result: Sampled | BitgrainError) -> None:
        if isinstance(result, BitgrainError):
            self._finish(sequence, Finish("error", error=result))
            return
        try:
            delta = sequence.accept(result)
        except Exception as error:  # decoding runs the checkpoint's tokenizer
            self._finish(sequence, Finish("error", error=_as_run_error(error)))
            return
        self._deliver(sequence, delta)

    def _deliver(self, sequence: Sequence, delta: Delta) -> None:
        if delta.finish is not None:
            self._running.remove(sequence)
        self._put(sequence.request, delta, first=bool(delta.token_ids) and sequence.generated == 1)

    def _finish(self, sequence: Sequence, finish: Finish) -> None:
        self._deliver(sequence, Delta(finish=finish))

    def _end_unstarted(self, request: Request, finish: Finish) -> None:
        self._put(request, Delta(finish=finish))

    def _put(self, request: Request, delta: Delta, first: bool = False) -> None:
        """Count, then hand over: who has read the delta finds it counted."""
        request.mark_times(delta)
        self.statistics.generated_tokens += len(delta.token_ids)
        if first:
            self.statistics.count_first_token(request)
        if delta.finish is not None:
            self.statistics.count_finish(request, delta.finish)
            self._count_queues()
        request.put(delta)


def _batch(work: list[tuple[Sequence, int]]) -> Batch:
    """The ragged batch of a step: the segments one after the other; logits for the last row of each complete one."""
    tokens: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    rows: list[int] = []
    for sequence, count in work:
        start, begin = len(tokens), sequence.computed
        tokens += sequence.tokens[begin : begin + count]
        positions += range(begin, begin + count)
        segments.append(Segment(sequence.cache, start, count))
        if count == sequence.pending:
            rows.append(start + count - 1)
    as_tensor = [torch.tensor(values, dtype=torch.int64) for values in (tokens, positions, rows)]
    return Batch(tokens=as_tensor[0], positions=as_tensor[1], segments=tuple(segments), logit_rows=as_tensor[2])


def _as_run_error(error: Exception) -> BitgrainError:
    if isinstance(error, BitgrainError):
        return error
    return RunError(
        "engine step",
        f"{type(error).__name__}: {error}",
        "a step without errors",
        "send the request again; if it fails again, report it with this message",
    )
