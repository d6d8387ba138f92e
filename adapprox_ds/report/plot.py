# SPDX-License-Identifier: Apache-2.0
"""Draws several runs in one picture: losses over steps and time, and ranks over steps.

The panels of losses are like the paper's Figure 4, with losses instead of perplexities. The panels
of ranks are like its Figure 3, with a curve for each layer.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adapprox_ds.report.runs import TRAINING, Curve, Run, depth_of, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: The number of layers that a legend names; the colours of the others lie between theirs.
_NAMED_LAYERS = 8
#: The width and the height of a panel, in inches.
_WIDTH, _HEIGHT = 6.4, 4.4


def plot(runs: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> None:
    """Draw runs to a picture file.

    Args:
        runs: the runs' folders; see :func:`~adapprox_ds.report.runs.read_run`.
        output: the file, which is PNG, SVG or PDF, by its suffix.

    Raises:
        ValueError: a folder cannot be read, or the suffix is unknown.
        ModuleNotFoundError: matplotlib is not installed.
    """
    draw([read_run(Path(run)) for run in runs]).savefig(output, dpi=100)


def draw(runs: Sequence[Run]) -> Figure:
    """Draw runs: losses over steps, losses over time if it was recorded, and ranks over steps.

    Raises:
        ValueError: there are no runs, or neither a loss nor a rank was recorded.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if not runs:
        raise ValueError("plot: runs=[] is not allowed; allowed: one or more")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'plot needs matplotlib: pip install "adapprox-ds[examples]"'
        ) from error

    names = [run.name for run in runs]
    names = [f"{n} ({i})" if names.count(n) > 1 else n for i, n in enumerate(names, 1)]
    named = list(zip(names, runs, strict=True))
    # Later runs have thinner lines, so that both are visible where two agree.
    widths = np.linspace(2.4, 1.0, len(runs))
    styles = {n: {"color": f"C{i}", "lw": widths[i]} for i, n in enumerate(names)}
    losses = {name: run for name, run in named if run.losses}
    timed = {name: run for name, run in losses.items() if run.seconds}
    ranked = {name: run for name, run in named if run.layers or run.mean_rank}

    panels = bool(losses) + bool(timed) + len(ranked)
    if not panels:
        raise ValueError(f"plot: {', '.join(names)}: neither a loss nor a rank was recorded there")
    columns = min(panels, 2)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * rows), layout="constrained")
    grid = figure.add_gridspec(rows, columns)
    # Each panel is a subfigure, so that its legend takes no room from others. The last one fills
    # its row.
    places = [grid[i // columns, i % columns] for i in range(panels - 1)]
    places.append(grid[rows - 1, (panels - 1) % columns :])
    axes = iter([figure.add_subfigure(place).add_subplot() for place in places])
    if losses:
        panel = next(axes)
        for name, run in losses.items():
            _draw_losses(panel, run.losses, name, styles[name])
        panel.set(title=_title("Loss over steps", losses, names), xlabel="optimizer step")
    if timed:
        panel = next(axes)
        unit, length = _time_unit([run.seconds for run in timed.values() if run.seconds])
        for name, run in timed.items():
            _draw_losses(panel, _over_time(run, length), name, styles[name])
        panel.set(title=_title("Loss over time", timed, names), xlabel=f"time ({unit})")
    units = {run.unit for run in losses.values()}
    unit = units.pop() if len(units) == 1 else ""
    for panel in figure.axes[: bool(losses) + bool(timed)]:
        panel.set_ylabel(f"loss ({unit})" if unit else "loss")
        panel.legend()
    for name, run in ranked.items():
        panel = next(axes)
        _draw_ranks(panel, run)
        panel.set(title=f"Rank of the second moment: {name}", xlabel="optimizer step")
    for panel in figure.axes:
        panel.grid(alpha=0.3)
    return figure


def _title(title: str, drawn: Mapping[str, Run], names: Sequence[str]) -> str:
    """A panel's title, with the names of the runs that could not be drawn."""
    missing = ", ".join(name for name in names if name not in drawn)
    return f"{title} (not recorded: {missing})" if missing else title


def _draw_losses(
    axes: Axes, losses: Mapping[str, Curve], run: str, style: Mapping[str, Any]
) -> None:
    for name, curve in losses.items():
        kind: dict[str, Any] = {"ls": "--", "marker": "o", "ms": 3.5} if name != TRAINING else {}
        axes.plot(*curve, label=f"{run}, {name}", **style, **kind)


def _time_unit(elapsed: Sequence[Curve]) -> tuple[str, float]:
    """The unit in which the times are short numbers, and its length in seconds."""
    longest = max(curve.values[-1] for curve in elapsed)
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if longest >= 2 * length:
            return unit, length
    return "s", 1.0


def _over_time(run: Run, length: float) -> dict[str, Curve]:
    """The losses over time, in units of ``length`` seconds; NaN where the time is not known."""
    assert run.seconds is not None
    curves = {}
    for name, (steps, values) in run.losses.items():
        at = np.interp(steps, run.seconds.steps, run.seconds.values, left=np.nan, right=np.nan)
        curves[name] = Curve((at / length).tolist(), values)
    return curves


def _draw_ranks(axes: Axes, run: Run) -> None:
    """Draw the rank of each layer, and the mean over all matrices as a broad line."""
    if run.mean_rank:
        axes.plot(*run.mean_rank, color="0.75", lw=5.0, label="all matrices")
    draw_layers(axes, run.layers)
    axes.set_ylabel("rank k, mean over matrices")
    axes.set_ylim(0, 1.05 * axes.dataLim.ymax)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small")


def draw_layers(axes: Axes, layers: Mapping[str, Curve]) -> None:
    """Draw numbered layers in colours in the order of depth, and others dashed.

    Args:
        axes: the axes to draw to.
        layers: the curves by layer, as in :class:`~adapprox_ds.report.runs.Run`. A legend has
            ``_NAMED_LAYERS`` of the numbered ones, evenly chosen, and all others.
    """
    from matplotlib import colormaps

    numbered = [layer for layer in layers if depth_of(layer) is not None]
    stride = math.ceil(len(numbered) / _NAMED_LAYERS)
    shades = colormaps["viridis"](np.linspace(0.0, 0.9, len(numbered)))
    for i, layer in enumerate(numbered):
        label = layer if i % stride == 0 or i == len(numbered) - 1 else None
        axes.plot(*layers[layer], color=shades[i], lw=1.3, label=label)
    for i, layer in enumerate(layer for layer in layers if layer not in numbered):
        axes.plot(*layers[layer], color=f"C{i + 1}", lw=1.3, ls="--", label=layer)
