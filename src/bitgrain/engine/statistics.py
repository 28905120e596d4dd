"""What the engine counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from bitgrain.engine.request import Finish, Request


@dataclass(slots=True)
class EngineStatistics:
    """Totals since start; units: tokens, steps, seconds.

    Args:
        first_token_seconds: sum over requests of the time from submission to the first token.
        request_seconds:     sum over ended requests of the time from submission to the end.
    """

    running: int = 0
    waiting: int = 0
    submitted: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    first_tokens: int = 0
    first_token_seconds: float = 0.0
    request_seconds: float = 0.0
    finished: Counter[str] = field(default_factory=Counter)

    def count_finish(self, request: Request, finish: Finish) -> None:
        self.finished[finish.reason] += 1
        if request.finished_at is not None:
            self.request_seconds += request.finished_at - request.submitted_at

    def count_first_token(self, request: Request) -> None:
        if request.first_token_at is not None:
            self.first_tokens += 1
            self.first_token_seconds += request.first_token_at - request.submitted_at
