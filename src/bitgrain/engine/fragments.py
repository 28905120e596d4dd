"""Text to tokens where special tokens are looked for by the container's own rules, and merging goes by scores.

Special tokens are searched one after another, the longest first, each in all of the text that no longer one has taken.
Source: llama.cpp of llama-cpp-python 0.3.36, the vocabulary's partition and its SPM session.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from typing import NoReturn

from bitgrain.checkpoint.described_tokenizer import PieceScores, SpecialToken
from bitgrain.errors import RequestError

# as C's isspace() in its default locale
WHITE_SPACE = " \t\n\v\f\r"
MAX_CACHED = 65_536
CACHED_LENGTH = 64


class FragmentEncoder:
    """Divides a text at its special tokens and encodes what lies between them.

    Args:
        specials: in the order of the search.
        encode:   ids of a text without special tokens.
    """

    def __init__(self, specials: Sequence[SpecialToken], encode: Callable[[str], list[int]]) -> None:
        self._specials, self._encode = specials, encode

    def __call__(self, text: str, parse_special: bool) -> list[int]:
        ids: list[int] = []
        for fragment in self._divide(text, parse_special):
            if isinstance(fragment, int):
                ids.append(fragment)
            else:
                ids += self._encode(fragment)
        return ids

    def _divide(self, text: str, parse_special: bool) -> list[str | int]:
        fragments: list[str | int] = [text] if text else []
        for token in self._specials:
            if token.text in text and (parse_special or not token.control):
                fragments = [piece for fragment in fragments for piece in ([fragment] if isinstance(fragment, int) else _cut(fragment, token))]
        return fragments


def _cut(text: str, token: SpecialToken) -> Iterator[str | int]:
    """A text without the token's occurrences, which stand between its parts as ids."""
    for i, part in enumerate(text.split(token.text)):
        if i:
            yield token.token_id
            part = part.lstrip(WHITE_SPACE) if token.strips else part
        if part:
            yield part


class ScoreMerger:
    """Merges neighbours by the score of the token that they become, beginning with single characters.

    Texts are cut before every run of spaces if no token holds one behind another character: nothing merges across such a cut.
    """

    def __init__(self, scores: PieceScores, where: str) -> None:
        self._scores, self._where = scores, where
        self._cuttable = not any(scores.space in token.lstrip(scores.space) for token in scores.ids)
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        space = self._scores.space
        whole = self._scores.prefix + text.replace(" ", space)
        if not self._cuttable:
            return self._merged(whole)
        ids: list[int] = []
        for word in _before_runs(whole, space):
            found = self._known.get(word)
            if found is None:
                found = self._merged(word)
                if len(word) <= CACHED_LENGTH and len(self._known) < MAX_CACHED:
                    self._known[word] = found
            ids += found
        return ids

    def _merged(self, text: str) -> list[int]:
        """Ids of a text: a heap of mergeable neighbours (-score, place, place of the right one, length of both)."""
        ids, values = self._scores.ids, self._scores.values
        pieces: list[str] = list(text)
        left, right = list(range(-1, len(pieces) - 1)), [*range(1, len(pieces)), -1]
        heap: list[tuple[float, int, int, int]] = []

        def offer(a: int, b: int) -> None:
            joined = pieces[a] + pieces[b]
            if joined in ids:
                heappush(heap, (-values[ids[joined]], a, b, len(joined)))

        for i in range(len(pieces) - 1):
            joined = pieces[i] + pieces[i + 1]
            if joined in ids:
                heap.append((-values[ids[joined]], i, i + 1, len(joined)))
        heapify(heap)
        while heap:
            _, a, b, length = heappop(heap)
            if not pieces[a] or not pieces[b] or len(pieces[a]) + len(pieces[b]) != length:
                continue  # one of them has merged meanwhile
            pieces[a] += pieces[b]
            pieces[b] = ""
            right[a] = right[b]
            if right[b] >= 0:
                left[right[b]] = a
                offer(a, right[b])
            if left[a] >= 0:
                offer(left[a], a)
        return [i for piece in pieces if piece for i in ([ids[piece]] if piece in ids else self._bytes(piece))]

    def _bytes(self, piece: str) -> list[int]:
        found = [self._scores.ids.get(f"<0x{byte:02X}>", self._scores.unknown) for byte in piece.encode()]
        return [self._refuse(piece) if i is None else i for i in found]

    def _refuse(self, piece: str) -> NoReturn:
        raise RequestError("prompt", f"{piece!r}, for which {self._where} has no token and no bytes", "text of the model's vocabulary", "leave it out")


def _before_runs(text: str, space: str) -> Iterator[str]:
    """The text in parts, each of which begins with a run of spaces (the first one may lack it)."""
    start = 0
    while start < len(text):
        at = start
        while at < len(text) and text[at] == space:
            at += 1
        stop = text.find(space, at)
        stop = len(text) if stop < 0 else stop
        yield text[start:stop]
        start = stop
