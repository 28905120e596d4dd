"""Deterministic stream of training documents and the disjoint held-out problems.

A document is a prompt and its worked answer. Which side of the split a problem belongs to is decided by a hash of
its own letters and digits, so no problem of the held-out side can appear in training, whatever the seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import group_stories
import measure_stories
import phrasing
import running_stories
import setting_stories
from expressions import equations, expression
from scene import NARROW, WIDE, Numbers, Rejected, Scene
from small_talk import small_talk

HELDOUT_SHARE = 50  # one problem text in this many is held out
HELDOUT_SEED = 20_260


class Document(NamedTuple):
    """What the user writes and what the model should write."""

    prompt: str
    answer: str


class Mix(NamedTuple):
    """What a training stage is made of: shares of stories and drills and strips (the rest is small talk)."""

    numbers: Numbers
    story: float
    drill: float
    strip: float


FIRST_MIX = Mix(WIDE, 0.80, 0.17, 0.0)
SECOND_MIX = Mix(NARROW, 0.62, 0.14, 0.21)

Family = Callable[[Scene], list[str]]
STORIES: tuple[tuple[Family, int], ...] = (
    (running_stories.running, 30),
    (running_stories.conditional, 8),
    (running_stories.stock, 6),
    (running_stories.journey, 4),
    (setting_stories.comparison, 11),
    (setting_stories.difference, 5),
    (setting_stories.transfer, 5),
    (setting_stories.totals, 8),
    (setting_stories.unknown, 4),
    (setting_stories.goal, 3),
    (group_stories.groups, 12),
    (measure_stories.shopping, 11),
    (measure_stories.purse, 6),
    (measure_stories.rate, 8),
    (measure_stories.shifts, 4),
    (measure_stories.ages, 5),
    (measure_stories.lengths, 4),
)
LEADS = (
    "Question: ",
    "Q: ",
    "Problem: ",
    "Please solve this: ",
    "Please help me. ",
    "Solve: ",
    "Can you solve this? ",
    "Please solve the problem. ",
)
TAILS = (" Please.", " Show your work.", " Think step by step.", " Thanks.", " Explain.", " Please show the steps.")


def is_heldout(prompt: str) -> bool:
    """The side of the split: casing, spacing and punctuation do not move a problem across."""
    key = "".join(ch for ch in prompt.casefold() if ch.isalnum())
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % HELDOUT_SHARE == 0


def _styled(text: str, rng: random.Random) -> str:
    """The ways people type: a lead or a tail, lower case, no question mark, line breaks."""
    if rng.random() < 0.06:
        text = rng.choice(LEADS) + text
    if rng.random() < 0.05:
        text += rng.choice(TAILS)
    draw = rng.random()
    if draw < 0.14:
        text = text.lower()
    elif draw < 0.15:
        text = text.upper()
    if rng.random() < 0.10:
        text = text.rstrip("?.")
    if rng.random() < 0.03:
        text = text.replace(". ", ".\n")
    if rng.random() < 0.03:
        text = text.replace(". ", " ").replace(",", "")
    return text


def story(rng: random.Random, numbers: Numbers) -> Document:
    """One word problem."""
    families, weights = zip(*STORIES, strict=True)
    while True:
        family = rng.choices(families, weights)[0]
        scene = Scene(rng, numbers)
        try:
            *sentences, answer = family(scene)
        except Rejected:
            continue
        if rng.random() < 0.07:
            neutral = scene.sentence(rng.choice(phrasing.NEUTRAL))
            sentences.insert(rng.randrange(len(sentences)), neutral)
        return Document(_styled(" ".join(sentences), rng), answer)


def drill(rng: random.Random) -> Document:
    """One plain expression."""
    while True:
        try:
            text, answer = expression(Scene(rng))
        except Rejected:
            continue
        return Document(text.lower() if rng.random() < 0.15 else text, answer)


def strip(rng: random.Random) -> Document:
    """Bare equations after an empty prompt, for much arithmetic in few tokens."""
    return Document("", " ".join(equations(rng, 8)))


def training_documents(seed: int, mix: Mix = FIRST_MIX) -> Iterator[Document]:
    """Endless training stream; nothing held out."""
    rng = random.Random(seed)
    while True:
        draw = rng.random()
        if draw < mix.story:
            document = story(rng, mix.numbers)
            if is_heldout(document.prompt):
                continue
            yield document
        elif draw < mix.story + mix.drill:
            yield drill(rng)
        elif draw < mix.story + mix.drill + mix.strip:
            yield strip(rng)
        else:
            yield Document(*small_talk(rng))


def heldout_documents(seed: int) -> Iterator[Document]:
    """Endless stream of held-out word problems, each text once."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while True:
        document = story(rng, NARROW)
        if is_heldout(document.prompt) and document.prompt not in seen:
            seen.add(document.prompt)
            yield document


def final_number(answer: str) -> str:
    """The number after "The answer is", or an empty string."""
    _, mark, tail = answer.rpartition("The answer is ")
    return tail.strip().rstrip(".") if mark else ""


def main() -> None:
    """Writes the held-out file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("src/bitgrain/bundled/heldout.jsonl"))
    parser.add_argument("--count", type=int, default=500)
    arguments = parser.parse_args()
    stream = heldout_documents(HELDOUT_SEED)
    rows = [next(stream) for _ in range(arguments.count)]
    lines = [
        json.dumps({"problem": row.prompt, "answer": final_number(row.answer)}, ensure_ascii=False) for row in rows
    ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
