"""The only place that reads environment variables.

    BITGRAIN_CACHE      folder for results that may be deleted (default ~/.cache/bitgrain)
    BITGRAIN_SELFTEST   0: do not test a kernel on its first use
    BITGRAIN_PLATFORM   KEY[:GENERATION][@host]: the platform to run on or plan for, instead of the one that the device implies

A backend's own variables are named where the backend is; it reads them through `variable`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """Folder for results that cost only time to make again."""
    return Path(variable("BITGRAIN_CACHE") or "~/.cache/bitgrain").expanduser()


def self_test_enabled() -> bool:
    """False when the user switched the first-use self-test off."""
    return variable("BITGRAIN_SELFTEST") != "0"


def variable(name: str) -> str | None:
    """The value of one environment variable, None when it is unset or empty."""
    return os.environ.get(name) or None


def platform_key() -> str | None:
    """The platform asked for, KEY[:GENERATION][@host], or None for the device's own."""
    return variable("BITGRAIN_PLATFORM")


def set_default(name: str, value: str) -> None:
    """Set an environment variable that is unset, for a library that is loaded later."""
    os.environ.setdefault(name, value)


@contextmanager
def overridden(name: str, value: str) -> Iterator[None]:
    """Set one environment variable for a while: what a package that is imported meanwhile reads."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
