# SPDX-License-Identifier: Apache-2.0
"""Brings the blocks of shards together in batches: whole ones as views, parts in frames.

A frame is as wide as the groups that cover a part, so that parts of equal width make one batch,
whatever shard or parameter they are of.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapprox_ds.core.rounding import is_rounded
from adapprox_ds.micro_adam.feedback import ErrorRows, ErrorStore
from adapprox_ds.micro_adam.grid import Place, Span
from adapprox_ds.micro_adam.step import Batch
from adapprox_ds.micro_adam.window import WindowStore


@dataclass(frozen=True, slots=True)
class Flat:
    """One flat tensor with all that a step reads and writes.

    Attributes:
        w: weights, (numel,).
        g: gradients, (numel,); only read.
        window: its window.
        error: its error; of the same spans.
        compensation: what rounding took from the weights, (numel,) int8; or None.
    """

    w: Tensor
    g: Tensor
    window: WindowStore
    error: ErrorStore
    compensation: Tensor | None = None


def batches(flats: Sequence[Flat], tile: int) -> Iterator[Batch]:
    """All blocks of some flat tensors of one device, dtype and kind of state.

    Args:
        flats: the tensors; their stores' grids, windows and bits are the same, and the dtypes of
            their gradients.
        tile: elements of a batch, at most, if a block has not more.
    """
    parts: dict[int, list[_Part]] = defaultdict(list)
    for flat in flats:
        grid = flat.window.grid
        for i, span in enumerate(flat.window.spans):
            if span.cols == grid.block:
                yield from _whole(flat, i, max(1, tile // grid.block))
            else:
                part = _Part.of(flat, i)
                parts[part.place.width].append(part)
    for width, alike in parts.items():
        height = max(1, tile // width)
        for first in range(0, len(alike), height):
            yield _Frames.of(alike[first : first + height])


def _whole(flat: Flat, i: int, height: int) -> Iterator[Batch]:
    """The whole blocks of one span, ``height`` at a time."""
    span, grid = flat.window.spans[i], flat.window.grid
    w, g = (t[span.offset : span.end].view(span.rows, span.cols) for t in (flat.w, flat.g))
    indices, values = flat.window.entries(i)
    error, group = flat.error.rows(i), grid.group if flat.error.bits == 4 else 0
    first = rest = None
    if is_rounded(w.dtype):
        first = torch.arange(span.rows, dtype=torch.int64, device=w.device)
        first = first.mul_(span.cols).add_(span.start)
    if flat.compensation is not None:
        rest = flat.compensation[span.offset : span.end].view(span.rows, span.cols)
    for a in range(0, span.rows, height):
        rows = slice(a, a + height)
        batch = Batch(w[rows], g[rows], indices[:, rows], values[:, rows], error[rows], group)
        batch.first = None if first is None else first[rows]
        batch.compensation = None if rest is None else rest[rows]
        yield batch


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a block; all are views.

    Attributes:
        span: what lies where.
        place: where in its block.
        group: elements of a group; 0 for an error that is kept in full.
        w, g, compensation: (cols,), the last may be None.
        indices, values: (window, slots).
        error: of one row.
    """

    span: Span
    place: Place
    group: int
    w: Tensor
    g: Tensor
    indices: Tensor
    values: Tensor
    error: ErrorRows
    compensation: Tensor | None

    @classmethod
    def of(cls, flat: Flat, i: int) -> _Part:
        """Of a flat tensor's span."""
        span, grid = flat.window.spans[i], flat.window.grid
        indices, values = (t[:, 0] for t in flat.window.entries(i))
        w, g = (t[span.offset : span.end] for t in (flat.w, flat.g))
        group = grid.group if flat.error.bits == 4 else 0
        rest = flat.compensation
        rest = None if rest is None else rest[span.offset : span.end]
        return cls(span, span.place(grid), group, w, g, indices, values, flat.error.rows(i), rest)

    @property
    def columns(self) -> slice:
        """Of its elements in the frame."""
        return slice(self.place.left, self.place.left + self.span.cols)

    @property
    def code_columns(self) -> slice:
        """Of its codes in the frame's."""
        return slice(*self.place.code_bytes(self.span.cols)) if self.group else self.columns


@dataclass(slots=True)
class _Frames(Batch):
    """Parts, copied into frames and back.

    Attributes:
        parts: one a row.
    """

    parts: Sequence[_Part] = ()

    @classmethod
    def of(cls, parts: Sequence[_Part]) -> _Frames:
        """Parts whose frames are equally wide."""
        first, rows = parts[0], len(parts)
        width, slots = first.place.width, [p.indices.shape[1] for p in parts]
        most, window, device = max(slots), first.indices.shape[0], first.w.device
        lefts, ends = [p.columns.start for p in parts], [p.columns.stop for p in parts]
        firsts = [p.span.start - p.place.left for p in parts]
        rowwise = [[p.place.base for p in parts], lefts, ends, slots, firsts]
        host = torch.tensor(rowwise, dtype=torch.int64, device="cpu")
        if device.type != "cpu":
            host = host.pin_memory().to(device, non_blocking=True)
        base, left, end, count, index = host.unsqueeze(-1)
        column = torch.arange(width, device=device)
        grouped = bool(first.group)
        codes = width // 2 if grouped else width
        groups = first.place.groups if grouped else 0
        frames = cls(
            w=first.w.new_zeros(rows, width),
            g=first.g.new_zeros(rows, width),
            indices=base.to(torch.int16).expand(window, rows, most).clone(),
            values=first.values.new_zeros(window, rows, most),
            error=ErrorRows(
                first.error.codes.new_zeros(rows, codes),
                *(first.error.low.new_zeros(rows, groups) for _ in range(2)),
            ),
            group=first.group,
            outside=(column < left) | (column >= end),
            surplus=torch.arange(most, device=device) >= count,
            base=base,
            first=index[:, 0] if is_rounded(first.w.dtype) else None,
            parts=parts,
        )
        if first.compensation is not None:
            frames.compensation = first.compensation.new_zeros(rows, width)
        grads = [frames.g[i, p.columns] for i, p in enumerate(parts)]
        torch._foreach_copy_(grads, [p.g for p in parts])
        for inside, held in frames._pairs():
            torch._foreach_copy_(inside, held)
        return frames

    def write_back(self) -> None:
        """Let the shards have what changed."""
        for inside, held in self._pairs():
            torch._foreach_copy_(held, inside)

    def _pairs(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """For each tensor that a step updates the parts of the frames, and what they are of."""
        numbered = list(enumerate(self.parts))
        yield [self.w[i, p.columns] for i, p in numbered], [p.w for p in self.parts]
        if self.compensation is not None:
            inside = [self.compensation[i, p.columns] for i, p in numbered]
            yield inside, [p.compensation for p in self.parts if p.compensation is not None]
        for ring, name in ((self.indices, "indices"), (self.values, "values")):
            held = [getattr(p, name) for p in self.parts]
            yield [ring[:, i, : h.shape[1]] for i, h in enumerate(held)], held
        yield (
            [self.error.codes[i, p.code_columns] for i, p in numbered],
            [p.error.codes[0] for p in self.parts],
        )
        if self.group:
            yield list(self.error.low), [p.error.low[0] for p in self.parts]
            yield list(self.error.high), [p.error.high[0] for p in self.parts]
