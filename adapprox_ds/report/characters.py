# SPDX-License-Identifier: Apache-2.0
"""Draws curves as text, with braille characters of two by four dots, for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from adapprox_ds.report.runs import Curve

#: The bits of a braille character's dots, by row and column, and the character without dots.
_BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_BLANK = 0x2800
#: The number of characters for the labels left of a chart.
AXIS_WIDTH = 9


@dataclass(frozen=True, slots=True)
class Cell:
    """One character of a chart.

    Attributes:
        text: a braille character or a blank.
        curve: the index of the curve that its dots belong to; that of the last one where several
            meet, and -1 where there is none.
    """

    text: str
    curve: int


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves drawn in a grid of characters.

    Attributes:
        rows: the rows from top to bottom, of equal length.
        low: the value at the lower edge.
        high: the value at the upper edge.
        first: the step at the left edge.
        last: the step at the right edge.
    """

    rows: list[list[Cell]]
    low: float
    high: float
    first: float
    last: float


def chart(curves: Sequence[Curve], width: int, height: int) -> Chart | None:
    """Draw curves over common axes.

    Args:
        curves: the curves; values that are not finite interrupt them.
        width: the number of characters in a row, at least 1.
        height: the number of rows, at least 1.

    Returns:
        The chart; None where no curve has a finite value.
    """
    points = [[(x, y) for x, y in zip(*curve, strict=True) if math.isfinite(y)] for curve in curves]
    known = [point for drawn in points for point in drawn]
    if not known:
        return None
    first, last = min(x for x, _ in known), max(x for x, _ in known)
    low, high = min(y for _, y in known), max(y for _, y in known)
    columns, lines = 2 * width, 4 * height
    bits = [[0] * width for _ in range(height)]
    owner = [[-1] * width for _ in range(height)]

    def dot(column: int, line: int, index: int) -> None:
        bits[line // 4][column // 2] |= _BITS[line % 4][column % 2]
        owner[line // 4][column // 2] = index

    def place(x: float, y: float) -> tuple[int, int]:
        across = (x - first) / (last - first) if last > first else 0.0
        up = (y - low) / (high - low) if high > low else 0.5
        return round(across * (columns - 1)), round((1 - up) * (lines - 1))

    for index, curve in enumerate(curves):
        before: tuple[int, int] | None = None
        for x, y in zip(*curve, strict=True):
            if not math.isfinite(y):
                before = None
                continue
            at = place(x, y)
            for column, line in _line(before or at, at):
                dot(column, line, index)
            before = at
    rows = [
        [Cell(chr(_BLANK + b) if b else " ", i) for b, i in zip(*row, strict=True)]
        for row in zip(bits, owner, strict=True)
    ]
    return Chart(rows, low, high, first, last)


def sparkline(values: Sequence[float], width: int) -> str:
    """The last ``width`` values as bars of eight heights; "·" stands for one that is not finite."""
    shown = list(values)[-width:]
    known = [v for v in shown if math.isfinite(v)]
    if not known:
        return "·" * len(shown)
    low, spread = min(known), (max(known) - min(known)) or 1.0
    bars = "▁▂▃▄▅▆▇█"
    return "".join(bars[round(7 * (v - low) / spread)] if math.isfinite(v) else "·" for v in shown)


def _line(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """The dots of a straight line between two dots, both included."""
    (x0, y0), (x1, y1) = start, end
    steps = max(abs(x1 - x0), abs(y1 - y0), 1)
    return [
        (round(x0 + (x1 - x0) * i / steps), round(y0 + (y1 - y0) * i / steps))
        for i in range(steps + 1)
    ]
