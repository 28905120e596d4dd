"""One system in a process of its own, for compare.py: loads a model once, then times what each line of its input asks for.

    PYTHON benchmarks/compare_peer.py SYSTEM MODEL --threads 2 [--fidelity fast]

SYSTEM is bitgrain, transformers, vllm or openvino; PYTHON that of an environment that has it.  Input: one JSON object per line,
{"sequences": 8, "prompt": 32, "new": 33}.  Output: one per line, {"seconds": ...}: from the prompts to the last of so many new
tokens of each sequence, greedily, with no tokenizer at work.  The first line of output is {"ready": seconds of loading}.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

FIRST = 3  # below are the tokens that begin and end texts

Timed = Callable[[list[list[int]], int], None]  # (prompts, new tokens of each)


def bitgrain(args: argparse.Namespace) -> Timed:
    import torch

    from bitgrain import load_model
    from bitgrain.models.batch import Batch, Segment

    torch.set_num_threads(args.threads)
    model = load_model(args.model, dtype="bfloat16", fidelity=args.fidelity)

    def step(rows: list[list[int]], caches: list, at: int):
        lengths = [len(row) for row in rows]
        starts = [sum(lengths[:i]) for i in range(len(rows))]
        segments = tuple(Segment(cache, start, length) for cache, start, length in zip(caches, starts, lengths, strict=True))
        positions = torch.cat([torch.arange(at, at + length) for length in lengths])
        tokens = torch.tensor([token for row in rows for token in row])
        last = torch.tensor([start + length - 1 for start, length in zip(starts, lengths, strict=True)])
        return model.forward(Batch(tokens, positions, segments, last)).argmax(-1)

    def run(prompts: list[list[int]], new: int) -> None:
        with torch.inference_mode():
            caches = [model.new_cache(len(prompts[0]) + new) for _ in prompts]
            chosen = step(prompts, caches, 0)
            for at in range(len(prompts[0]), len(prompts[0]) + new - 1):
                chosen = step([[token] for token in chosen.tolist()], caches, at)

    return run


def transformers(args: argparse.Namespace) -> Timed:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)

    def run(prompts: list[list[int]], new: int) -> None:
        with torch.inference_mode():
            tokens, past = torch.tensor(prompts), None
            for _ in range(new):
                out = model(tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
                tokens, past = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values

    return run


def vllm(args: argparse.Namespace) -> Timed:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{args.threads - 1}")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(
        model=args.model, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=1024, max_num_seqs=32, max_num_batched_tokens=2048,
        enable_prefix_caching=False, enforce_eager=not args.compile, disable_log_stats=True,
    )  # fmt: skip

    def run(prompts: list[list[int]], new: int) -> None:
        wanted = SamplingParams(temperature=0.0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False)
        llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], wanted, use_tqdm=False)

    return run


def openvino(args: argparse.Namespace) -> Timed:
    import numpy
    import openvino
    import openvino_genai

    schedule = openvino_genai.SchedulerConfig()
    schedule.cache_size, schedule.max_num_batched_tokens, schedule.max_num_seqs, schedule.enable_prefix_caching = 2, 2048, 32, False
    pipeline = openvino_genai.ContinuousBatchingPipeline(args.model, schedule, "CPU", {"INFERENCE_NUM_THREADS": args.threads})

    def run(prompts: list[list[int]], new: int) -> None:
        wanted = openvino_genai.GenerationConfig()
        wanted.max_new_tokens = wanted.min_new_tokens = new
        wanted.ignore_eos, wanted.do_sample = True, False
        pipeline.generate([openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)) for prompt in prompts], [wanted] * len(prompts))

    return run


SYSTEMS: dict[str, Callable[[argparse.Namespace], Timed]] = {"bitgrain": bitgrain, "transformers": transformers, "vllm": vllm, "openvino": openvino}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--fidelity", default="exact")
    parser.add_argument("--compile", action="store_true", help="vllm: compile the model first")
    args = parser.parse_args()
    # libraries write what they like to the standard output: answers go to a copy of it
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    start = time.perf_counter()
    run = SYSTEMS[args.system](args)
    print(json.dumps({"ready": time.perf_counter() - start}), file=answers)
    chooser, vocabulary = random.Random(0), json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = [[chooser.randrange(FIRST, vocabulary) for _ in range(asked["prompt"])] for _ in range(asked["sequences"])]
        start = time.perf_counter()
        run(prompts, asked["new"])
        print(json.dumps({"seconds": time.perf_counter() - start}), file=answers)


if __name__ == "__main__":
    main()
