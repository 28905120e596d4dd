"""Turns documents into dense rows of token ids with a loss weight per token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from problems import Document

BOS_ID, EOS_ID = 1, 2

PROMPT_WEIGHT = 0.1  # the prompt is mostly unpredictable numbers and names; the answer is what matters


class Encoded(NamedTuple):
    """Ids of one document and the loss weight of each id (as a target)."""

    ids: list[int]
    weights: list[float]


def _story_weights(prompt: list[int], answer: list[int]) -> list[float]:
    # The line break is the last id of the prompt. It has full weight: a raw prompt ends before it.
    return [0.0] + [PROMPT_WEIGHT] * (len(prompt) - 1) + [1.0] * (len(answer) + 2)


def _strip_weights(answer: list[int], equals: int, stop: int) -> list[float]:
    """Only results count in a strip of equations; the operands are drawn at random."""
    weights, result = [0.0, 0.0], False
    for token in answer:
        weights.append(float(result))
        result = token == equals or (result and token != stop)
    return [*weights, 0.0]


def encoded(tokenizer: Tokenizer, documents: list[Document]) -> list[Encoded]:
    """Encodes many documents at once (the tokenizer works in parallel)."""
    prompts = tokenizer.encode_batch([d.prompt + "\n" for d in documents], add_special_tokens=False)
    answers = tokenizer.encode_batch([d.answer for d in documents], add_special_tokens=False)
    equals, stop = (tokenizer.encode(text, add_special_tokens=False).ids[0] for text in (" =", "."))
    rows = []
    for document, prompt, answer in zip(documents, prompts, answers, strict=True):
        ids = [BOS_ID, *prompt.ids, *answer.ids, EOS_ID]
        story = bool(document.prompt)
        weights = _story_weights(prompt.ids, answer.ids) if story else _strip_weights(answer.ids, equals, stop)
        rows.append(Encoded(ids, weights))
    return rows


def packed_rows(documents: list[Encoded], length: int) -> Iterator[list[Encoded]]:
    """Groups documents into rows of at most `length` tokens, each document whole (first fit).

    Several problems in one row, one after the other, are what a conversation looks like to the chat template.
    """
    waiting = list(documents)
    while waiting:
        row: list[Encoded] = []
        room, kept = length, []
        for document in waiting:
            if len(document.ids) <= room:
                row.append(document)
                room -= len(document.ids)
            else:
                kept.append(document)
            if room < 16:  # no document is shorter
                kept.extend(waiting[len(row) + len(kept) :])
                break
        yield row
        waiting = kept


def tensors(rows: list[list[Encoded]], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights of a batch, padded at the end of each row."""
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    weights = torch.zeros(len(rows), length)
    for index, row in enumerate(rows):
        flat = [token for document in row for token in document.ids]
        ids[index, : len(flat)] = torch.tensor(flat)
        weights[index, : len(flat)] = torch.tensor([w for document in row for w in document.weights])
    return ids, weights


def batches(
    stream: Iterator[Document], tokenizer: Tokenizer, tokens: int, lengths: tuple[int, ...]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of about `tokens` tokens; the row length changes from batch to batch in turn."""
    turn = 0
    while True:
        length = lengths[turn % len(lengths)]
        turn += 1
        # Enough documents for a few batches at once, so that first fit has a choice.
        documents = [next(stream) for _ in range(4 * tokens // 70)]
        usable = [e for e in encoded(tokenizer, documents) if len(e.ids) <= length]
        rows = list(packed_rows(usable, length))
        size = tokens // length
        for start in range(0, len(rows) - size, size):  # the last, badly filled rows are dropped
            yield tensors(rows[start : start + size], length)
