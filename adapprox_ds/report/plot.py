# SPDX-License-Identifier: Apache-2.0
"""Several runs in one picture: losses over steps and time, and ranks over steps.

The loss panels are those of the paper's Figure 4, of losses instead of perplexities; the rank
panels those of its Figure 3, layer by layer and from the first step on.
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

#: Layers that a legend names; the others' colours lie between theirs.
_NAMED_LAYERS = 8
#: Of a panel, in inches.
_WIDTH, _HEIGHT = 6.4, 4.4


def plot(runs: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> None:
    """Draw runs into a picture file.

    Args:
        runs: folders, see :func:`~adapprox_ds.report.runs.read_run`.
        output: PNG, SVG or PDF, by its suffix.

    Raises:
        ValueError: a folder that cannot be read; an unknown suffix.
        ModuleNotFoundError: matplotlib is not installed.
    """
    draw([read_run(Path(run)) for run in runs]).savefig(output, dpi=100)


def draw(runs: Sequence[Run]) -> Figure:
    """The picture: losses by step, losses by time where that is known, each run's ranks by step.

    Raises:
        ValueError: there are no runs, or neither a loss nor a rank in them.
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
    # Later runs in thinner lines: where two agree, both are seen.
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
    # A figure for each panel: one's legend takes no room from the others. The last fills its row.
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
    """A panel's title, which says what could not be drawn in it."""
    missing = ", ".join(name for name in names if name not in drawn)
    return f"{title} (not recorded: {missing})" if missing else title


def _draw_losses(
    axes: Axes, losses: Mapping[str, Curve], run: str, style: Mapping[str, Any]
) -> None:
    for name, curve in losses.items():
        kind: dict[str, Any] = {"ls": "--", "marker": "o", "ms": 3.5} if name != TRAINING else {}
        axes.plot(*curve, label=f"{run}, {name}", **style, **kind)


def _time_unit(elapsed: Sequence[Curve]) -> tuple[str, float]:
    """The unit in which times are short numbers, and its seconds."""
    longest = max(curve.values[-1] for curve in elapsed)
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if longest >= 2 * length:
            return unit, length
    return "s", 1.0


def _over_time(run: Run, length: float) -> dict[str, Curve]:
    """Losses against time in units of ``length`` seconds, as far as times are known."""
    assert run.seconds is not None
    curves = {}
    for name, (steps, values) in run.losses.items():
        at = np.interp(steps, run.seconds.steps, run.seconds.values, left=np.nan, right=np.nan)
        curves[name] = Curve((at / length).tolist(), values)
    return curves


def _draw_ranks(axes: Axes, run: Run) -> None:
    """The layers' ranks, and their mean as a broad line."""
    if run.mean_rank:
        axes.plot(*run.mean_rank, color="0.75", lw=5.0, label="all matrices")
    draw_layers(axes, run.layers)
    axes.set_ylabel("rank k, mean over matrices")
    axes.set_ylim(0, 1.05 * axes.dataLim.ymax)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small")


def draw_layers(axes: Axes, layers: Mapping[str, Curve]) -> None:
    """Numbered layers in colours that run with depth, others dashed; some have labels.

    Args:
        axes: drawn into.
        layers: by name, as in :class:`~adapprox_ds.report.runs.Run`.
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
