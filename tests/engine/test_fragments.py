"""Dividing text at special tokens, and merging by scores."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from bitgrain.checkpoint.described_tokenizer import PieceScores, SpecialToken
from bitgrain.engine.fragments import FragmentEncoder, ScoreMerger
from bitgrain.errors import RequestError


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def merged_by_search(text: str, ids: dict[str, int], values: tuple[float, ...]) -> list[str]:
    """The same merging without heap or cache: the best pair of all neighbours, again and again."""
    pieces = list(text)
    while True:
        pairs = [(-values[ids[a + b]], i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in ids]
        if not pairs:
            return pieces
        _, at = min(pairs)
        pieces[at : at + 2] = ["".join(pieces[at : at + 2])]


@pytest.mark.parametrize("inner_space", [False, True])
def test_merging_equals_a_search_over_all_neighbours(inner_space):
    rng = random.Random(7)
    tokens = ["▁", "a", "b", "c"]
    while len(tokens) < 120:
        joined = rng.choice(tokens) + rng.choice(tokens)
        if len(joined) < 7 and joined not in tokens and (inner_space or "▁" not in joined.lstrip("▁")):
            tokens.append(joined)
    ids = {token: i for i, token in enumerate(tokens)}
    values = tuple(float(rng.randint(-6, 0)) for _ in tokens)
    merger = ScoreMerger(PieceScores(ids, values, "▁", "▁", None), "test")
    for _ in range(300):
        text = "".join(rng.choice("aab bc ") for _ in range(rng.randint(1, 30)))
        assert merger(text) == [ids[piece] for piece in merged_by_search("▁" + text.replace(" ", "▁"), ids, values)]


def test_special_tokens_take_their_text_in_the_order_of_the_search():
    encode = FragmentEncoder((SpecialToken("bcd", -1, False), SpecialToken("ab", -2, False)), letters)
    assert encode("abcd", True) == [ord("a"), -1]
    assert encode("abab cd", True) == [-2, -2, *letters(" cd")]
    assert encode("", True) == []


def test_control_tokens_stay_letters_where_they_are_not_to_be_parsed():
    encode = FragmentEncoder((SpecialToken("<c>", -1, True), SpecialToken("<u>", -2, False)), letters)
    assert encode("<c><u>", True) == [-1, -2]
    assert encode("<c><u>", False) == [*letters("<c>"), -2]


def test_stripping_token_takes_the_white_space_behind_it_alone():
    encode = FragmentEncoder((SpecialToken("<c>", -1, True, strips=True),), letters)
    assert encode(" <c> \n x <c> ", True) == [ord(" "), -1, *letters("x "), -1]


def test_bytes_without_any_token_are_refused_by_the_text():
    merger = ScoreMerger(PieceScores({"a": 0}, (0.0,), "▁", "", None), "model.bin")
    assert merger("aa") == [0, 0]
    with pytest.raises(RequestError, match=r"'é', for which model\.bin has no token"):
        merger("aé")
