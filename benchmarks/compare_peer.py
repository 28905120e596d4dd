"""One system in a process of its own, for compare.py: loads a model once, then times what each line of its input asks for.

    PYTHON benchmarks/compare_peer.py SYSTEM MODEL --threads 2 [--fidelity fast]

SYSTEM is bitgrain, torch, vllm, vllm+zentorch or openvino; PYTHON that of an environment that has it.  Input: one JSON object per
line, {"sequences": 8, "prompt": 32, "new": 33}.  Output: one per line, {"seconds": ...}: from the prompts to the last of so many
new tokens of each sequence, greedily, with no tokenizer at work; prompts are random, and those of {"seed": 1} if asked, which
adds {"tokens": [...]}, the new tokens of each sequence, to the answer.  The first line of output is {"ready": seconds of loading,
"version": of what runs}.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

FIRST = 3  # below are the tokens that begin and end texts

Timed = Callable[[list[list[int]], int], list[list[int]]]  # (prompts, how many new tokens of each) to the new tokens of each


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

    def run(prompts: list[list[int]], new: int) -> list[list[int]]:
        with torch.inference_mode():
            caches = [model.new_cache(len(prompts[0]) + new) for _ in prompts]
            steps = [step(prompts, caches, 0).tolist()]
            for at in range(len(prompts[0]), len(prompts[0]) + new - 1):
                steps.append(step([[token] for token in steps[-1]], caches, at).tolist())
            return [list(tokens) for tokens in zip(*steps, strict=True)]

    return run


def torch_products(args: argparse.Namespace) -> Timed:
    """transformers' model, whose linear modules hold what the checkpoint does, in the products that torch has for it."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    folder = Path(args.model)
    # names, norms and what is not quantized come from the checkpoint beside it
    model = AutoModelForCausalLM.from_pretrained(folder.parent / "bf16", dtype=torch.bfloat16)
    if folder.name != "bf16":
        hold_codes(model, folder)

    def run(prompts: list[list[int]], new: int) -> list[list[int]]:
        with torch.inference_mode():
            tokens, past, steps = torch.tensor(prompts), None, []
            for _ in range(new):
                out = model(tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
                tokens, past = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
                steps.append(tokens)
            return torch.cat(steps, 1).tolist()

    return run


def hold_codes(model, folder: Path) -> None:
    """Replace every linear module that the checkpoint quantizes by one with its codes and scales; activations stay bfloat16."""
    import torch
    from safetensors import safe_open

    class Fours(torch.nn.Module):
        def __init__(self, words: torch.Tensor, scale: torch.Tensor) -> None:
            super().__init__()
            codes = (words.unsqueeze(-1) >> (4 * torch.arange(8, dtype=torch.int32))) & 15  # [N, K / 8, 8], the first in the lowest
            self.group = codes.shape[1] * 8 // scale.shape[1]
            self.codes = torch._convert_weight_to_int4pack_for_cpu(codes.flatten(1), 2)
            # what is added to (code - 8) * scale is 0
            self.scale = torch.stack([scale.t(), torch.zeros_like(scale.t())], -1).contiguous()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = torch._weight_int4pack_mm_for_cpu(x.flatten(0, -2), self.codes, self.group, self.scale)
            return found.unflatten(0, x.shape[:-1])

    class Bytes(torch.nn.Module):
        def __init__(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
            super().__init__()
            self.codes, self.scale = codes, scale.flatten()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch._weight_int8pack_mm(x.flatten(0, -2), self.codes, self.scale).unflatten(0, x.shape[:-1])

    with safe_open(folder / "model.safetensors", "pt") as held:
        names = set(held.keys())
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and f"{name}.weight_scale" in names:
                stored = f"{name}.weight_packed" if f"{name}.weight_packed" in names else f"{name}.weight"
                made = (Fours if stored.endswith("packed") else Bytes)(held.get_tensor(stored), held.get_tensor(f"{name}.weight_scale"))
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, made)


def vllm(args: argparse.Namespace) -> Timed:
    """Without zentorch, even where it is installed: vLLM asks for no more than whether it can be imported."""
    sys.modules["zentorch"] = None  # type: ignore[assignment]
    return _vllm(args)


def zentorch(args: argparse.Namespace) -> Timed:
    from vllm.platforms import current_platform

    if not current_platform.is_zen_cpu():
        # vllm/platforms/__init__.py of 0.32
        raise RuntimeError("vLLM does not use zentorch here: it does where zentorch can be imported and the processor is AMD's with AVX-512")
    return _vllm(args)


def _vllm(args: argparse.Namespace) -> Timed:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{args.threads - 1}")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(
        model=args.model, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=1024, max_num_seqs=32, max_num_batched_tokens=2048,
        enable_prefix_caching=False, enforce_eager=not args.compile, disable_log_stats=True,
    )  # fmt: skip

    def run(prompts: list[list[int]], new: int) -> list[list[int]]:
        wanted = SamplingParams(temperature=0.0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False)
        done = llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], wanted, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in done]

    return run


def openvino(args: argparse.Namespace) -> Timed:
    import numpy
    import openvino
    import openvino_genai

    schedule = openvino_genai.SchedulerConfig()
    schedule.cache_size, schedule.max_num_batched_tokens, schedule.max_num_seqs, schedule.enable_prefix_caching = 2, 2048, 32, False
    pipeline = openvino_genai.ContinuousBatchingPipeline(args.model, schedule, "CPU", {"INFERENCE_NUM_THREADS": args.threads})

    def run(prompts: list[list[int]], new: int) -> list[list[int]]:
        wanted = openvino_genai.GenerationConfig()
        wanted.max_new_tokens = wanted.min_new_tokens = new
        wanted.ignore_eos, wanted.do_sample = True, False
        done = pipeline.generate([openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)) for prompt in prompts], [wanted] * len(prompts))
        return [list(answer.m_generation_ids[0]) for answer in done]

    return run


# name to (what loads it, packages whose versions say what runs)
SYSTEMS: dict[str, tuple[Callable[[argparse.Namespace], Timed], tuple[str, ...]]] = {
    "bitgrain": (bitgrain, ("bitgrain", "torch")),
    "torch": (torch_products, ("torch", "transformers")),
    "vllm": (vllm, ("vllm", "vllm-cpu", "torch")),
    "vllm+zentorch": (zentorch, ("vllm", "vllm-cpu", "zentorch", "torch")),
    "openvino": (openvino, ("openvino", "openvino-genai")),
}


def versions(packages: tuple[str, ...]) -> str:
    """Of those that are installed."""
    found = []
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--vocabulary", type=int, default=32000, help="tokens from which prompts are made")
    parser.add_argument("--fidelity", default="exact")
    parser.add_argument("--compile", action="store_true", help="vllm: compile the model first")
    args = parser.parse_args()
    # libraries write what they like to the standard output: answers go to a copy of it
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    start = time.perf_counter()
    load, packages = SYSTEMS[args.system]
    run = load(args)
    print(json.dumps({"ready": time.perf_counter() - start, "version": versions(packages)}), file=answers)
    chooser = random.Random(0)
    for line in sys.stdin:
        asked = json.loads(line)
        source = random.Random(asked["seed"]) if "seed" in asked else chooser
        prompts = [[source.randrange(FIRST, args.vocabulary) for _ in range(asked["prompt"])] for _ in range(asked["sequences"])]
        start = time.perf_counter()
        tokens = run(prompts, asked["new"])
        answer = {"seconds": time.perf_counter() - start}
        if [len(own) for own in tokens] != [asked["new"]] * asked["sequences"]:
            raise RuntimeError(f"asked for {asked['new']} tokens of each of {asked['sequences']} sequences, got {[len(own) for own in tokens]}")
        print(json.dumps({**answer, "tokens": tokens} if "seed" in asked else answer), file=answers)


if __name__ == "__main__":
    main()
