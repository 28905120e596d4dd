"""Complete one prompt and print the text."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from bitgrain.cli.options import add_load_arguments, add_model_argument, add_sampling_arguments, load, sampling_params
from bitgrain.cli.progress import progress_bar

if TYPE_CHECKING:
    from bitgrain.engine.llm import LLM
    from bitgrain.engine.sampling import SamplingParams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    parser.add_argument("--stream", action=argparse.BooleanOptionalAction, default=True, help="print text as it comes (default: yes)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead")
    add_sampling_arguments(parser)
    add_load_arguments(parser)


def run(args: argparse.Namespace) -> int:
    params = sampling_params(args)
    with progress_bar("loading") as step:
        llm = load(args, step)
    with llm:
        if args.json:
            print(_as_json(llm, args.prompt, params))
        elif args.stream:
            for delta in llm.stream(args.prompt, params):
                sys.stdout.write(delta.text)
                sys.stdout.flush()
            print()
        else:
            print(llm.generate(args.prompt, params)[0].text)
    return 0


def _as_json(llm: LLM, prompt: str, params: SamplingParams) -> str:
    done = llm.generate(prompt, params)[0]
    return json.dumps(
        {
            "prompt": done.prompt,
            "text": done.text,
            "token_ids": list(done.token_ids),
            "finish_reason": done.finish_reason,
            "matched": done.matched,
            "prompt_tokens": done.prompt_tokens,
            "completion_tokens": done.completion_tokens,
        },
        ensure_ascii=False,
    )
