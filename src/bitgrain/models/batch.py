"""What a forward pass is given: tokens of several sequences, one after another."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bitgrain.kvcache.cache import SequenceCache


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows [start, start + length) of a batch: the next tokens of one sequence.

    Args:
        cache: keys and values of the sequence's earlier tokens; those of these tokens are appended to it.
    """

    cache: SequenceCache
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Batch:
    """The next tokens of one or more sequences; prompts, parts of prompts and single tokens may be mixed.

    Args:
        tokens:     int64 [T], the segments' tokens one after another.
        positions:  int64 [T], each token's position in its own sequence.
        segments:   cover [0, T) without gaps, in order; no cache twice.
        logit_rows: int64 [R], rows of T whose logits are wanted, in the order of the result.
    """

    tokens: Tensor
    positions: Tensor
    segments: tuple[Segment, ...]
    logit_rows: Tensor
