"""Chooses the next token of every sequence from its logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitgrain.engine.sampling import SamplingParams
from bitgrain.errors import BitgrainError, RunError


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probability of a chosen token, and of the most probable ones as (token id, log-probability), largest first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Sampled:
    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(slots=True)
class SamplerState:
    """What sampling one request needs between steps: its own random stream, and its counts if penalties are on."""

    params: SamplingParams
    prompt: Sequence[int]
    generator: torch.Generator = field(default_factory=torch.Generator)
    generated: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if self.params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.params.seed)

    @property
    def is_plain_greedy(self) -> bool:
        return self.params.is_greedy and not self.params.has_penalties and self.params.logprobs is None


def sample(logits: Tensor, states: Sequence[SamplerState]) -> list[Sampled | BitgrainError]:
    """One token per row; every row depends on its own logits and its own generator alone.

    Args:
        logits: float32 [R, V]; not changed.
        states: R of them, in the order of the rows.
    Returns:
        per row the token, or the error that concerns this row only.
    """
    best = logits.argmax(dim=-1)
    # NaN and infinity are the largest values to argmax, so looking at the winner finds them
    finite = torch.isfinite(logits.gather(1, best[:, None]))[:, 0].tolist()
    chosen = best.tolist()
    rows = [i for i, state in enumerate(states) if not state.is_plain_greedy and finite[i]]
    # one transfer for all rows that need more than the largest logit; the generators live on the host
    host = dict(zip(rows, logits[torch.tensor(rows, device=logits.device)].to(states[0].generator.device), strict=True)) if rows else {}
    results: list[Sampled | BitgrainError] = []
    for i, state in enumerate(states):
        if not finite[i]:
            results.append(_not_finite())
        elif i in host:
            results.append(_sample_row(host[i], state))
        else:
            results.append(Sampled(chosen[i]))
        result = results[-1]
        if isinstance(result, Sampled) and state.params.has_penalties:
            state.generated[result.token_id] += 1
    return results


def _not_finite() -> RunError:
    return RunError(
        "model output",
        "the logits hold NaN or infinity",
        "finite logits",
        "check the checkpoint's scales and the compute dtype (a 16-bit float may overflow; try --dtype float32)",
    )


def _sample_row(row: Tensor, state: SamplerState) -> Sampled:
    params = state.params
    adjusted = _penalize(row, state) if params.has_penalties else row
    token = int(adjusted.argmax()) if params.is_greedy else _draw(adjusted, params, state.generator)
    return Sampled(token, None if params.logprobs is None else _logprob(row, token, params.logprobs))


def _penalize(row: Tensor, state: SamplerState) -> Tensor:
    """A copy of `row` with the three penalties applied."""
    params, row = state.params, row.clone()
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({*state.prompt, *state.generated}), dtype=torch.int64)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if state.generated:
        ids = torch.tensor(list(state.generated.keys()), dtype=torch.int64)
        counts = torch.tensor(list(state.generated.values()), dtype=row.dtype)
        row[ids] -= params.frequency_penalty * counts + params.presence_penalty
    return row


def _draw(row: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Inverse transform sampling: exactly one random number per token, whatever the filters leave."""
    uniform = float(torch.rand((), generator=generator, dtype=torch.float64))
    ids: Tensor | None = None
    if 0 < params.top_k < row.numel():
        row, ids = row.topk(params.top_k)
    elif params.top_p < 1:
        row, ids = row.sort(descending=True, stable=True)
    # the maximum is subtracted before the division, so that a tiny temperature cannot overflow
    probs = torch.softmax((row.double() - row.max()) / params.temperature, dim=-1)
    if params.top_p < 1:
        # a token is kept if the mass before it is still below top_p
        probs = torch.where(probs.cumsum(-1) - probs < params.top_p, probs, 0.0)
    if params.min_p > 0:
        probs = torch.where(probs >= params.min_p * probs.max(), probs, 0.0)
    mass = probs.cumsum(-1)
    index = int(torch.searchsorted(mass, uniform * float(mass[-1]), right=True))
    index = min(index, int(probs.nonzero()[-1]))  # rounding may point past the last token that is left
    return index if ids is None else int(ids[index])


def _logprob(row: Tensor, token: int, count: int) -> TokenLogprob:
    values = torch.log_softmax(row, dim=-1)
    largest, ids = values.topk(min(count, values.numel()))
    return TokenLogprob(token, float(values[token]), tuple(zip(ids.tolist(), largest.tolist(), strict=True)))
