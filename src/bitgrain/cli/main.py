"""`bitgrain COMMAND …`: finds the command, runs it, and turns errors into messages and exit statuses.

0    done
1    refused or failed, with the reason in four parts on stderr
2    the command line itself is wrong
130  interrupted
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Protocol

import bitgrain
from bitgrain.cli.waiting import choose_waiting
from bitgrain.errors import BitgrainError, MissingDependencyError

USAGE_ERROR, INTERRUPTED = 2, 130

# command -> (module, one line of help); a module is imported only when its command is called
COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("bitgrain.cli.serve", "HTTP server: /generate, OpenAI endpoints, a page to chat"),
    "generate": ("bitgrain.cli.generate", "one completion"),
    "chat": ("bitgrain.cli.chat", "a conversation in the terminal"),
    "inspect": ("bitgrain.cli.inspect", "what a checkpoint holds: the plan, from headers alone"),
    "explain": ("bitgrain.cli.explain", "which kernel each module gets, and why not the others"),
    "doctor": ("bitgrain.cli.doctor", "this machine in one block: platforms, features, kernels"),
    "bench": ("bitgrain.cli.bench", "speed of kernels and models, as shares of this machine's limits"),
    "formats": ("bitgrain.cli.formats", "the support matrix"),
    "conformance": ("bitgrain.cli.conformance", "a backend's acceptance test: its kernels against the definition"),
}


class Command(Protocol):
    """What a command's module has: its docstring is the help text."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if words else USAGE_ERROR
    if words[0] in ("-V", "--version"):
        print(f"bitgrain {bitgrain.__version__}")
        return 0
    if words[0] not in COMMANDS:
        return _unknown(words[0])
    try:
        return _run(words[0], words[1:])
    except BitgrainError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except (ImportError, OSError, RuntimeError) as error:
        if not _while_importing_torch(error):
            raise
        why = f"{type(error).__name__}: {error}" + (f" ({type(error.__cause__).__name__}: {error.__cause__})" if error.__cause__ else "")
        refused = MissingDependencyError("torch", f"importing it failed: {why}", "a torch that can be imported", "mend or uninstall the package that the reason names")
        print(f"MissingDependencyError: {refused}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # the reader of our output has left (`| head`); a second failure at exit would print a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _while_importing_torch(error: BaseException) -> bool:
    """Whether it was raised inside torch's own import, which loads the packages of further devices."""
    frames, step = [], error.__traceback__
    while step is not None:
        frames.append(step.tb_frame)
        step = step.tb_next
    return any(frame.f_globals.get("__name__") == "torch" and frame.f_code.co_name == "<module>" for frame in frames)


def _run(name: str, words: list[str]) -> int:
    choose_waiting(name)
    command: Command = import_module(COMMANDS[name][0])
    # abbreviations are off: a new option must never change what an old command line means
    parser = argparse.ArgumentParser(
        prog=f"bitgrain {name}", description=command.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    command.add_arguments(parser)
    try:
        args = parser.parse_args(words)
    except SystemExit as stop:  # argparse has printed its message
        return int(stop.code or 0)
    return command.run(args)


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        ["usage: bitgrain COMMAND [options]", "", *rows, "", "bitgrain COMMAND --help tells a command's options.", "bitgrain --version"]
    )


def _unknown(word: str) -> int:
    near = difflib.get_close_matches(word, COMMANDS, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    print(f"bitgrain: there is no command {word!r}{hint}\n\n{_help()}", file=sys.stderr)
    return USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())
