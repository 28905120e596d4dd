"""Plain arithmetic without a story: "What is 17 + 25?", "12 + 30 * 2 = ?"."""

from __future__ import annotations

import random

from phrasing import expand
from scene import Scene

BINARY_WORDS = {
    "+": ("plus", "[What is the sum of|Add] <x> and <y>", "increase <x> by <y>"),
    "-": ("minus", "[What is the difference between|Find the difference of] <x> and <y>", "subtract <y> from <x>"),
    "*": ("times", "[What is the product of|Multiply] <x> [and|by] <y>", "multiply <x> by <y>"),
    "/": ("divided by", "divide <x> by <y>", "how many times does <y> go into <x>"),
}
SYMBOLS = {"+": ("+",), "-": ("-",), "*": ("*", "*", "x", "×"), "/": ("/", "/", "÷", ":")}
FRAMES = (
    "What is <e>?", "What is <e>?", "<e> = ?", "<e> =", "<e>", "Calculate <e>.", "Compute <e>",
    "How much is <e>?", "what's <e>?",
    "Solve <e>", "<e>=?", "Please calculate <e>.", "What does <e> equal?", "Can you tell me what <e> is?",
)  # fmt: skip


def _pair(scene: Scene, operator: str) -> tuple[int, int]:
    rng = scene.rng
    if operator == "+":
        return scene.amount(1, 500), scene.amount(1, 499)
    if operator == "-":
        left = scene.amount(3, 999)
        return left, rng.randint(1, left)
    one, two = (rng.randint(2, 12), scene.size()) if rng.random() < 0.7 else (rng.randint(2, 9), rng.randint(2, 111))
    if operator == "*":
        return (one, two) if rng.random() < 0.5 else (two, one)
    return one * two, one


def _binary(scene: Scene) -> list[str]:
    operator = scene.rng.choice("+-*/")
    left, right = _pair(scene, operator)
    answer = scene.work(left, operator, right)
    draw = scene.rng.random()
    word, *patterns = BINARY_WORDS[operator]
    if draw < 0.2:
        text = expand(scene.rng.choice(patterns), scene.rng, False)
        text = text.replace("<x>", str(left)).replace("<y>", str(right)) + scene.rng.choice(("?", ".", ""))
        return [text, scene.worked(answer)]
    sign = word if draw < 0.4 else scene.rng.choice(SYMBOLS[operator])
    return [_framed(scene, [str(left), sign, str(right)]), scene.worked(answer)]


def _chain(scene: Scene) -> list[str]:
    """Three operands; multiplication binds first, brackets now and then."""
    rng = scene.rng
    first, factor, size = scene.amount(1, 200), rng.randint(2, 9), rng.randint(2, 30)
    times = rng.choice(SYMBOLS["*"])
    kind = rng.randrange(5)
    if kind == 0:
        product = scene.work(factor, "*", size)
        answer = scene.work(first, "+", product)
        parts = [str(first), "+", str(factor), times, str(size)]
    elif kind == 1:
        product = scene.work(factor, "*", size)
        operator = rng.choice("+-")
        other = scene.part(product) if operator == "-" else first
        answer = scene.work(product, operator, other)
        parts = [str(factor), times, str(size), operator, str(other)]
    elif kind == 2:
        other = scene.amount()
        signs = rng.choice(("++", "+-", "-+"))
        operands = [first + other if signs[0] == "-" else first, other, rng.randint(1, 50)]
        answer = scene.work(scene.work(operands[0], signs[0], operands[1]), signs[1], operands[2])
        parts = [str(operands[0]), signs[0], str(operands[1]), signs[1], str(operands[2])]
    elif kind == 3:
        left, right = rng.randint(1, 30), rng.randint(1, 30)
        answer = scene.work(scene.work(left, "+", right), "*", factor)
        parts = [f"({left}", "+", f"{right})", times, str(factor)]
    else:
        left = size + rng.randint(1, 40)
        answer = scene.work(factor, "*", scene.work(left, "-", size))
        parts = [str(factor), times, f"({left}", "-", f"{size})"]
    return [_framed(scene, parts), scene.worked(answer)]


def _framed(scene: Scene, parts: list[str]) -> str:
    tight = scene.rng.random() < 0.2 and all(not part.isalpha() for part in parts) and "divided by" not in parts
    return scene.rng.choice(FRAMES).replace("<e>", ("" if tight else " ").join(parts))


def expression(scene: Scene) -> list[str]:
    """One expression with two or three operands."""
    return _binary(scene) if scene.rng.random() < 0.65 else _chain(scene)


def _operands(rng: random.Random) -> tuple[int, str, int]:
    """One step as the stories need it: sums and differences mostly below 200, products mostly of the times table."""
    operator = rng.choice("++---**/")
    if operator in "*/":
        one, two = rng.randint(2, 12), rng.randint(2, 12) if rng.random() < 0.6 else rng.randint(10, 30)
        return (one, "*", two) if operator == "*" else (one * two, "/", one)
    draw = rng.random()
    left = rng.randint(1, 100 if draw < 0.5 else 200 if draw < 0.85 else 500)
    right = rng.randint(1, 100 if rng.random() < 0.7 else 200)
    if operator == "-" and right > left:
        left, right = right, left
    return left, operator, right


def equations(rng: random.Random, count: int) -> list[str]:
    """Worked steps without any problem around them."""
    steps = []
    for _ in range(count):
        left, operator, right = _operands(rng)
        result = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[operator]
        steps.append(f"{left} {operator} {right} = {result}.")
    return steps
