# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: two CSV files and a summary."""

import csv
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class MetricsRow:
    """One row of ``metrics.csv``; what was not measured stays an empty cell.

    Attributes:
        step: Optimizer steps done.
        train_loss: Nats a token, mean over the steps since the last row and over ranks.
        held_out_loss: Nats a token on the held-out sample.
        lr: Learning rate of the last step.
        mean_rank: Of the second moment's factors, over the matrices of all shards.
        mean_error: Relative Frobenius error xi, over the same.
        state_bytes: Optimizer state, all ranks together.
        step_seconds: Wall time a step since the last row, evaluation left out.
    """

    step: int
    train_loss: float
    held_out_loss: float | None
    lr: float
    mean_rank: float | None
    mean_error: float | None
    state_bytes: int
    step_seconds: float


@dataclass(frozen=True)
class RankRow:
    """One row of ``ranks.csv``: the factors of one parameter's part on one shard."""

    step: int
    parameter: str
    shard: int
    rank: float
    error: float


class RunRecorder:
    """Appends rows to the files of a run's folder as they come.

    Args:
        folder: Made if missing.
        start: Step from which the run goes on. Rows after it, left by a run that stopped
            between a checkpoint and its end, are dropped; with 0 all are.
    """

    def __init__(self, folder: Path, start: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.metrics_path = folder / "metrics.csv"
        self.ranks_path = folder / "ranks.csv"
        _truncate(self.metrics_path, MetricsRow, start)
        _truncate(self.ranks_path, RankRow, start)

    def add(self, metrics: MetricsRow, ranks: list[RankRow]) -> None:
        """Writes one point in time to both files."""
        _append(self.metrics_path, [metrics])
        _append(self.ranks_path, ranks)

    def summarise(self, summary: dict[str, Any]) -> None:
        """Writes ``summary.json``."""
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def _truncate(path: Path, row_type: type, start: int) -> None:
    kept = []
    if start and path.exists():
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if int(row["step"]) <= start]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(row_type)])
        writer.writeheader()
        writer.writerows(kept)


def _append(path: Path, rows: list[Any]) -> None:
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        for row in rows:
            values = asdict(row).values()
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in values])
