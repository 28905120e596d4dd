"""Talk to a model in the terminal.  /reset forgets the conversation, /exit (or the end of input) leaves."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from bitgrain.cli.options import add_load_arguments, add_model_argument, add_sampling_arguments, load, sampling_params
from bitgrain.cli.progress import progress_bar
from bitgrain.errors import BitgrainError, RequestError

if TYPE_CHECKING:
    from bitgrain.engine.llm import LLM
    from bitgrain.engine.sampling import SamplingParams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message at the beginning")
    add_sampling_arguments(parser)
    add_load_arguments(parser)


def run(args: argparse.Namespace) -> int:
    params = sampling_params(args)
    with progress_bar("loading") as step:
        llm = load(args, step)
    with llm:
        if llm.tokenizer is None or not llm.tokenizer.has_chat_template:
            raise RequestError(
                "bitgrain chat", "the checkpoint has no chat template", "a model made for conversations", "use bitgrain generate"
            )
        return _converse(llm, params, args.system)


def _converse(llm: LLM, params: SamplingParams, system: str | None) -> int:
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    failed = False
    for line in _lines():
        if line == "/exit":
            break
        if line == "/reset":
            messages = list(opening)
            continue
        if line.startswith("/"):
            print(f"there is no {line.split()[0]}; /reset and /exit", file=sys.stderr)
            failed = True
            continue
        messages.append({"role": "user", "content": line})
        try:
            messages.append({"role": "assistant", "content": _answer(llm, messages, params)})
        except BitgrainError as error:
            messages.pop()
            failed = True
            print(f"{type(error).__name__}: {error}\n(/reset starts a new conversation)", file=sys.stderr)
    # on a terminal the user has seen the errors and gone on; a script should notice them
    return 1 if failed and not sys.stdin.isatty() else 0


def _lines() -> Iterator[str]:
    """Lines that are not empty, with a prompt where a person types them."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _answer(llm: LLM, messages: list[dict[str, str]], params: SamplingParams) -> str:
    text = ""
    for delta in llm.stream_chat(messages, params):
        text += delta.text
        sys.stdout.write(delta.text)
        sys.stdout.flush()
    print()
    return text
