"""What one request asks of the sampler: a frozen, validated description."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bitgrain.errors import RequestError

MAX_TOP_LOGPROBS = 100
SEED_RANGE = (-(2**63), 2**63 - 1)


class Unstated(int):
    """A default number of tokens, which the engine may lower to the room that the context leaves.

    A number that a user states is honoured or refused instead.
    """


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when a completion ends.

    The order of operations on the logits z of one step: penalties, division by `temperature`, the `top_k` largest, the smallest set of
    the most probable tokens with mass ≥ `top_p` (renormalized after `top_k`), then those with p ≥ `min_p` · max p.

    Args:
        max_tokens:        tokens to generate at most; None: all the room that the context leaves.
        temperature:       0 chooses the most probable token (greedy).
        top_k:             0 or −1: off.
        seed:              makes the result repeatable, whatever else runs in the batch; None: a seed from the system.
        stop:              strings that end the text; they are cut off.
        stop_token_ids:    tokens that end the text, besides the model's own end tokens.
        ignore_eos:        go on after the model's own end tokens.
        logprobs:          None: none; n: the chosen token's log-probability and the n largest, before penalties and temperature.
        frequency_penalty: subtracted from z per earlier occurrence among the generated tokens.
        presence_penalty:  subtracted from z once for a token generated before.
        repetition_penalty: z of tokens in prompt or output is divided by it (multiplied where z < 0).
        n:                 completions per prompt; whoever submits the request makes n requests of it.
    Raises:
        RequestError: names every value that cannot be honoured.
    """

    max_tokens: int | None = field(default=Unstated(128))
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    n: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _as_tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", _as_tuple(self.stop_token_ids))
        problems = [(name, needed) for name, valid, needed in self._rules() if not valid]
        if problems:
            raise RequestError(
                f"sampling parameters: {', '.join(name for name, _ in problems)}",
                ", ".join(f"{name} = {getattr(self, name)!r}" for name, _ in problems),
                "; ".join(f"{name}: {needed}" for name, needed in problems),
                "correct the values named here",
            )
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)

    def _rules(self) -> Iterable[tuple[str, bool, str]]:
        yield "max_tokens", self.max_tokens is None or _is_int(self.max_tokens, 1), "a whole number ≥ 1, or none"
        yield "temperature", _is_number(self.temperature, 0), "a finite number ≥ 0"
        yield "top_p", _is_number(self.top_p, 0, 1) and self.top_p > 0, "a number above 0, at most 1"
        yield "top_k", _is_int(self.top_k, -1), "a whole number ≥ 1, or 0 or −1 for off"
        yield "min_p", _is_number(self.min_p, 0, 1), "a number from 0 to 1"
        yield "seed", self.seed is None or _is_int(self.seed, *SEED_RANGE), "a whole number of 64 bits, or none"
        yield "stop", all(isinstance(s, str) and s != "" for s in self.stop), "strings that are not empty"
        yield "stop_token_ids", all(_is_int(i, 0) for i in self.stop_token_ids), "token ids (whole numbers ≥ 0)"
        yield "ignore_eos", isinstance(self.ignore_eos, bool), "true or false"
        yield "logprobs", self.logprobs is None or _is_int(self.logprobs, 0, MAX_TOP_LOGPROBS), f"0 to {MAX_TOP_LOGPROBS}, or none"
        yield "frequency_penalty", _is_number(self.frequency_penalty, -2, 2), "a number from −2 to 2"
        yield "presence_penalty", _is_number(self.presence_penalty, -2, 2), "a number from −2 to 2"
        yield "repetition_penalty", _is_number(self.repetition_penalty, 0) and self.repetition_penalty > 0, "a finite number above 0"
        yield "n", _is_int(self.n, 1, 128), "a whole number from 1 to 128"

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        return self.frequency_penalty != 0 or self.presence_penalty != 0 or self.repetition_penalty != 1


SUGGESTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def suggested_by(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling values that a checkpoint's generation_config.json suggests; a request's own values win over them.

    `do_sample: false` means greedy; the values that shape random sampling then have no part.
    Raises:
        RequestError: a value that cannot be honoured, under its name.
    """
    if generation.get("do_sample") is False:
        found = {"temperature": 0.0, **{name: generation[name] for name in ("repetition_penalty",) if generation.get(name) is not None}}
    else:
        found = {name: generation[name] for name in SUGGESTED if generation.get(name) is not None}
    SamplingParams(**found)
    return found


def _as_tuple(value: object) -> tuple[object, ...]:
    """Accept None, one value or several; whether they are of the right kind is judged later."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple, set, frozenset)) else (value,)


def _is_int(value: object, low: int, high: int | None = None) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)


def _is_number(value: object, low: float, high: float = math.inf) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) < 1e300 and low <= value <= high  # a comparison with NaN is False
