"""Times beside the machine's limits, measured right before and after; samples during which the machine was disturbed are thrown away."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from bitgrain.bench.limits import Machine

# How far the read rates before and after a round may lie apart, and the rounds that are tried in all.
SPREAD, ROUNDS = 0.15, 4


@dataclass(frozen=True, slots=True)
class Sample:
    """Times of one call, and what the machine could do meanwhile.

    Args:
        median, best: seconds.
        read:         bytes per second that the host read, the mean of before and after.
        apart:        how far these two lay apart, of the larger.
        rejected:     rounds that were thrown away.
    """

    median: float
    best: float
    read: float
    apart: float
    rejected: int

    @property
    def is_disturbed(self) -> bool:
        """No round was quiet; this is the quietest of them."""
        return self.apart > SPREAD

    def share_of_read(self, nbytes: float) -> float:
        """Of the read rate, if each call reads so many bytes."""
        return nbytes / self.median / self.read


def sample(times: Callable[[], list[float]], machine: Machine, rounds: int = ROUNDS) -> Sample:
    """The first quiet round, or the quietest of `rounds`.

    Args:
        times: one round: seconds of some calls.
    """
    quietest: Sample | None = None
    for rejected in range(rounds):
        before = machine.read()
        taken = times()
        after = machine.read()
        apart = abs(before - after) / max(before, after)
        if quietest is None or apart < quietest.apart:
            quietest = Sample(statistics.median(taken), min(taken), (before + after) / 2, apart, rejected)
        if apart <= SPREAD:
            return quietest
    assert quietest is not None  # rounds is positive
    return quietest
