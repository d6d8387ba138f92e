# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds, as a table: native ones of ZeRO and universal ones."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from adapprox_ds.checkpoint import files
from adapprox_ds.checkpoint.files import CheckpointError
from adapprox_ds.checkpoint.finished import last_finished
from adapprox_ds.checkpoint.folder import open_universal
from adapprox_ds.checkpoint.moments import is_adapprox, kind_of
from adapprox_ds.checkpoint.native import open_native
from adapprox_ds.checkpoint.reshard import Piece, piece_of
from adapprox_ds.lowrank.factors import FactoredBlock
from adapprox_ds.lowrank.moment import LowRankMoment
from adapprox_ds.lowrank.quantized import QuantizedMoment


@dataclass(frozen=True, slots=True)
class Row:
    """One trainable parameter.

    Attributes:
        name: as the model names it.
        shape: of the whole parameter.
        ranks: of each row block, in order; empty where the second moment is dense.
        second_bytes: what the second moment takes.
        first_bytes: what the first moment takes.
        error: the largest known error ratio of the blocks; NaN where none is known.
        step: steps done.
    """

    name: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    second_bytes: int
    first_bytes: int
    error: float
    step: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Report:
    """What a checkpoint holds.

    Attributes:
        title: its kind, and what saved it.
        rows: one a trainable parameter.
        frozen: number of parameters that are not trained; None where that is not recorded.
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
        lines.append(("total", "", "", _size(second), _size(dense), ""))
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
                f"optimizer state {_size(first + second)}, AdamW's {_size(2 * dense)}",
                "",
                *text,
            ]
        )


def _first_bytes(piece: Tensor) -> int:
    """What a fragment's first moment takes."""
    if isinstance(piece, QuantizedMoment):
        return piece.store.bytes_between(piece.start, piece.start + piece.numel())
    return piece.nbytes


_BYTES = ("second_bytes", "first_bytes")


def inspect(folder: str | os.PathLike[str]) -> Report:
    """Read what a checkpoint holds; a run's root stands for its latest checkpoint.

    Raises:
        CheckpointError: it is incomplete, damaged, of an unknown version or no checkpoint.
    """
    path = Path(folder)
    for latest in (files.LATEST_UNIVERSAL, files.LATEST):
        if (path / latest).is_file():
            return _latest(path, latest)
    return _one(files.resolve(path, files.LATEST))


def _latest(root: Path, latest: str) -> Report:
    """What a run's root points at; where that was not finished, the error names what was."""
    try:
        return _one(files.resolve(root, latest))
    except CheckpointError as error:
        if latest == files.LATEST_UNIVERSAL:
            raise
        # Where there is none, that is the error.
        raise CheckpointError(f"{error}. The last finished one is {last_finished(root)}") from error


def _one(path: Path) -> Report:
    universal = (path / files.ZERO).exists() or path.name.endswith(files.PARTIAL_SUFFIX)
    if universal or (path / files.UNFINISHED).exists():
        return _universal(path)
    return _native(path)


def _universal(path: Path) -> Report:
    source = open_universal(path)
    rows = []
    for name in sorted(source.names):
        second = source.tensor(name, files.EXP_AVG_SQ)
        first = source.tensor(name, files.EXP_AVG).nbytes if source.has_first_moment(name) else 0
        shape = tuple(source.tensor(name, files.FP32).shape)
        rows.append(_row(name, shape, [second], first, source.step(name)))
    for _ in source.fixed():
        pass  # that each file opens
    saved = source.source
    title = f"universal checkpoint {path} of " + (
        f"stage {saved['stage']} on {saved['world']} ranks" if saved else "DeepSpeed's converter"
    )
    frozen = None if source.frozen is None else len(source.frozen)
    return Report(f"{title}; {_optimizer(source.groups)}", tuple(rows), frozen)


def _native(path: Path) -> Report:
    open_native.cache_clear()
    checkpoint = open_native(path.resolve())
    rows = []
    for name in sorted(checkpoint.parameters):
        p = checkpoint.parameters[name]
        parts: list[Tensor | Piece] = []
        first = 0
        for h in p.held:
            moment = checkpoint.second(h.rank, h.flat)
            parts.append(
                piece_of(moment.store, h.fragment)
                if isinstance(moment, LowRankMoment)
                else moment[h.fragment.offset : h.fragment.offset + h.fragment.numel]
            )
            m = checkpoint.first(h)
            first += 0 if m is None else _first_bytes(m)
        step = int(checkpoint.state(p.held[0].rank, p.held[0].flat).get("step", 0))
        rows.append(_row(name, p.shape, parts, first, step))
    title = f"checkpoint {path} of stage {checkpoint.stage} on {checkpoint.world} ranks"
    frozen = sum(1 for _ in checkpoint.frozen())
    return Report(f"{title}; {_optimizer(checkpoint.groups)}", tuple(rows), frozen)


def _optimizer(groups: Sequence[Mapping[str, Any]]) -> str:
    """Whose state it is, and what its first moment is the mean of."""
    name = "Adapprox" if any(is_adapprox(group) for group in groups) else "Adam"
    kinds = [f"{kind_of(group)}s" for group in groups]
    if len(set(kinds)) == 1:
        return f"{name}, first moment of {kinds[0]}"
    return f"{name}, first moments by group: {', '.join(kinds)}"


def _row(
    name: str, shape: tuple[int, ...], parts: Sequence[Tensor | Piece], first: int, step: int
) -> Row:
    blocks = [b for part in parts for b in _blocks(part)]
    errors = [b.error for b in blocks if not math.isnan(b.error)]
    return Row(
        name=name,
        shape=shape,
        ranks=tuple(b.q.shape[1] for b in blocks),
        second_bytes=sum(_bytes(part) for part in parts),
        first_bytes=first,
        error=max(errors, default=math.nan),
        step=step,
    )


def _blocks(part: Tensor | Piece) -> Iterator[FactoredBlock]:
    if isinstance(part, Piece):
        yield from part.blocks
    elif isinstance(part, LowRankMoment):
        yield from part.store.blocks


def _bytes(part: Tensor | Piece) -> int:
    if isinstance(part, Piece):
        factors = sum(b.q.nbytes + b.u.nbytes for b in part.blocks)
        return factors + sum(values.nbytes for _, values in part.runs)
    return part.allocated_bytes if isinstance(part, LowRankMoment) else part.nbytes


def _cells(row: Row) -> tuple[str, ...]:
    if not row.ranks:
        ranks = "dense"
    elif len(row.ranks) == 1:
        ranks = str(row.ranks[0])
    else:
        low, high = min(row.ranks), max(row.ranks)
        ranks = f"{low if low == high else f'{low}-{high}'} x{len(row.ranks)}"
    error = "" if math.isnan(row.error) else f"{row.error:.2e}"
    shape = "x".join(map(str, row.shape)) or "scalar"
    return (row.name, shape, ranks, _size(row.second_bytes), _size(4 * row.numel), error)


def _size(n: int) -> str:
    value = float(n)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{n} B" if unit == "B" else f"{value:.1f} {unit}"
