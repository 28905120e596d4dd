"""A progress bar on a terminal; silence elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

Step = Callable[[int, int], None]

BAR = 30


@contextmanager
def progress_bar(title: str, stream: TextIO | None = None) -> Iterator[Step | None]:
    """A function to call with (done, total), or None where nobody looks; drawn by rich if it is installed."""
    stream = stream or sys.stderr
    if not stream.isatty():
        yield None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield _plain(title, stream)
        stream.write("\r\x1b[K")
        stream.flush()
        return
    with Progress(console=Console(file=stream), transient=True) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _plain(title: str, stream: TextIO) -> Step:
    def show(done: int, total: int) -> None:
        filled = BAR * done // max(total, 1)
        stream.write(f"\r{title} [{'#' * filled}{'.' * (BAR - filled)}] {done}/{total}")
        stream.flush()

    return show
