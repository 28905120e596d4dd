"""How threads wait for each other in the commands that run a model; decided before torch is imported.  docs/threads.md has the figures."""

from __future__ import annotations

import os
import sys

from bitgrain.platforms.processors import allowed_processors
from bitgrain.settings import set_default, variable

COMMANDS = ("serve", "generate", "chat")
POLICY, SPINS, THREADS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"


def choose_waiting(command: str) -> None:
    """Let threads sleep while they wait, where others use the cores; leave them spinning, which is faster, where nobody does.

    A thread that spins for another one which does not run, because a third has its core, wastes what that one needs.
    A user's own setting stands.  Later than torch, the runtime would not see it.
    """
    if command not in COMMANDS or variable(POLICY) or variable(SPINS) or "torch" in sys.modules:
        return
    if is_crowded(allowed_processors(), own_threads(), load()):
        set_default(POLICY, "passive")


def is_crowded(cores: int, threads: int, load: float) -> bool:
    """More threads want to run than there are cores; half a thread is the noise of an idle system."""
    return threads + load > cores + 0.5


def own_threads() -> int:
    """What OMP_NUM_THREADS says, else one per core, as the runtime does."""
    asked = variable(THREADS) or ""
    return int(asked) if asked.isdecimal() and int(asked) else allowed_processors()


def load() -> float:
    """Threads that ran or wanted to during the last minute; 0 where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
