# SPDX-License-Identifier: Apache-2.0
"""Lists the parameters of a checkpoint with the size of their optimizer state (``inspect``).

It reads checkpoints of ``engine.save_checkpoint`` under ZeRO, and universal ones.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from adapprox_ds.checkpoint import files
from adapprox_ds.checkpoint.family import StateSize, family_of
from adapprox_ds.checkpoint.files import CheckpointError
from adapprox_ds.checkpoint.finished import last_finished
from adapprox_ds.checkpoint.folder import open_universal
from adapprox_ds.checkpoint.native import open_native


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(StateSize):
    """One trainable parameter, with the size of its state.

    Attributes:
        name: the name that the model gives it.
        shape: the shape of the whole parameter.
        step: the number of steps done on it.
    """

    name: str
    shape: tuple[int, ...]
    step: int

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Report:
    """The content of a checkpoint.

    Attributes:
        title: the kind of the checkpoint, its path, and the run and optimizer that saved it.
        rows: a row for each trainable parameter.
        frozen: the number of parameters that are not trained; None where it is not recorded.
    """

    title: str
    rows: tuple[Row, ...]
    frozen: int | None

    def table(self) -> str:
        """The report as text."""
        header = ("parameter", "shape", "rank", "2nd moment", "dense", "error")
        lines = [header, *(_cells(row) for row in self.rows)]
        second, first = (sum(getattr(r, k) for r in self.rows) for k in _BYTES)
        dense = sum(4 * r.numel for r in self.rows)
        lines.append(("total", "", "", sized(second, 1), sized(dense, 1), ""))
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        text = [
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        steps = sorted({row.step for row in self.rows})
        frozen = "" if self.frozen is None else f", {self.frozen} frozen"
        return "\n".join(
            [
                self.title,
                f"step {', '.join(map(str, steps))}; {len(self.rows)} trained parameters{frozen}; "
                f"optimizer state {sized(first + second, 1)}, AdamW's {sized(2 * dense, 1)}",
                "",
                *text,
            ]
        )


_BYTES = ("second_bytes", "first_bytes")


def inspect(folder: str | os.PathLike[str], *, trusted: bool = False) -> Report:
    """List the content of a checkpoint.

    Args:
        folder: a checkpoint, or a run's root, which stands for its latest checkpoint.
        trusted: whether to load objects of any class, which can run any code. Otherwise a file with
            an object that is not safe to load is an error.

    Raises:
        CheckpointError: the folder is no checkpoint, or one that is incomplete, damaged or of an
            unknown version.
    """
    path = Path(folder)
    for latest in (files.LATEST_UNIVERSAL, files.LATEST):
        if (path / latest).is_file():
            return _latest(path, latest, trusted)
    return _one(files.resolve(path, files.LATEST), trusted)


def _latest(root: Path, latest: str, trusted: bool) -> Report:
    """The report of the checkpoint that a run's root names in its file ``latest``.

    If that one cannot be read, the error names the last one that was finished.
    """
    try:
        return _one(files.resolve(root, latest), trusted)
    except CheckpointError as error:
        if latest == files.LATEST_UNIVERSAL:
            raise
        found = last_finished(root, trusted=trusted)
        raise CheckpointError(f"{error}. The last finished one is {found}") from error


def _one(path: Path, trusted: bool) -> Report:
    universal = (path / files.ZERO).exists() or path.name.endswith(files.PARTIAL_SUFFIX)
    if universal or (path / files.UNFINISHED).exists():
        return _universal(path)
    return _native(path, trusted)


def _universal(path: Path) -> Report:
    source = open_universal(path)
    rows = []
    family = family_of(source.groups)
    for name in sorted(source.names):
        shape = tuple(source.tensor(name, files.FP32).shape)
        size = asdict(family.universal_size(source, name))
        rows.append(Row(name=name, shape=shape, step=source.step(name), **size))
    for _ in source.fixed():
        pass  # this checks that each file opens
    saved = source.source
    title = f"universal checkpoint {path} of " + (
        f"stage {saved['stage']} on {saved['world']} processes"
        if saved
        else "DeepSpeed's converter"
    )
    frozen = None if source.frozen is None else len(source.frozen)
    return Report(f"{title}; {family.describe(source.groups)}", tuple(rows), frozen)


def _native(path: Path, trusted: bool) -> Report:
    open_native.cache_clear()
    checkpoint = open_native(path.resolve(), trusted)
    family = family_of(checkpoint.groups)
    rows = []
    for name in sorted(checkpoint.parameters):
        p = checkpoint.parameters[name]
        state = checkpoint.state(p.parts[0].process, p.parts[0].flat)
        step = int(state["step"]) if "step" in state else family.step(checkpoint, p)
        size = asdict(family.native_size(checkpoint, p))
        rows.append(Row(name=name, shape=p.shape, step=step, **size))
    title = f"checkpoint {path} of stage {checkpoint.stage} on {checkpoint.world} processes"
    frozen = sum(1 for _ in checkpoint.frozen())
    return Report(f"{title}; {family.describe(checkpoint.groups)}", tuple(rows), frozen)


def _cells(row: Row) -> tuple[str, ...]:
    if row.ranks is None:
        ranks = "-"
    elif not row.ranks:
        ranks = "dense"
    elif len(row.ranks) == 1:
        ranks = str(row.ranks[0])
    else:
        low, high = min(row.ranks), max(row.ranks)
        ranks = f"{low if low == high else f'{low}-{high}'} x{len(row.ranks)}"
    error = "" if math.isnan(row.error) else f"{row.error:.2e}"
    shape = "x".join(map(str, row.shape)) or "scalar"
    return (row.name, shape, ranks, sized(row.second_bytes, 1), sized(4 * row.numel, 1), error)


def sized(n: int, digits: int = 2) -> str:
    """A number of bytes as short text, in a binary unit."""
    value, unit = float(n), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if value >= 1024:
            value, unit = value / 1024, larger
    return f"{n} B" if unit == "B" else f"{value:,.{digits}f} {unit}"
