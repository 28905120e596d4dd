"""What a forward pass is given: tokens of several sequences, one after another."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bitgrain.errors import RequestError
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


def check_batch(batch: Batch, vocab_size: int) -> None:
    """Raise RequestError unless tokens, positions, segments and caches fit each other; mends caches that a failed step left uneven."""
    count = batch.tokens.numel()
    _check_range("tokens", batch.tokens, vocab_size)
    expected: list[int] = []
    for segment in batch.segments:
        done = segment.cache.length
        segment.cache.truncate(done)
        if segment.start != len(expected) or segment.length < 1 or done + segment.length > segment.cache.max_tokens:
            found = f"{segment.length} rows from {segment.start}, after {done} of {segment.cache.max_tokens} cached tokens"
            needed = f"at least one row from {len(expected)}, within the cache's room"
            raise RequestError("batch: segments", found, needed, "correct the batch")
        expected += range(done, done + segment.length)
    repeated = len({id(s.cache) for s in batch.segments}) < len(batch.segments)
    if repeated or len(expected) != count or batch.positions.tolist() != expected:
        found = "one cache twice" if repeated else "positions or rows that do not continue the caches"
        raise RequestError("batch", found, "the next tokens of each sequence, each sequence once", "correct the batch")
    if batch.logit_rows.numel():
        _check_range("logit_rows", batch.logit_rows, count)


def _check_range(name: str, values: Tensor, size: int) -> None:
    if not values.numel():
        raise RequestError(f"batch: {name}", "none", "at least one", "correct the batch")
    low, high = (int(v) for v in values.aminmax())
    if low < 0 or high >= size:
        raise RequestError(f"batch: {name}", f"values from {low} to {high}", f"values from 0 to {size - 1}", "correct the batch")
