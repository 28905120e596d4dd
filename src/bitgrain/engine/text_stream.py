"""Turns tokens into text while they arrive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"


class Decoder(Protocol):
    """What streaming needs of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str: ...

    def leaves_text_open(self, token_id: int) -> bool: ...


class TextStream:
    """Decodes a growing sequence of tokens; the pieces joined are the decoding of the whole.

    Two things can make text change after the fact, and both are held back: a character whose bytes are not complete (it shows as
    U+FFFD at the end), and a run of byte tokens, which a byte-fallback tokenizer decodes all together or not at all.
    A window that starts at the last settled token keeps each step's work small.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decode: Callable[[Sequence[int]], str] = decoder.decode
        self._leaves_open = decoder.leaves_text_open
        self._window: list[int] = []
        self._settled = 0  # tokens of the window whose text has been given out; they are the context for the next ones

    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before."""
        self._window.append(token_id)
        if self._leaves_open(token_id):
            return ""
        before, after = self._texts()
        if len(after) <= len(before) or after.endswith(REPLACEMENT):
            return ""
        self._window = self._window[self._settled :]
        self._settled = len(self._window)
        return after[len(before) :]

    def flush(self) -> str:
        """What was held back; no more tokens will come."""
        before, after = self._texts()
        self._window, self._settled = [], 0
        return after[len(before) :]

    def _texts(self) -> tuple[str, str]:
        return self._decode(self._window[: self._settled]), self._decode(self._window)
