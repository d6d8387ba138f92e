# SPDX-License-Identifier: Apache-2.0
"""Reads the losses, times and ranks that a training run recorded, while it runs or afterwards.

There are two kinds of folders: that of ``examples/pretrain``, and that of DeepSpeed's
``csv_monitor`` (``output_path/job_name``), with DeepSpeed's own events and those of
:func:`adapprox_ds.report.monitor.watch`.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adapprox_ds.report.monitor import layer_of

#: The name of the training loss in :class:`Run`.
TRAINING = "training"
#: A file of csv_monitor to which DeepSpeed writes after every optimizer step, which tells the
#: number of samples at the end of each step.
_STEP_ENDS = "Train_Samples_lr"
#: The prefixes of the names of files with the events of ``watch``: that of a layer's rank, and
#: those of all events.
_RANK = "Adapprox_rank_"
_OPTIMIZERS = ("Adapprox", "MicroAdam")


class Curve(NamedTuple):
    """Values over optimizer steps: two sequences of one length, steps ascending."""

    steps: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True, slots=True)
class Run:
    """The curves that a run recorded; None or empty where one was not recorded.

    Attributes:
        name: the name of the run's folder.
        losses: the losses by name; ``TRAINING`` is the training loss.
        unit: the unit of the losses; empty where it is not known.
        seconds: the time since the beginning of the first recorded step.
        mean_rank: the mean rank k of the factored blocks of all processes.
        layers: the mean rank k of each layer's blocks, in the order of depth.
        errors: the mean error ratio xi of each layer's blocks, in the order of depth.
        mean_error: the mean error ratio xi of the factored blocks of all processes.
        largest_error: the largest error ratio xi.
        state_bytes: the bytes of the optimizer state of all processes.
        step_seconds: the mean wall time of a step since the previous point.
    """

    name: str
    losses: dict[str, Curve] = field(default_factory=dict)
    unit: str = ""
    seconds: Curve | None = None
    mean_rank: Curve | None = None
    layers: dict[str, Curve] = field(default_factory=dict)
    errors: dict[str, Curve] = field(default_factory=dict)
    mean_error: Curve | None = None
    largest_error: Curve | None = None
    state_bytes: Curve | None = None
    step_seconds: Curve | None = None

    @property
    def last_step(self) -> int:
        """The last step for which anything was recorded."""
        curves = [*self.losses.values(), *self.layers.values(), self.mean_rank, self.state_bytes]
        return int(max(curve.steps[-1] for curve in curves if curve))


def read_run(folder: Path) -> Run:
    """Read a run's folder, of either kind.

    A line that does not end in a newline is left out, since the run may still be writing it.

    Raises:
        ValueError: there is no such folder, it is of neither kind, or nothing was recorded in it;
            the message names the folder or the file.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    run = _of_pretraining(folder) if (folder / "metrics.csv").is_file() else _of_monitor(folder)
    if not (run.losses or run.mean_rank or run.layers or run.state_bytes):
        raise ValueError(f"{folder}: neither a loss nor a rank was recorded there")
    return run


def is_finished(folder: Path) -> bool:
    """Whether a run of examples/pretrain is finished, that is, whether its summary is newest.

    It is always False for a folder of ``csv_monitor``, which does not tell.
    """
    summary, metrics = folder / "summary.json", folder / "metrics.csv"
    if not (summary.is_file() and metrics.is_file()):
        return False
    return summary.stat().st_mtime_ns >= metrics.stat().st_mtime_ns


def _of_pretraining(folder: Path) -> Run:
    """Read a folder of examples/pretrain: ``metrics.csv``, with empty cells, and ``ranks.csv``."""
    recorded = ("mean_rank", "mean_error", "state_bytes", "step_seconds")
    columns = ("train_loss", "held_out_loss", *recorded)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in columns}
    path = folder / "metrics.csv"
    for step, *cells in _table(path, "step", *columns):
        for name, cell in zip(columns, cells, strict=True):
            if cell:
                found[name].append((_number(path, step), _number(path, cell)))
    curves = {name: _curve(points) for name, points in found.items() if points}

    layers, errors = _by_layer(folder / "ranks.csv")
    losses = {TRAINING: "train_loss", "held out": "held_out_loss"}
    return Run(
        name=folder.resolve().name,
        losses={name: curves[column] for name, column in losses.items() if column in curves},
        unit="nats/token",
        seconds=_elapsed(curves.get("step_seconds"), 0.0),
        layers=layers,
        errors=errors,
        **{name: curves.get(name) for name in recorded},
    )


def _by_layer(path: Path) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """The mean rank and the mean error of each layer's blocks, from ``ranks.csv``."""
    # A long run of a large model has a million rows, so there is one pass over them, and the layer
    # of each name is found once.
    layers: dict[str, str] = {}
    found: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for step, parameter, rank, error in _table(path, "step", "parameter", "rank", "error"):
        layer = layers.get(parameter) or layers.setdefault(parameter, layer_of(parameter))
        sums = found[layer].setdefault(step, [0, 0.0, 0.0])
        sums[0] += 1
        sums[1] += _number(path, rank)
        sums[2] += _number(path, error)
    ranks, errors = (
        {
            layer: _curve([(_number(path, step), sums[i] / sums[0]) for step, sums in rows.items()])
            for layer, rows in found.items()
        }
        for i in (1, 2)
    )
    return _by_depth(ranks), _by_depth(errors)


def _of_monitor(folder: Path) -> Run:
    """Read a folder of ``csv_monitor``, which has a file for each event, over samples."""
    events = {path.stem: _events(path) for path in sorted(folder.glob("*.csv"))}
    if not any(name for name, _ in events.values()):
        raise ValueError(
            f"{folder}: neither a folder of examples/pretrain (metrics.csv) nor one of "
            "DeepSpeed's csv_monitor (output_path/job_name)"
        )
    ends = events.get(_STEP_ENDS, ("", []))[1]
    if not ends:
        raise ValueError(
            f"{folder}: {_STEP_ENDS}.csv, which DeepSpeed writes at every step, is not there"
        )
    at, steps = _steps([x for x, _ in ends])

    losses: dict[str, Curve] = {}
    layers: dict[str, Curve] = {}
    other: dict[str, Curve] = {}
    for stem, (name, points) in events.items():
        # Points after the last step are from before the run was resumed from an older checkpoint.
        kept = [(x, value) for x, value in points if x <= at[-1]]
        if not kept:
            continue
        curve = _curve([(float(np.interp(x, at, steps)), value) for x, value in kept])
        if name.lower().endswith("loss"):
            kind = name.removesuffix("_loss").replace("_", " ")
            losses[TRAINING if name == "train_loss" else kind] = curve
        elif stem.startswith(_RANK):
            layers[name] = curve
        else:
            other[stem] = curve

    curves: dict[str, Any] = {
        event: next((other[s] for o in _OPTIMIZERS if (s := f"{o}_{event}") in other), None)
        for event in ("mean_rank", "mean_error", "largest_error", "state_bytes", "step_seconds")
    }
    return Run(
        name=folder.resolve().name,
        losses=dict(sorted(losses.items(), key=lambda item: item[0] != TRAINING)),
        seconds=_elapsed(curves["step_seconds"], steps[0]),
        layers=_by_depth(layers),
        **curves,
    )


def _steps(ends: Sequence[float]) -> tuple[list[float], list[float]]:
    """The numbers of samples at which steps end, and the numbers of these steps.

    One step before the first and one after the last are added. The first recorded step is step 1,
    unless the run was resumed from a checkpoint before its first event.

    Args:
        ends: the number of samples at the end of each recorded step.
    """
    gaps = [b - a for a, b in pairwise(ends)] or [ends[0]]
    at = [ends[0] - gaps[0], *ends, ends[-1] + gaps[-1]]
    first = max(round(at[0] / gaps[0]), 0)
    return at, [float(first + i) for i in range(len(at))]


def _events(path: Path) -> tuple[str, list[tuple[float, float]]]:
    """The event's name and the points in a file of ``csv_monitor``; the name is empty for others.

    A run that is resumed from a checkpoint writes the header again, and the steps from that
    checkpoint on. Of points that occur twice, the later one is kept.
    """
    name = ""
    points: list[tuple[float, float]] = []
    for row in csv.reader(_lines(path)):
        if len(row) == 2 and row[0] == "step":
            name = row[1]
            continue
        if not name:
            break
        if len(row) != 2:
            raise ValueError(f"{path}: {','.join(row)!r} is not a step and a value")
        x, value = (_number(path, cell) for cell in row)
        while points and points[-1][0] >= x:
            points.pop()
        points.append((x, value))
    return name, points


def _table(path: Path, *columns: str) -> Iterator[list[str]]:
    """Yield the cells of some columns of a CSV file, row by row.

    Raises:
        ValueError: there is no such file or column, or a row has another number of cells.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    rows = csv.reader(_lines(path))
    names = next(rows, [])
    if missing := [name for name in columns if name not in names]:
        raise ValueError(f"{path}: no column {', '.join(missing)}")
    at = [names.index(name) for name in columns]
    for row in rows:
        if not row:
            continue
        if len(row) != len(names):
            raise ValueError(f"{path}: {','.join(row)!r} has {len(row)} of {len(names)} columns")
        yield [row[i] for i in at]


def _lines(path: Path) -> Iterator[str]:
    """Yield a file's complete lines; one without a newline may end inside a number."""
    with path.open(newline="", encoding="utf-8") as file:
        yield from (line for line in file if line.endswith("\n"))


def _number(path: Path, cell: str) -> float:
    try:
        return float(cell)
    except (TypeError, ValueError):
        raise ValueError(f"{path}: {cell!r} is not a number") from None


def _curve(points: Sequence[tuple[float, float]]) -> Curve:
    """The curve of at least one point, each of which is (step, value)."""
    return Curve([step for step, _ in points], [value for _, value in points])


def _elapsed(seconds: Curve | None, start: float) -> Curve | None:
    """The time since step ``start``, computed from the mean time of a step before each point."""
    if seconds is None:
        return None
    steps = [start, *seconds.steps]
    spent = [(b - a) * s for a, b, s in zip(steps, seconds.steps, seconds.values, strict=False)]
    return Curve(steps, list(accumulate(spent, initial=0.0)))


def duration(seconds: float) -> str:
    """A time as short text, such as "3 min 20 s"."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def depth_of(layer: str) -> int | None:
    """The number that a layer's name ends in; None for embeddings and the like."""
    _, _, last = layer.rpartition(".")
    return int(last) if last.isdecimal() else None


def _by_depth(layers: Mapping[str, Curve]) -> dict[str, Curve]:
    """The layers in the order of their numbers, after those without a number."""

    def place(layer: str) -> tuple[int, str]:
        depth = depth_of(layer)
        return (-1 if depth is None else depth, layer)

    return {layer: layers[layer] for layer in sorted(layers, key=place)}
