"""Log-probabilities in the three shapes that clients read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bitgrain.engine.sampler import TokenLogprob

TokenText = Callable[[int], str]

LOWEST = -9999.0  # JSON has no −∞; OpenAI's interface writes this number for it


def _finite(value: float) -> float:
    return max(value, LOWEST)


def completion_logprobs(entries: Sequence[TokenLogprob], text_of: TokenText, offset: int = 0) -> dict[str, Any]:
    """`logprobs` of /v1/completions.

    Args:
        offset: characters of the completion before the first entry.
    """
    tokens = [text_of(entry.token_id) for entry in entries]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    top = [{text_of(i): _finite(value) for i, value in entry.top} for entry in entries]
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(entry.logprob) for entry in entries],
        "top_logprobs": top if any(top) else None,
        "text_offset": offsets,
    }


def chat_logprobs(entries: Sequence[TokenLogprob], text_of: TokenText) -> dict[str, Any]:
    """`logprobs` of /v1/chat/completions."""

    def one(token_id: int, value: float) -> dict[str, Any]:
        text = text_of(token_id)
        # a token that is part of a character has no text of its own, and so no bytes that this could name
        return {"token": text, "logprob": _finite(value), "bytes": None if "\ufffd" in text else list(text.encode())}

    content = [{**one(e.token_id, e.logprob), "top_logprobs": [one(i, value) for i, value in e.top]} for e in entries]
    return {"content": content, "refusal": None}


def generate_logprobs(entries: Sequence[TokenLogprob], text_of: TokenText, with_text: bool) -> dict[str, Any]:
    """The log-probability keys of `meta_info` of /generate: [log-probability, token id, text or null]."""

    def one(token_id: int, value: float) -> list[Any]:
        return [_finite(value), token_id, text_of(token_id) if with_text else None]

    return {
        "input_token_logprobs": [],
        "output_token_logprobs": [one(e.token_id, e.logprob) for e in entries],
        "output_token_logprobs_length": len(entries),
        "output_top_logprobs": [[one(i, value) for i, value in e.top] for e in entries],
    }
