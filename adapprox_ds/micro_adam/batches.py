# SPDX-License-Identifier: Apache-2.0
"""Collects the blocks of flat tensors into batches, each of which one call of ``update`` steps.

Whole blocks are consecutive in a flat tensor, so their batches are views of it. A part of a block
is copied to a frame, which is as wide as the quantisation groups that cover the part, and copied
back after the step. Frames of equal width form one batch, whatever tensor or parameter they are of.
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
    """One flat tensor with everything that a step reads and writes.

    Attributes:
        w: the weights, (numel,).
        g: the gradients, (numel,); only read.
        window: its window.
        error: its error, with the same spans.
        compensation: what rounding took from the weights, (numel,) int8; None where it is not kept.
    """

    w: Tensor
    g: Tensor
    window: WindowStore
    error: ErrorStore
    compensation: Tensor | None = None


def batches(flats: Sequence[Flat], tile: int) -> Iterator[Batch]:
    """Yield all blocks of some flat tensors, in batches.

    Args:
        flats: the tensors. They have the same device and the same dtypes of weights and gradients,
            and their stores have the same grid, length of the window and bits.
        tile: the largest number of elements of a batch; a batch of one block may be larger.
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
    """Yield the whole blocks of one span, in batches of ``height`` blocks."""
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
    """A part of a block; its tensors are views of the flat tensor and its stores.

    Attributes:
        span: the offset of the part and its size.
        place: its place in the block.
        group: the number of elements of a quantisation group; 0 for an error that is kept in full.
        w, g, compensation: as of :class:`Flat`, (cols,).
        indices, values: the part's entries in the window, (window, slots).
        error: the part's error, with one row.
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
        """The part that is span ``i`` of a flat tensor."""
        span, grid = flat.window.spans[i], flat.window.grid
        indices, values = (t[:, 0] for t in flat.window.entries(i))
        w, g = (t[span.offset : span.end] for t in (flat.w, flat.g))
        group = grid.group if flat.error.bits == 4 else 0
        rest = flat.compensation
        rest = None if rest is None else rest[span.offset : span.end]
        return cls(span, span.place(grid), group, w, g, indices, values, flat.error.rows(i), rest)

    @property
    def columns(self) -> slice:
        """The columns of a frame that the part's elements have."""
        return slice(self.place.left, self.place.left + self.span.cols)

    @property
    def code_columns(self) -> slice:
        """The columns of a frame's codes that the part's codes have."""
        return slice(*self.place.code_bytes(self.span.cols)) if self.group else self.columns


@dataclass(slots=True)
class _Frames(Batch):
    """A batch of frames: copies of parts, which :meth:`write_back` copies to where they are from.

    Attributes:
        parts: the part of each frame.
    """

    parts: Sequence[_Part] = ()

    @classmethod
    def of(cls, parts: Sequence[_Part]) -> _Frames:
        """Make frames of parts; their frames must have one width."""
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
        """Copy everything that the step changed from the frames to the flat tensors."""
        for inside, held in self._pairs():
            torch._foreach_copy_(held, inside)

    def _pairs(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Yield, for each tensor that a step updates, views of the frames and views of the parts.

        The two lists of views have the same shapes, so that one can be copied to the other.
        """
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
