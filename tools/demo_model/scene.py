"""One problem under construction: its people, its things and the arithmetic done so far."""

from __future__ import annotations

import random
from typing import NamedTuple

import phrasing

LARGEST = 999


class Numbers(NamedTuple):
    """How large the numbers of a problem are: shares of small, middle and large draws and their limits."""

    small_share: float
    middle_share: float
    middle: int
    table_share: float
    middle_size: int
    large_size: int


WIDE = Numbers(0.35, 0.80, 100, 0.7, 25, 60)
NARROW = Numbers(0.40, 0.88, 60, 0.85, 25, 25)


class Rejected(Exception):
    """The drawn numbers left the allowed range; the caller draws the problem again."""


class Scene:
    """Random choices shared by all sentences of a problem, plus its worked steps."""

    def __init__(self, rng: random.Random, numbers: Numbers = WIDE) -> None:
        self.rng = rng
        self.numbers = numbers
        self.past = rng.random() < 0.45
        self.words = rng.random() < 0.12
        self.steps: list[str] = []
        self.slots = self._draw_slots()

    def _draw_slots(self) -> dict[str, str]:
        rng = self.rng
        names: dict[str, bool] = {}
        while len(names) < 3:
            name, female = phrasing.person(rng)
            names[name] = female
        slots = dict(zip("ABC", names, strict=True))
        female = names[slots["A"]]
        slots["he"], slots["He"], slots["his"], slots["him"] = (
            ("she", "She", "her", "her") if female else ("he", "He", "his", "him")
        )
        slots["obj"], slots["objs"] = phrasing.thing(rng)
        slots["obj2"], slots["objs2"] = phrasing.thing(rng)
        slots["obj3"], slots["objs3"] = phrasing.thing(rng)
        slots["box"], slots["boxes"] = phrasing.forms(rng.choice(phrasing.CONTAINERS))
        slots["place"] = rng.choice(phrasing.PLACES)
        slots["rel"] = rng.choice(phrasing.RELATIVES)
        slots["color"], slots["color2"] = rng.sample(phrasing.COLORS, 2)
        slots["day"], slots["day2"] = rng.sample(phrasing.DAYS, 2)
        slots["money"] = rng.choice(phrasing.CURRENCIES)
        return slots

    def say(self, pattern: str, **numbers: int) -> str:
        """Text of a pattern with this scene's words and the given numbers."""
        shown = {key: phrasing.number(value, self.rng, self.words) for key, value in numbers.items()}
        return phrasing.fill(phrasing.expand(pattern, self.rng, self.past), self.slots | shown)

    def sentence(self, pattern: str, **numbers: int) -> str:
        """Like `say`, starting with a capital letter."""
        return phrasing.capitalize(self.say(pattern, **numbers))

    def price(self, pattern: str, **numbers: int) -> str:
        """Like `say` for amounts of money: ``12 <money>`` is sometimes written ``$12``."""
        text = phrasing.expand(pattern, self.rng, self.past)
        if self.slots["money"] == "dollars" and self.rng.random() < 0.4:
            for key in numbers:
                text = text.replace(f"<{key}> <money>", f"$<{key}>")
        shown = {key: phrasing.number(value, self.rng, False) for key, value in numbers.items()}
        return phrasing.capitalize(phrasing.fill(text, self.slots | shown))

    def amount(self, low: int = 2, high: int = 200) -> int:
        """A number to add or to start from: mostly small, now and then up to `high`."""
        draw = self.rng.random()
        top = (
            20 if draw < self.numbers.small_share else self.numbers.middle if draw < self.numbers.middle_share else high
        )
        return self.rng.randint(low, max(low, min(top, high)))

    def part(self, whole: int) -> int:
        """A number that can be taken from `whole` and leaves something."""
        if whole < 2:
            raise Rejected
        top = whole - 1 if self.rng.random() < 0.6 else min(whole - 1, 20)
        return self.rng.randint(1, top)

    def count(self) -> int:
        """How many groups."""
        return self.rng.randint(2, 9) if self.rng.random() < 0.8 else self.rng.randint(2, 12)

    def size(self) -> int:
        """How many in each group."""
        draw, numbers = self.rng.random(), self.numbers
        top = 12 if draw < numbers.table_share else numbers.middle_size if draw < 0.9 else numbers.large_size
        return self.rng.randint(2, top)

    def divisor(self, whole: int) -> int:
        """A group count or size that divides `whole` exactly."""
        options = [d for d in range(2, 13) if whole % d == 0 and whole // d >= 2]
        if not options:
            raise Rejected
        return self.rng.choice(options)

    def work(self, left: int, operator: str, right: int) -> int:
        """Does one step of arithmetic and writes it into the worked answer."""
        if operator == "/" and (right == 0 or left % right):
            raise Rejected
        result = {
            "+": left + right,
            "-": left - right,
            "*": left * right,
            "/": left // right if right else 0,
        }[operator]
        if not 0 <= result <= LARGEST:
            raise Rejected
        self.steps.append(f"{left} {operator} {right} = {result}.")
        return result

    def worked(self, answer: int) -> str:
        """The whole answer text."""
        return " ".join([*self.steps, f"The answer is {answer}."])
