"""Decode steps that one kernel runs as a whole: the model described, and its batches handed over."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitgrain.kernels.decode_step import RunnableStep, StepDescription, StepRows, Undescribed
from bitgrain.layers.attention import Step
from bitgrain.models.batch import Batch

if TYPE_CHECKING:
    from bitgrain.layers.builder import ModelBuilder
    from bitgrain.models.causal_lm import CausalLM


class Decoder:
    """Runs those batches of a model that are one decode step: one new token of each sequence, with logits of all.

    Args:
        shapes: per layer (heads, entries of a head) of its keys and values.
    """

    def __init__(self, runnable: RunnableStep, shapes: tuple[tuple[int, int], ...], dtype: torch.dtype) -> None:
        self.runnable, self.shapes, self.dtype = runnable, shapes, dtype

    @classmethod
    def of(cls, model: CausalLM, builder: ModelBuilder) -> Decoder | None:
        """What runs the model's decode steps; None: its modules do, and its explanation says why."""
        step, obstacle = StepDescription(str(model.dtype).removeprefix("torch.")), ""
        try:
            model.describe_step(step)
        except Undescribed as error:
            obstacle = str(error)
        runnable = builder.decode_step(None if obstacle else step, obstacle)
        return None if runnable is None else cls(runnable, tuple(step.stores[layer] for layer in sorted(step.stores)), model.dtype)

    def stores(self, batch: Batch) -> tuple[Tensor, ...] | None:
        """Of each row, where its keys and values lie, with room for one more; None: the batch is no decode step, or a cache holds other things."""
        rows = len(batch.segments)
        if rows > self.runnable.most_rows or rows != batch.tokens.numel() or torch.compiler.is_compiling():
            return None
        if batch.logit_rows.tolist() != list(range(rows)):
            return None
        found = []
        for segment in batch.segments:
            addresses = segment.cache.addresses(self.shapes, self.dtype)
            if addresses is None:
                return None
            found.append(addresses)
        return tuple(found)

    def run(self, x: Tensor, step: Step, batch: Batch, stores: tuple[Tensor, ...]) -> Tensor:
        """[rows, V] of x's dtype for x [rows, hidden], which is overwritten; the caches hold the new tokens afterwards."""
        angles = ((step.cosine, step.sine), step.local or (step.cosine, step.sine))
        logits = self.runnable.run(StepRows(x, angles, stores, tuple(segment.cache.length for segment in batch.segments)))
        for segment in batch.segments:
            segment.cache.advance()
        return logits
