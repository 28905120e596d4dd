"""Systems that compare.py starts, asks and ends: one process per system, or llama.cpp's programs anew for each figure."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any, Protocol

HERE = Path(__file__).resolve().parent
PROMPT = 32
ERROR = re.compile(r"(\w*(Error|Exception|Failure)|[Ee]rror)\b: *\S")
SEED, PROMPTS = 1, 16  # of the first tokens that systems are compared by
TRIES = 3  # of llama-batched-bench
SPARE = 2 << 30  # bytes of caches and programs, beside a model's weights


class Failed(Exception):
    """A system that does not run, with the reason."""


class NoRow(Failed):
    """llama-batched-bench ended well but printed no figure: seen on a busy machine, where a second run did."""


class Disturbed(Exception):
    """A figure that cannot be: the whole took no longer than its beginning."""


class System(Protocol):
    version: str

    def rate(self, what: str, count: int, new: int) -> float:
        """Tokens per second of "decode" of so many sequences, or "prefill" of so many tokens."""
        ...

    def first_tokens(self) -> list[int] | None:
        """Of the prompts of SEED; None where the system does not tell."""
        ...

    def close(self) -> None: ...


def reason(said: str) -> str:
    """The line of a log that says what went wrong: the last that names an error, else the last."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if ERROR.search(line)), lines[-1] if lines else "nothing said")[:300]


def ended(status: int) -> str:
    return f"stopped with status {status}" if status >= 0 else f"ended by {signal.Signals(-status).name}{' (out of memory?)' if status == -signal.SIGKILL else ''}"


def check_memory(needed: int, meminfo: str) -> None:
    """Refuse a system that might not fit: the kernel would end whichever process it likes.

    Args:
        needed:  bytes.
        meminfo: text of /proc/meminfo; anything else checks nothing.
    """
    found = re.search(r"MemAvailable: *(\d+) kB", meminfo)
    if found and int(found[1]) * 1024 < needed:
        raise Failed(f"needs about {needed / 1e9:.1f} GB of memory, {int(found[1]) * 1024 / 1e9:.1f} GB are free")


class Process:
    """compare_peer.py with one system; see there.

    Args:
        words:  its arguments but the number of threads.
        needed: bytes of memory, at a guess.
        log:    file for what the system says.
        limits: seconds that loading, and an answer, may take.
    """

    def __init__(self, python: Path, words: list[str], threads: int, needed: int, log: Path, limits: tuple[float, float]) -> None:
        with contextlib.suppress(OSError):
            check_memory(needed, Path("/proc/meminfo").read_text())
        self.log, self.limit = log, limits[1]
        self.lines: queue.Queue[str] = queue.Queue()
        try:
            with log.open("w") as errors:
                self.process = subprocess.Popen(
                    [python, HERE / "compare_peer.py", *words, "--threads", str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                    env={**os.environ, "OMP_NUM_THREADS": str(threads)}, start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            raise Failed(f"could not be started: {error}") from error
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()
        try:
            self.version = str(self._answer(limits[0], "loading")["version"])
        except Failed:
            self.close()
            raise

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as said:
            for line in said:
                self.lines.put(line)
        self.lines.put("")

    def _answer(self, limit: float, doing: str) -> dict[str, Any]:
        try:
            line = self.lines.get(timeout=limit)
        except queue.Empty:
            self.close()
            raise Failed(f"{doing} took longer than {limit:.0f} s (see {self.log})") from None
        if not line:
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)  # its status is kept, and its number, for close()
            self.close()
            raise Failed(f"{ended(self.process.returncode)} while {doing}: {reason(self.log.read_text(errors='replace'))} (see {self.log})")
        found: dict[str, Any] = json.loads(line)
        return found

    def _ask(self, sequences: int, prompt: int, new: int, **more: int) -> dict[str, Any]:
        if self.process.returncode is not None:
            raise Failed("has ended")
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer, and the log says why
            self.process.stdin.write(json.dumps({"sequences": sequences, "prompt": prompt, "new": new, **more}) + "\n")
            self.process.stdin.flush()
        return self._answer(self.limit, f"generating {new} tokens of each of {sequences} sequences behind {prompt}")

    def rate(self, what: str, count: int, new: int) -> float:
        if what == "prefill":
            return float(count / self._ask(1, count, 1)["seconds"])
        taken = self._ask(count, PROMPT, new)["seconds"] - self._ask(count, PROMPT, 1)["seconds"]
        if taken <= 0:
            raise Disturbed
        return float(count * (new - 1) / taken)

    def first_tokens(self) -> list[int] | None:
        return [own[0] for own in self._ask(PROMPTS, PROMPT, 1, seed=SEED)["tokens"]]

    def close(self) -> None:
        """End it and its children; again is allowed."""
        if self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # it leads a session of its own
            self.process.wait()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.listener.join()


class LlamaCpp:
    """llama.cpp's own programs, started anew for each figure.

    Args:
        repack: whether matrices are interleaved for the processor, its default; for some the kernels for plain ones are faster.
        limit:  seconds that one run may take.
    """

    def __init__(self, folder: Path, model: Path, threads: int, repack: bool, limit: float) -> None:
        for needed in (folder / "llama-bench", folder / "llama-batched-bench", model):
            if not needed.exists():
                raise Failed(f"{needed} is not there")
        self.folder, self.model, self.threads, self.repack, self.limit = folder, model, threads, repack, limit
        self.version = "llama.cpp of unknown version"

    def _run(self, program: str, *words: str) -> str:
        environment = {**os.environ, "LD_LIBRARY_PATH": f"{self.folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"}
        command = [self.folder / program, "-m", self.model, "-t", str(self.threads), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=self.limit)
        except subprocess.TimeoutExpired:
            raise Failed(f"{program} took longer than {self.limit:.0f} s") from None
        except OSError as error:
            raise Failed(f"{program} could not be started: {error}") from error
        if done.returncode:
            raise Failed(f"{program} {ended(done.returncode)}: {reason(done.stderr)}")
        return done.stdout

    def rate(self, what: str, count: int, new: int) -> float:
        if what == "decode" and count > 1:
            context = str(max(4096, 2 * count * (PROMPT + new)))
            words = ["-c", context, "-b", "2048", "-ub", "512", "-npp", str(PROMPT), "-ntg", str(new), "-npl", str(count), *([] if self.repack else ["--no-repack"])]
            for _ in range(TRIES - 1):
                with contextlib.suppress(NoRow):
                    return batched_rate(self._run("llama-batched-bench", *words))
            return batched_rate(self._run("llama-batched-bench", *words))
        asked = ["-p", str(count), "-n", "0"] if what == "prefill" else ["-p", "0", "-n", str(new)]
        said = self._run("llama-bench", *asked, "--repack", str(int(self.repack)), "-r", "1", "-o", "json")
        try:
            row = json.loads(said)[0]
            self.version = f"llama.cpp {row.get('build_number', '?')} ({row.get('build_commit', '?')})"
            return float(row["avg_ts"])
        except (ValueError, LookupError) as error:
            raise Failed(f"llama-bench printed no figure: {said.strip()[-200:]}") from error

    def first_tokens(self) -> list[int] | None:
        return None

    def close(self) -> None:
        pass


def batched_rate(table: str) -> float:
    """Tokens per second of decoding, from what llama-batched-bench prints."""
    rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in table.splitlines() if line.startswith("|")]
    head = next((row for row in rows if "S_TG t/s" in row), None)
    if head is None or not rows[-1][0].isdigit():
        raise NoRow(f"llama-batched-bench printed no row: {table.strip()[-200:]}")
    return float(rows[-1][head.index("S_TG t/s")])
