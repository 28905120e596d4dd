"""Decode and prefill of whole models: tokens per second, and shares of what the machine does at best."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bitgrain.bench.limits import Machine, limit_of, seconds
from bitgrain.bench.sampling import Sample, sample
from bitgrain.layers.experts import KernelExperts
from bitgrain.layers.linear import Linear
from bitgrain.layers.sparse_mlp import SparseMLP
from bitgrain.models.batch import Batch, Segment
from bitgrain.models.language_model import LanguageModel


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One measurement of a model.

    Args:
        what:       "decode" or "prefill".
        tokens:     that one call brings forward: sequences (decode), or tokens of the prompt.
        context:    tokens in each cache at the start.
        nbytes:     of the matrices that one call reads, experts that are not chosen left out by their expected share.
        operations: multiplications and additions of one call's products.
        peak:       operations per second, if each product ran at the limit of its arithmetic.
        inside:     share of a call's time that kernels take, measured by itself.
    """

    what: str
    tokens: int
    context: int
    nbytes: int
    operations: float
    taken: Sample
    peak: float
    inside: float

    def as_dict(self) -> dict[str, Any]:
        median = self.taken.median
        return {
            "what": self.what, "tokens": self.tokens, "context": self.context, "tokens_per_s": round(self.tokens / median, 2), "ms": round(median * 1e3, 3),
            "bytes": self.nbytes, "GB_per_s": round(self.nbytes / median / 1e9, 2), "of_read": round(self.taken.share_of_read(self.nbytes), 3),
            "GFLOP_per_s": round(self.operations / median / 1e9, 2), "of_arithmetic": round(self.operations / median / self.peak, 3) if self.peak else 0.0,
            "in_kernels": round(self.inside, 3), "read_GB_per_s": round(self.taken.read / 1e9, 1), "rejected": self.taken.rejected, "disturbed": self.taken.is_disturbed,
        }  # fmt: skip


def measure_decode(model: LanguageModel, sequences: int, context: int, steps: int, machine: Machine) -> ModelRow:
    """Steps of so many sequences, one token each, behind caches of `context` tokens and more."""
    state = _Decoding(model, sequences, context, steps)
    state.round()
    taken = sample(state.round, machine)
    read, operations = _work(model, sequences)
    return ModelRow("decode", sequences, context, read, operations, taken, _peak(model, sequences, machine), share_in_kernels(model, partial(state.steps_behind, state.contexts())))


class _Decoding:
    """Rounds of decode steps; each round begins behind the same context."""

    def __init__(self, model: LanguageModel, sequences: int, context: int, steps: int) -> None:
        self.model, self.sequences, self.context, self.steps = model, sequences, context, steps

    def round(self) -> list[float]:
        """Seconds of each step."""
        return self.steps_behind(self.contexts())

    def contexts(self) -> list[Any]:
        """A cache for each sequence, with the context in it."""
        caches = [self.model.new_cache(self.context + self.steps) for _ in range(self.sequences)]
        for cache in caches if self.context else ():
            _read_prompt(self.model, cache, self.context)
        return caches

    def steps_behind(self, caches: list[Any]) -> list[float]:
        segments = tuple(Segment(cache, place, 1) for place, cache in enumerate(caches))
        tokens, rows = torch.zeros(self.sequences, dtype=torch.long), torch.arange(self.sequences)

        def step(at: int) -> None:
            self.model.forward(Batch(tokens, torch.full((self.sequences,), at), segments, rows)).argmax(-1)

        return [seconds(partial(step, at)) for at in range(self.context, self.context + self.steps)]


def measure_prefill(model: LanguageModel, tokens: int, repeats: int, machine: Machine) -> ModelRow:
    """A prompt of so many tokens, read at once into an empty cache; logits of its last token."""

    def times() -> list[float]:
        return [seconds(partial(_read_prompt, model, cache, tokens)) for cache in (model.new_cache(tokens) for _ in range(repeats))]

    times()
    taken = sample(times, machine)
    read, operations = _work(model, tokens, logits=1)
    return ModelRow("prefill", tokens, 0, read, operations, taken, _peak(model, tokens, machine, logits=1), share_in_kernels(model, times))


def _read_prompt(model: LanguageModel, cache: Any, tokens: int) -> None:
    model.forward(Batch(torch.arange(tokens) % 97, torch.arange(tokens), (Segment(cache, 0, tokens),), torch.tensor([tokens - 1])))


def _work(model: LanguageModel, rows: int, logits: int | None = None) -> tuple[int, float]:
    """(bytes of matrices, operations) of one call with so many rows, `logits` of them with logits (None: all)."""
    parts = list(_parts(model, rows, logits))
    return int(sum(nbytes for _, nbytes, _ in parts)), sum(operations for _, _, operations in parts)


def _peak(model: LanguageModel, rows: int, machine: Machine, logits: int | None = None) -> float:
    """Operations per second of the same call, if each product took as long as its arithmetic needs at best; 0 where that is unknown."""
    peaks, total, at_best = machine.peaks(), 0.0, 0.0
    of_experts = {id(s.kernel): s for s in model.selections.values() if s.problem.operation == "experts"}
    for module, _, operations in _parts(model, rows, logits):
        selection = model.selections.get(getattr(module, "name", "")) or of_experts[id(module.kernel)]
        _, peak = limit_of(selection.fidelity, selection.problem.weight, selection.problem.activation, peaks)
        if not peak:
            return 0.0
        total, at_best = total + operations, at_best + operations / peak
    return total / at_best if at_best else 0.0


def _parts(model: LanguageModel, rows: int, logits: int | None) -> Iterator[tuple[Linear | KernelExperts, float, float]]:
    """(module, bytes, operations) of every product; see _work()."""
    chosen = _of_experts(model)
    for module in model.modules():
        if isinstance(module, Linear):
            n, k = module.prepared.shape
            own = rows if logits is None or n != model.vocab_size else logits
            # an expert sees its share of the rows, and is read if any row chose it
            share = chosen.get(id(module), 1.0)
            yield module, module.nbytes * (1 - (1 - share) ** own), 2.0 * own * share * n * k
        elif isinstance(module, KernelExperts):
            share, experts = chosen[id(module)], module.prepared.experts
            elements = sum(part.shape[0] * part.shape[1] for expert in experts for part in (expert.gate_up, expert.down))
            yield module, module.nbytes * (1 - (1 - share) ** rows), 2.0 * rows * share * elements


def _of_experts(model: LanguageModel) -> dict[int, float]:
    """Modules that only a share of the rows goes through: id to that share, if all experts are chosen equally often."""
    found: dict[int, float] = {}
    for layer in (module for module in model.modules() if isinstance(module, SparseMLP)):
        share = layer.router.routing.per_token / layer.router.routing.count
        found |= {id(part): share for part in layer.experts.modules() if isinstance(part, (Linear, KernelExperts))}
    return found


def share_in_kernels(model: LanguageModel, run: Callable[[], list[float]]) -> float:
    """Time inside the model's kernels over the time that `run` says its calls took; timing costs a microsecond per call of a kernel."""
    with kernel_times(model) as inside:
        total = sum(run())
        return inside[0] / total if total else 0.0


@contextmanager
def kernel_times(model: LanguageModel) -> Iterator[list[float]]:
    """One number that grows by the seconds that each call of any of the model's kernels takes."""
    chosen = (s.kernel for s in (*model.selections.values(), *model.step_selections.values()))
    kernels = {id(kernel): kernel for kernel in chosen if hasattr(kernel, "apply")}  # not where modules run one by one
    inside = [0.0]

    def timed(apply: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            start = time.perf_counter()
            result = apply(*given)
            inside[0] += time.perf_counter() - start
            return result

        return call

    for kernel in kernels.values():
        kernel.apply = timed(kernel.apply)
    try:
        yield inside
    finally:
        for kernel in kernels.values():
            del kernel.apply
