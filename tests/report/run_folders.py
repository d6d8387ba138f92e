# SPDX-License-Identifier: Apache-2.0
"""Folders as runs leave them, made without training: examples/pretrain's and csv_monitor's."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from recording import MetricsRow, RankRow, RunRecorder

BATCH = 4


def record(recorder: RunRecorder, step: int, factored: bool = True) -> None:
    """One more point of a run; it falls by 1 every 10 steps."""
    i = step // 10 - 1
    row = MetricsRow(
        step=step,
        train_loss=5.0 - i,
        held_out_loss=4.5 - i if i else None,
        lr=1e-3,
        mean_rank=8.0 - i if factored else None,
        mean_error=0.01 if factored else None,
        state_bytes=100,
        step_seconds=60.0 * (i + 1),
    )
    ranks = [
        RankRow(step, f"transformer.{name}.weight", shard, k - i, k / 100)
        for name, k in (("h.10.mlp", 4), ("h.2.mlp", 6), ("h.2.attn", 8), ("wte", 10))
        for shard in (0, 1)
    ]
    recorder.add(row, ranks if factored else [])


def pretraining(folder: Path, factored: bool = True) -> Path:
    """A run of examples/pretrain of 30 steps, written by its own recorder."""
    recorder = RunRecorder(folder, start=0)
    for step in (10, 20, 30):
        record(recorder, step, factored)
    return folder


def monitored(folder: Path, events: Mapping[str, Sequence[tuple[float, float] | str]]) -> Path:
    """A folder as csv_monitor leaves it; a text among the points is a header."""
    folder.mkdir(parents=True)
    for event, points in events.items():
        with (folder / f"{event.replace('/', '_')}.csv").open("a+") as file:
            writer = csv.writer(file)
            writer.writerow(["step", event.rpartition("/")[2]])
            writer.writerows(["step", p] if isinstance(p, str) else p for p in points)
    return folder


def learning_rates(last: int, first: int = 1) -> list[tuple[float, float]]:
    """DeepSpeed's own event, once a step."""
    return [(BATCH * step, 1e-3) for step in range(first, last + 1)]
