"""Finds stop strings in text that arrives in pieces."""

from __future__ import annotations


class StopMatcher:
    """Lets text through until a stop string is complete; holds back what could be the beginning of one.

    The match that ends first wins (of those, the one that starts first), so the result does not depend on where the pieces are cut.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is safe to show, the stop string that is now complete or None)."""
        if not self._stops:
            return text, None
        buffer = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := buffer.find(stop)) >= 0]
        if found:
            _, at, stop = min(found)
            self._held = ""
            return buffer[:at], stop
        keep = max(_overlap(buffer, stop) for stop in self._stops)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep], None

    def flush(self) -> str:
        """What was held back; no stop string will complete any more."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
