# SPDX-License-Identifier: Apache-2.0
"""Draws charts as SVG text, for HTML pages that need no drawing library."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from adapprox_ds.report.runs import Curve

#: The size of a chart, and the margins around the plotted part, in units of the SVG.
_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 10, 34
#: The lower edge of the plotted part.
_BASE = _HEIGHT - _BOTTOM
#: The largest numbers of points of a curve and of columns of a map; others are left out.
_MOST_POINTS, _MOST_COLUMNS = 1200, 120
#: The height of a row of a map.
_CELL = 16
#: Colours of the colour map viridis at equal distances, from low to high, as red, green, blue.
_VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


@dataclass(frozen=True, slots=True)
class Line:
    """One curve of a chart.

    Attributes:
        name: the name in the legend.
        curve: the curve. Values that are not finite, or not positive on a logarithmic axis,
            interrupt it.
        dashed: whether the line is dashed and has a dot at each point.
    """

    name: str
    curve: Curve
    dashed: bool = False


def line_chart(
    title: str, unit: str, lines: Sequence[Line], *, log: bool = False, from_zero: bool = False
) -> str:
    """A figure of curves over optimizer steps.

    Args:
        title: the title of the figure.
        unit: the unit of the values; may be empty.
        lines: the curves, at most six, in the page's colours ``--c0`` to ``--c5``.
        log: whether the vertical axis is logarithmic.
        from_zero: whether the vertical axis begins at 0.

    Returns:
        An HTML ``<figure>``. If no value can be drawn, it says so.
    """
    thinned = [Line(line.name, _thin(line.curve), line.dashed) for line in lines]
    drawn = [
        (x, y) for line in thinned for x, y in zip(*line.curve, strict=True) if _drawable(y, log)
    ]
    head = _caption(title, unit)
    if not drawn:
        return f'<figure>{head}<p class="none">no finite value was recorded</p></figure>'
    low, high = min(y for _, y in drawn), max(y for _, y in drawn)
    first, last = min(x for x, _ in drawn), max(x for x, _ in drawn)
    ticks = _log_ticks(low, high) if log else _ticks(0.0 if from_zero else low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    xs, ys = _Scale(first, last, _LEFT, _WIDTH - _RIGHT), _Scale(low, high, _BASE, _TOP, log)

    parts = []
    for tick in ticks:
        y = ys(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:g}" text-anchor="end">{tick:.10g}</text>')
    for tick in _ticks(first, last, 10):
        if first <= tick <= last:
            parts.append(
                f'<text x="{xs(tick)}" y="{_BASE + 16}" text-anchor="middle">{tick:.10g}</text>'
            )
    parts.append(
        f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">optimizer step'
        "</text>"
    )
    for i, line in enumerate(thinned):
        kind = ' class="dashed"' if line.dashed else ""
        for run in _stretches(line.curve, log):
            points = " ".join(f"{xs(x)},{ys(y)}" for x, y in run)
            if len(run) > 1:
                parts.append(f'<polyline{kind} stroke="var(--c{i})" points="{points}"/>')
            if line.dashed or len(run) == 1:
                parts += [
                    f'<circle cx="{xs(x)}" cy="{ys(y)}" r="2.5" fill="var(--c{i})"/>'
                    for x, y in run
                ]
    legend = "".join(
        f'<span><i style="background:var(--c{i})"></i>{escape(line.name)}</span>'
        for i, line in enumerate(lines)
    )
    shown = {
        "x": [first, last, _LEFT, _WIDTH - _RIGHT],
        "lines": [
            {
                "name": line.name,
                "steps": list(line.curve.steps),
                "values": [v if math.isfinite(v) else None for v in line.curve.values],
            }
            for line in thinned
        ],
    }
    return (
        f'<figure>{head}<p class="legend">{legend}</p>'
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}'
        f'<line class="cursor" x1="0" x2="0" y1="{_TOP}" y2="{_BASE}"/></svg>'
        f"{_data(shown)}</figure>"
    )


def heat_map(title: str, unit: str, rows: Mapping[str, Curve], *, log: bool = False) -> str:
    """A figure with a row for each layer, steps from left to right, and values as colours.

    Args:
        title: the title of the figure.
        unit: the unit of the values; may be empty.
        rows: the curve of each layer by name, from top to bottom.
        log: whether colours are those of the values' logarithms.

    Returns:
        An HTML ``<figure>``. If no value can be drawn, it says so.
    """
    head = _caption(title, unit)
    values = [v for curve in rows.values() for v in curve.values if _drawable(v, log)]
    if not values:
        return f'<figure>{head}<p class="none">no finite value was recorded</p></figure>'
    steps = sorted({step for curve in rows.values() for step in curve.steps})
    stride = math.ceil(len(steps) / _MOST_COLUMNS)
    steps = steps[::-1][::stride][::-1]  # the last one stays
    names_width = 7 * min(max(map(len, rows)), 34) + 14
    cell = (_WIDTH - _RIGHT - names_width) / len(steps)
    colours = _Scale(min(values), max(values), 0.0, 1.0, log)
    parts = []
    for i, (name, curve) in enumerate(rows.items()):
        y = i * _CELL
        short = name if len(name) <= 34 else f"…{name[-33:]}"
        parts.append(f'<text x="{names_width - 6}" y="{y + 12}" text-anchor="end">{escape(short)}')
        parts.append(f"<title>{escape(name)}</title></text>")
        known = dict(zip(*curve, strict=True))
        for j, step in enumerate(steps):
            value = known.get(step, math.nan)
            if not _drawable(value, log):
                continue
            parts.append(
                f'<rect x="{names_width + j * cell:.2f}" y="{y}" width="{cell + 0.3:.2f}" '
                f'height="{_CELL - 1}" fill="{_viridis(colours(value))}"><title>{escape(name)}, '
                f"step {step:.10g}: {value:.4g}</title></rect>"
            )
    bottom = len(rows) * _CELL + 14
    parts.append(f'<text x="{names_width}" y="{bottom}">step {steps[0]:.10g}</text>')
    parts.append(
        f'<text x="{_WIDTH - _RIGHT}" y="{bottom}" text-anchor="end">{steps[-1]:.10g}</text>'
    )
    stops = ", ".join(_viridis(i / 8) for i in range(9))
    scale = (
        f'<p class="legend">{min(values):.3g} <b style="background:linear-gradient(90deg, '
        f'{stops})"></b> {max(values):.3g}{" (logarithmic)" if log else ""}</p>'
    )
    return (
        f'<figure>{head}{scale}<svg class="map" viewBox="0 0 {_WIDTH} {bottom + 6}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


@dataclass(frozen=True, slots=True)
class _Scale:
    """Maps values of an axis to coordinates, rounded to four decimals.

    Attributes:
        low: the value at ``start``; if it is equal to ``high``, all values lie in the middle.
        high: the value at ``end``.
        start: the coordinate of ``low``.
        end: the coordinate of ``high``.
        log: whether the axis is logarithmic.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        part = (value - low) / (high - low) if high > low else 0.5
        return round(self.start + part * (self.end - self.start), 4)


def _caption(title: str, unit: str) -> str:
    small = f" <small>{escape(unit)}</small>" if unit else ""
    return f"<figcaption>{escape(title)}{small}</figcaption>"


def _data(value: object) -> str:
    """A script element with JSON, in which "<" is escaped so that no text can end the element."""
    text = json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json">{text}</script>'


def _drawable(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _stretches(curve: Curve, log: bool) -> list[list[tuple[float, float]]]:
    parts: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(*curve, strict=True):
        if _drawable(y, log):
            parts[-1].append((x, y))
        elif parts[-1]:
            parts.append([])
    return [part for part in parts if part]


def _thin(curve: Curve) -> Curve:
    """Reduce a long curve to the smallest and the largest value of each stretch, to keep peaks."""
    count = len(curve.steps)
    if count <= _MOST_POINTS:
        return curve
    size = math.ceil(2 * count / _MOST_POINTS)
    kept: list[int] = []
    for begin in range(0, count, size):
        part = range(begin, min(begin + size, count))
        # A stretch with a value that is not finite becomes a gap.
        odd = next((i for i in part if not math.isfinite(curve.values[i])), None)
        order = sorted(part, key=lambda i: curve.values[i]) if odd is None else [odd]
        kept += sorted({order[0], order[-1]})
    if kept[-1] != count - 1:
        kept.append(count - 1)
    return Curve([curve.steps[i] for i in kept], [curve.values[i] for i in kept])


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers that cover an interval."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw)
    begin, end = math.floor(low / step), math.ceil(high / step)
    return [float(f"{i * step:.12g}") for i in range(begin, end + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that cover an interval, and in a short one 2 and 5 times those."""
    begin, end = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if end - begin > 2:
        return [10.0**i for i in range(begin, end + 1)]
    fine = [float(f"{m}e{i}") for i in range(begin, end + 1) for m in (1, 2, 5)]
    below = max(t for t in fine if t <= low)
    above = min((t for t in fine if t >= high), default=fine[-1])
    return [t for t in fine if below <= t <= above]


def _viridis(part: float) -> str:
    at = part * (len(_VIRIDIS) - 1)
    i = min(int(at), len(_VIRIDIS) - 2)
    mixed = (
        round(a + (at - i) * (b - a)) for a, b in zip(_VIRIDIS[i], _VIRIDIS[i + 1], strict=True)
    )
    return "#{:02x}{:02x}{:02x}".format(*mixed)
