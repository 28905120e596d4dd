"""Wording of the demo problems: names, things, number words and a small pattern language.

A pattern is ordinary text with three kinds of marks::

    [has|owns|holds]      one of the alternatives, drawn at random (may be nested, may hold tenses)
    {buys|bought}         the present or the past form, by the tense of the whole problem
    <A>                   the value of a slot (a name, a thing, a number)
"""

from __future__ import annotations

import random
import re

FEMALE = ["Ana", "Mia", "Emma", "Lucy", "Sara", "Nina", "Lena", "Julia", "Maria", "Sofia", "Olivia", "Ava", "Zoe", "Chloe", "Ella", "Grace", "Lily", "Amy", "Kate", "Jane", "Anna", "Laura", "Clara", "Eva", "Ida", "Rosa", "Alice", "Maya", "Nora", "Hana", "Yuki", "Aisha", "Fatima", "Priya", "Leila", "Ingrid", "Carmen", "Beth", "Susan", "Linda", "Rachel", "Megan", "Holly", "Paula", "Tina", "Wendy", "Betty", "Janet", "Natalia", "Elena", "Mei", "Amara", "Zara", "Freya"]
MALE = ["Tom", "Ben", "Sam", "Max", "Leo", "Jack", "John", "Paul", "Peter", "Mark", "Luke", "David", "Daniel", "James", "Robert", "Michael", "Adam", "Noah", "Liam", "Ethan", "Oscar", "Felix", "Hugo", "Jonas", "Karl", "Erik", "Ivan", "Omar", "Ali", "Ravi", "Chen", "Kenji", "Diego", "Carlos", "Pedro", "Marco", "Luca", "Finn", "Henry", "George", "Frank", "Bob", "Jim", "Tim", "Joe", "Bill", "Kevin", "Brian", "Eric", "Steve", "Alex", "Victor", "Simon", "Martin", "Jake", "Ryan", "Nathan", "Samir", "Kofi"]
RARE = ("José", "Zoë", "André", "Søren", "Мария", "Иван", "李明", "美咲", "Łukasz", "Noël", "Çelik", "Siân")

THINGS = ["apple", "pear", "orange", "banana", "plum", "peach", "lemon", "mango", "cookie", "muffin", "cupcake", "candy:candies", "sandwich:sandwiches", "egg", "tomato:tomatoes", "potato:potatoes", "carrot", "onion", "melon", "grape", "cherry:cherries", "strawberry:strawberries", "nut", "chocolate", "donut", "pie", "pizza", "marble", "ball", "toy", "doll", "car", "truck", "robot", "balloon", "kite", "coin", "stamp", "sticker", "card", "shell", "stone", "button", "bead", "ribbon", "book", "comic", "magazine", "notebook", "pencil", "pen", "crayon", "marker", "eraser", "ruler", "folder", "envelope", "letter", "photo", "picture", "painting", "poster", "ticket", "badge", "medal", "hat", "shirt", "sock", "scarf:scarves", "glove", "bottle", "cup", "plate", "bowl", "spoon", "fork", "candle", "lamp", "chair", "table", "brick", "tile", "nail", "screw", "bolt", "board", "flower", "rose", "tulip", "tree", "plant", "seed", "leaf:leaves", "fish:fish", "bird", "duck", "chicken", "hen", "cow", "sheep:sheep", "goat", "horse", "rabbit", "kitten", "puppy:puppies", "hamster", "turtle", "frog", "butterfly:butterflies", "bee", "ant", "game", "puzzle", "block", "key", "phone", "battery:batteries", "cable", "bulb", "token", "point", "pumpkin", "cabbage", "walnut", "gum", "cake", "bicycle", "bike", "computer", "watch:watches", "ring", "necklace", "bracelet", "flag", "drum", "guitar"]
CONTAINERS = ["bag", "box:boxes", "basket", "crate", "pack", "packet", "jar", "tray", "bundle", "carton", "sack", "case", "bucket", "shelf:shelves", "pile", "stack", "drawer", "bowl", "folder", "group", "set"]
PLACES = ["shop", "store", "library", "school", "farm", "garden", "bakery", "market", "museum", "warehouse", "zoo", "park", "kitchen", "classroom"]
COLORS = ["red", "blue", "green", "yellow", "white", "black", "orange", "purple", "pink", "brown"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
RELATIVES = ["friend", "brother", "sister", "mother", "father", "aunt", "uncle", "cousin", "neighbour", "grandmother", "grandfather", "teacher"]
CURRENCIES = ("dollars", "dollars", "dollars", "euros", "pounds", "coins")
NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
NEUTRAL = (
    "It {is|was} a sunny day.", "It {is|was} [raining|snowing|cold|warm|windy] [outside|today|that day].",
    "It {is|was} <day>.", "<A> {is|was} very happy.", "<A> {likes|liked} <objs> a lot.", "<A> {loves|loved} <objs>.",
    "<A> and <B> {are|were} [good friends|neighbours|in the same class].", "Everybody {has|had} a good time.",
    "The weather {is|was} nice.", "<B> {is|was} watching.", "<A> {lives|lived} near the [park|river|school|market].",
)  # fmt: skip

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_TENSE = re.compile(r"\{([^{}|]*)\|([^{}|]*)\}")
_SLOT = re.compile(r"<(\w+)>")


def expand(pattern: str, rng: random.Random, past: bool) -> str:
    """Resolves the choices and tenses of a pattern; slots stay in place."""
    pattern = _TENSE.sub(lambda m: m.group(2 if past else 1), pattern)
    while "[" in pattern:
        pattern = _CHOICE.sub(lambda m: rng.choice(m.group(1).split("|")), pattern)
    return pattern


def fill(text: str, slots: dict[str, str]) -> str:
    """Puts the slot values into an expanded pattern."""
    return _SLOT.sub(lambda m: slots[m.group(1)], text)


def capitalize(text: str) -> str:
    """Upper-cases the first letter only (names further on keep theirs)."""
    return text[:1].upper() + text[1:]


def forms(entry: str) -> tuple[str, str]:
    """Singular and plural of a list entry such as ``apple`` or ``box:boxes``."""
    singular, _, plural = entry.partition(":")
    return singular, plural or singular + "s"


def invented_word(rng: random.Random) -> str:
    """A pronounceable word the tokenizer has never seen, so that unknown names and things work."""
    syllables = rng.randint(1, 3)
    word = "".join(rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiouy") for _ in range(syllables))
    return word + rng.choice("nrlsxtkd")


def person(rng: random.Random) -> tuple[str, bool]:
    """A name and whether the problem uses female pronouns for it."""
    draw = rng.random()
    if draw < 0.10:
        return invented_word(rng).capitalize(), rng.random() < 0.5
    if draw < 0.12:
        return rng.choice(RARE), rng.random() < 0.5
    female = rng.random() < 0.5
    return rng.choice(FEMALE if female else MALE), female


def thing(rng: random.Random) -> tuple[str, str]:
    """Singular and plural of something countable, now and then an invented one or one with a colour."""
    if rng.random() < 0.05:
        word = invented_word(rng)
        return word, word + "s"
    singular, plural = forms(rng.choice(THINGS))
    if rng.random() < 0.08:
        color = rng.choice(COLORS)
        return f"{color} {singular}", f"{color} {plural}"
    return singular, plural


def number(value: int, rng: random.Random, words: bool) -> str:
    """A number in digits, or in words where the problem is one that spells small numbers."""
    if words and value < len(NUMBER_WORDS) and rng.random() < 0.7:
        return NUMBER_WORDS[value]
    return str(value)
