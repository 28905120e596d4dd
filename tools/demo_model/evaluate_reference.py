"""Measures the bundled checkpoints with transformers in float32 on dequantized weights.

The W8A8 checkpoint is run with its activation quantization: per token, symmetric, scale = amax / 127.5.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from problems import final_number
from quantize import unpack_int4

CHECKPOINTS = ("arithmetic-bf16", "arithmetic-w4a16", "arithmetic-w8a8")
NEW_TOKENS = 120
BATCH = 125


def dequantized(folder: Path) -> tuple[dict[str, Tensor], bool]:
    """Float weights of a folder, and whether its activations are quantized."""
    weights: dict[str, Tensor] = {}
    stored = load_file(folder / "model.safetensors")
    eight_bit = False
    for name, tensor in stored.items():
        stem = name.removesuffix("_packed")
        if name.endswith("_packed"):
            codes, scale = unpack_int4(tensor), stored[f"{stem}_scale"].float()
            weights[stem] = codes * scale.repeat_interleave(codes.shape[1] // scale.shape[1], 1)
        elif tensor.dtype == torch.int8:
            weights[name] = tensor.float() * stored[f"{name}_scale"].float()
            eight_bit = True
        elif not name.endswith(("_scale", "_shape")):
            weights[name] = tensor.float()
    return weights, eight_bit


def rounded_activations(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Forward hook: what dynamic per-token int8 does to the input of a Linear."""
    values = inputs[0]
    scale = (values.abs().amax(-1, keepdim=True) / 127.5).clamp_min(torch.finfo(torch.float32).eps)
    return ((values / scale).clamp(-128, 127).round() * scale,)


def reference_model(folder: Path) -> LlamaForCausalLM:
    """The float32 model that a folder stands for."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings)).float().eval()
    weights, eight_bit = dequantized(folder)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    if eight_bit:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                module.register_forward_pre_hook(rounded_activations)
    return model


class Prompter:
    """Turns a problem into token ids the two ways users send it."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.chat = AutoTokenizer.from_pretrained(folder)

    def ids(self, problem: str, way: str) -> list[int]:
        """`raw`: the bare text. `chat`: one user message through the chat template."""
        if way == "raw":
            return self.tokenizer.encode(problem).ids
        messages = [{"role": "user", "content": problem}]
        text = self.chat.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.tokenizer.encode(text, add_special_tokens=False).ids


@torch.no_grad()
def answers(model: LlamaForCausalLM, prompter: Prompter, problems: list[str], way: str) -> list[str]:
    """Greedy answers, in batches padded on the left."""
    texts = []
    for start in range(0, len(problems), BATCH):
        rows = [prompter.ids(problem, way) for problem in problems[start : start + BATCH]]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        texts += [prompter.tokenizer.decode(row[width:].tolist(), skip_special_tokens=True) for row in output]
    return texts


def measure(folder: Path, rows: list[dict[str, str]], show: int) -> dict[str, float]:
    """Percent of problems whose final number is right, for both ways of prompting."""
    model, prompter = reference_model(folder), Prompter(folder)
    problems = [row["problem"] for row in rows]
    result = {}
    for way in ("raw", "chat"):
        texts = answers(model, prompter, problems, way)
        wrong = [(row, text) for row, text in zip(rows, texts, strict=True) if final_number(text) != row["answer"]]
        result[way] = round(100 * (1 - len(wrong) / len(rows)), 1)
        for row, text in wrong[:show]:
            print(f"  {way} wrong: {row['problem']!r} wants {row['answer']}, got {text!r}")
    return result


def main() -> None:
    """Measures every checkpoint and writes accuracy.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundled", type=Path, default=Path("src/bitgrain/bundled"))
    parser.add_argument("--checkpoints", nargs="*", default=CHECKPOINTS)
    parser.add_argument("--handwritten", type=Path, default=Path(__file__).parent / "handwritten.jsonl")
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print per measurement")
    parser.add_argument("--write", action="store_true", help="write accuracy.json into the bundled folder")
    arguments = parser.parse_args()
    sets = {"heldout": arguments.bundled / "heldout.jsonl", "handwritten": arguments.handwritten}
    report: dict[str, object] = {"metric": "percent of final numbers right, greedy decoding"}
    for label, path in sets.items():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        figures: dict[str, object] = {"problems": len(rows)}
        for name in arguments.checkpoints:
            figures[name] = measure(arguments.bundled / name, rows, arguments.show)
            print(label, name, figures[name], flush=True)
        report[label] = figures
    if arguments.write:
        (arguments.bundled / "accuracy.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
