"""The engine's side of a request: tokens so far, the cache, and how far the prompt has been read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bitgrain.engine.request import Delta, Finish, Request
from bitgrain.engine.sampler import Sampled, SamplerState
from bitgrain.engine.stop_strings import StopMatcher
from bitgrain.engine.text_stream import TextStream


class Sequence:
    """One running completion; touched by the engine's thread only.

    Args:
        cache:        what the model made for it.
        end_tokens:   tokens that end it.
        stream:       turns tokens into text; None: an engine without a tokenizer gives tokens only.
    """

    def __init__(self, request: Request, cache: Any, end_tokens: frozenset[int], stream: TextStream | None) -> None:
        self.request, self.cache = request, cache
        self.tokens = list(request.prompt_ids)
        self.computed = 0  # tokens whose keys and values are in the cache
        self.state = SamplerState(request.params, request.prompt_ids)
        self._end_tokens, self._stream = end_tokens, stream
        self._stops = StopMatcher(request.params.stop)

    @property
    def pending(self) -> int:
        """Tokens that the model has not seen: the rest of the prompt, then one per step."""
        return len(self.tokens) - self.computed

    @property
    def is_prefilling(self) -> bool:
        return self.computed < len(self.request.prompt_ids)

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)

    def accept(self, sampled: Sampled) -> Delta:
        """Append a token; the delta says whether it was the last one."""
        token = sampled.token_id
        self.tokens.append(token)
        text, finish = "", None
        if token in self._end_tokens:
            finish = Finish("stop", token)
        else:
            text, finish = self._push(lambda stream: stream.push(token))
            if finish is None and self.generated >= self.request.max_tokens:
                finish = Finish("length")
        if finish is not None and not isinstance(finish.matched, str):
            text, finish = self._end_text(text, finish)
        logprobs = () if sampled.logprob is None else (sampled.logprob,)
        return Delta(text, (token,), logprobs, finish)

    def _push(self, read: Callable[[TextStream], str]) -> tuple[str, Finish | None]:
        if self._stream is None:
            return "", None
        text, matched = self._stops.push(read(self._stream))
        return text, None if matched is None else Finish("stop", matched)

    def _end_text(self, text: str, finish: Finish) -> tuple[str, Finish]:
        """Give out what was held back; even that may complete a stop string."""
        rest, stopped = self._push(lambda stream: stream.flush())
        return text + rest + self._stops.flush(), stopped or finish
