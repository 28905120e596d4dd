"""Trains the demo model on the problem stream and saves a bfloat16 checkpoint folder."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from packing import batches
from problems import FIRST_MIX, SECOND_MIX, Mix, training_documents
from tokenizer import VOCABULARY

ROW_LENGTHS = (256, 256, 256, 512)
TOKENS = 4_096  # per step
WEIGHT_DECAY = 0.05


class Stage(NamedTuple):
    """One run of the loop."""

    mix: Mix
    seed: int
    steps: int  # the length of the learning rate schedule
    stop: int  # where the run ends
    peak: float
    warmup: int
    prompt_scale: float


# The first stage teaches reading, with numbers up to 200. It is left in the middle of its schedule for stages with
# smaller numbers and many bare equations: by then almost all errors were errors of arithmetic. The second stage is
# left early too; the third one brings the learning rate down.
STAGES = {
    1: Stage(FIRST_MIX, 2_026, 9_000, 5_001, 1.5e-3, 200, 1.0),
    2: Stage(SECOND_MIX, 2_027, 4_500, 1_420, 1.0e-3, 100, 0.3),
    3: Stage(SECOND_MIX, 2_028, 2_400, 2_400, 0.9e-3, 50, 0.2),
}


def configuration(vocabulary: int) -> LlamaConfig:
    """Three million parameters; every Linear has an input size that is a multiple of 64."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def optimizer_for(model: LlamaForCausalLM) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)


def learning_rate(step: int, stage: Stage) -> float:
    """Linear warm-up, then a cosine to one hundredth of the peak."""
    if step < stage.warmup:
        return stage.peak * (step + 1) / stage.warmup
    progress = (step - stage.warmup) / max(1, stage.steps - stage.warmup)
    return stage.peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def weighted_loss(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Next-token loss, averaged by weight."""
    losses = cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    flat = weights[:, 1:].flatten()
    return (losses * flat).sum() / flat.sum()


def faded(weights: torch.Tensor, scale: float) -> torch.Tensor:
    """Scales the loss on prompts: it teaches words early and is only noise late."""
    return torch.where(weights < 1.0, weights * scale, weights)


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Writes config.json, model.safetensors and generation_config.json in bfloat16."""
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    copy.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def train(stage: Stage, model: LlamaForCausalLM, out: Path, compiled: bool) -> None:
    """The training loop."""
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    forward = torch.compile(model, dynamic=False) if compiled else model
    optimizer = optimizer_for(model)
    data = batches(training_documents(stage.seed, stage.mix), tokenizer, TOKENS, ROW_LENGTHS)
    start, shown = time.time(), 0.0
    for step in range(stage.stop):
        ids, weights = next(data)
        weights = faded(weights, stage.prompt_scale * (1.0 - step / stage.steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, stage)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = forward(input_ids=ids, use_cache=False).logits
        loss = weighted_loss(logits, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        shown = loss.item() if step == 0 else 0.95 * shown + 0.05 * loss.item()
        if step % 100 == 0:
            seconds = time.time() - start
            print(
                f"step {step} loss {shown:.4f} {seconds:.0f} s {(step + 1) * TOKENS / seconds:.0f} tokens/s", flush=True
            )
        if step % 500 == 499:
            save(model, out)
    save(model, out)


def main() -> None:
    """Runs one stage; the later ones start from what the one before wrote."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("src/bitgrain/bundled/arithmetic-bf16"))
    parser.add_argument("--stage", type=int, choices=STAGES, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", dest="compiled", action="store_false")
    arguments = parser.parse_args()
    torch.manual_seed(STAGES[arguments.stage].seed)
    torch.set_num_threads(arguments.threads)
    if arguments.stage == 1:
        model = LlamaForCausalLM(configuration(VOCABULARY))
    else:
        model = LlamaForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)
    train(STAGES[arguments.stage], model, arguments.out, arguments.compiled)


if __name__ == "__main__":
    main()
