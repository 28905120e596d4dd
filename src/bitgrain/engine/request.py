"""A request as its sender sees it: a stream of deltas that threads and coroutines can read."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from threading import Condition
from typing import Literal

from bitgrain.engine.sampler import TokenLogprob
from bitgrain.engine.sampling import SamplingParams
from bitgrain.errors import BitgrainError, RunError

POLL_SECONDS = 1.0  # how often a waiting reader checks that the engine still lives

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Finish:
    """Why a completion ended.

    Args:
        matched: for "stop": the stop string or the end token's id.
        error:   for "error".
    """

    reason: FinishReason
    matched: str | int | None = None
    error: BitgrainError | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added: new text (may be empty), new tokens and, in the last one, why the completion ended."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None


@dataclass(slots=True)
class Collected:
    """All deltas of one request put together."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs)
        self.finish = delta.finish or self.finish


class Request:
    """Handle of a submitted request: `for delta in request` in a thread, `async for delta in request` in a coroutine.

    The stream ends after the delta that has a `finish`.  The queue is bounded by the request's own max_tokens, so an absent reader
    never stops the engine.

    Args:
        engine_is_alive: tells a waiting reader whether anything will still come.
        on_cancel:       wakes the engine.
    """

    def __init__(
        self,
        request_id: str,
        prompt_ids: tuple[int, ...],
        params: SamplingParams,
        max_tokens: int,
        engine_is_alive: Callable[[], bool],
        on_cancel: Callable[[], None],
    ) -> None:
        self.id, self.prompt_ids, self.params, self.max_tokens = request_id, prompt_ids, params, max_tokens
        self.submitted_at = time.monotonic()
        self.first_token_at: float | None = None
        self.finished_at: float | None = None
        self._engine_is_alive, self._on_cancel = engine_is_alive, on_cancel
        self._deltas: deque[Delta] = deque()
        self._changed = Condition()
        self._listener: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._cancelled = False

    @property
    def is_cancelled(self) -> bool:
        """Whether cancellation was asked for."""
        return self._cancelled

    def cancel(self) -> None:
        """Ask the engine to drop the request; its stream ends with "cancelled" unless it ended before."""
        if not self._cancelled and self.finished_at is None:
            self._cancelled = True
            self._on_cancel()

    def mark_times(self, delta: Delta) -> None:
        """Engine side, before put(): note when the first token and the end came."""
        now = time.monotonic()
        if delta.token_ids and self.first_token_at is None:
            self.first_token_at = now
        if delta.finish is not None:
            self.finished_at = now

    def put(self, delta: Delta) -> None:
        """Engine side: append one delta; never blocks."""
        with self._changed:
            self._deltas.append(delta)
            self._changed.notify_all()
            listener = self._listener
        if listener is not None:
            loop, event = listener
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # the reader's event loop is closed: nobody will read the rest
                self.cancel()

    def next_delta(self, timeout: float | None = None) -> Delta:
        """The next delta.

        Raises:
            TimeoutError: nothing came within `timeout` seconds.
            RunError:     the engine has stopped.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self._deltas:
                left = POLL_SECONDS if deadline is None else min(POLL_SECONDS, deadline - time.monotonic())
                if left <= 0:
                    raise TimeoutError(f"request {self.id}: no token within {timeout} seconds")
                if not self._changed.wait(left) and not self._deltas:
                    self._require_engine()
            return self._deltas.popleft()

    def __iter__(self) -> Iterator[Delta]:
        finished = False
        while not finished:
            delta = self.next_delta()
            finished = delta.finish is not None
            yield delta

    async def __aiter__(self) -> AsyncIterator[Delta]:
        event = asyncio.Event()
        with self._changed:
            self._listener = (asyncio.get_running_loop(), event)
        finished = False
        while not finished:
            event.clear()
            while self._deltas and not finished:
                delta = self._deltas.popleft()
                finished = delta.finish is not None
                yield delta
            if not finished and not self._deltas:
                await self._wait_for(event)

    async def _wait_for(self, event: asyncio.Event) -> None:
        try:
            await asyncio.wait_for(event.wait(), POLL_SECONDS)
        except TimeoutError:
            if not self._deltas:
                self._require_engine()

    def _require_engine(self) -> None:
        if not self._engine_is_alive():
            raise engine_stopped(f"request {self.id}")

    def collect(self) -> Collected:
        """Wait for the end; everything together."""
        whole = Collected()
        for delta in self:
            whole.add(delta)
        return whole


def engine_stopped(where: str) -> RunError:
    return RunError(where, "the engine has stopped", "a running engine", "start it again; its log shows why it stopped")
