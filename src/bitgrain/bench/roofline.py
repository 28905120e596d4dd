"""A picture of measured kernels under the machine's limits: operations per second over operations per byte, both logarithmic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 560, 80, 200, 40, 60
INK, GRID, COLOURS = "#1b1b1f", "#d8d8de", ("#2563a8", "#b4572b", "#2e7d4f", "#7a4ea3", "#a8862a", "#1f8a8a", "#b23a6b", "#5b6472")


def roofline(read: float, peaks: Mapping[str, float], points: Sequence[tuple[str, float, float]], title: str) -> str:
    """An SVG page.

    Args:
        read:   bytes per second.
        peaks:  name to operations per second; those of 0 are left out.
        points: (label, operations per byte, operations per second).
    """
    limits = {name: value for name, value in peaks.items() if value}
    axes = _Axes([x for _, x, _ in points], [y for _, _, y in points] + list(limits.values()), read)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" font-size="12" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/><text x="{LEFT}" y="24" font-size="15">{escape(title)}</text>',
        *axes.grid(),
    ]
    for name, peak in limits.items():
        ridge = max(axes.low_x, peak / read)
        parts.append(axes.line(ridge, peak, axes.high_x, peak) + axes.text(axes.high_x, peak, f"{name} {peak / 1e9:.0f} G/s", 6))
    highest = max(limits.values(), default=read * axes.high_x)
    parts.append(axes.line(axes.low_x, read * axes.low_x, min(axes.high_x, highest / read), min(highest, read * axes.high_x)))
    parts.append(axes.text(axes.low_x, read * axes.low_x * 1.5, f"{read / 1e9:.1f} GB/s", 8))
    for index, (label, x, y) in enumerate(points):
        colour = COLOURS[index % len(COLOURS)]
        parts.append(f'<circle cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="4" fill="{colour}"/>')
        row = TOP + 150 + 16 * index
        parts.append(f'<circle cx="{WIDTH - RIGHT + 24}" cy="{row - 4}" r="4" fill="{colour}"/><text x="{WIDTH - RIGHT + 34}" y="{row}">{escape(label)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


class _Axes:
    """Where values stand; whole decades around all of them."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], read: float) -> None:
        self.low_x, self.high_x = _decades([*xs, max(ys) / read])
        self.low_y, self.high_y = _decades([*ys, read * self.low_x])

    def x(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(value / self.low_x) / math.log(self.high_x / self.low_x)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * math.log(value / self.low_y) / math.log(self.high_y / self.low_y)

    def line(self, x1: float, y1: float, x2: float, y2: float) -> str:
        return f'<line x1="{self.x(x1):.1f}" y1="{self.y(max(y1, self.low_y)):.1f}" x2="{self.x(x2):.1f}" y2="{self.y(y2):.1f}" stroke="{INK}" stroke-width="1.5"/>'

    def text(self, x: float, y: float, text: str, shift: float) -> str:
        return f'<text x="{self.x(x) + shift:.1f}" y="{self.y(max(y, self.low_y)) + 4:.1f}">{escape(text)}</text>'

    def grid(self) -> list[str]:
        parts = []
        for exponent in range(round(math.log10(self.low_x)), round(math.log10(self.high_x)) + 1):
            at = self.x(10.0**exponent)
            parts.append(f'<line x1="{at:.1f}" y1="{TOP}" x2="{at:.1f}" y2="{HEIGHT - BOTTOM}" stroke="{GRID}"/><text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{10.0**exponent:g}</text>')
        for exponent in range(round(math.log10(self.low_y)), round(math.log10(self.high_y)) + 1):
            at = self.y(10.0**exponent)
            parts.append(f'<line x1="{LEFT}" y1="{at:.1f}" x2="{WIDTH - RIGHT}" y2="{at:.1f}" stroke="{GRID}"/><text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{10.0**exponent / 1e9:g}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 16}" text-anchor="middle">operations per byte of weights</text>')
        parts.append(f'<text transform="translate(22 {HEIGHT / 2:.0f}) rotate(-90)" text-anchor="middle">billion operations per second</text>')
        return parts


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """Powers of ten around all values."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return 10.0**low, 10.0 ** max(high, low + 1)
