"""Rows that differ only in numbers, shown as one."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def pattern_of(name: str) -> str:
    """The module name with its indices replaced: "model.layers.*.mlp.down_proj"."""
    return _NUMBER.sub("*", name)


def ranges(numbers: Iterable[int]) -> str:
    """"0-3,7" for 0, 1, 2, 3, 7."""
    spans: list[list[int]] = []
    for n in sorted(set(numbers)):
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def merged_name(names: list[str]) -> str:
    """One text for modules of one pattern: each index becomes the range of its values, "model.layers.0-31.mlp.down_proj"."""
    if len(names) == 1:
        return names[0]
    places = [[int(n) for n in _NUMBER.findall(name)] for name in names]
    texts = iter([ranges(column) for column in zip(*places, strict=True)])
    return _NUMBER.sub(lambda _: next(texts), names[0])
