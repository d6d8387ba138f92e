# SPDX-License-Identifier: Apache-2.0
"""Where blocks lie: fixed in each parameter, cut by shards. Pure data.

A parameter, flattened, is cut into blocks of ``block`` elements from its first one on, and blocks
into quantisation groups of ``group``. A shard holds whole blocks, one after the other, and where
its fragment of a parameter begins or ends inside a block, a part of one::

    parameter    |block 0|block 1|block 2|block 3|bl|        the last block may be shorter
    shard 0      |-------|----
    shard 1                   ---|-------|--
    shard 2                                 -----|--|
    spans         whole   part

A *span* is a run of whole blocks, or one part.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapprox_ds.core import saved

#: Elements made dense at a time where a range is read or written.
CHUNK = 1 << 22

#: Places in a block are int16.
_LARGEST_BLOCK = 1 << 15


@dataclass(frozen=True, slots=True)
class Grid:
    """The cut of parameters into blocks.

    Attributes:
        block: elements of a block, at most 2^15, a multiple of ``group``.
        group: elements that are quantised together, even.
    """

    block: int
    group: int


@dataclass(frozen=True, slots=True)
class Span:
    """``rows`` whole blocks, or one part of a block, of one parameter.

    Attributes:
        offset: index in the flat tensor of the first element.
        start: index in the flattened parameter of the same.
        rows: number of blocks; 1 for a part.
        cols: elements of each.
    """

    offset: int
    start: int
    rows: int
    cols: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.rows * self.cols

    @property
    def end(self) -> int:
        """One past the last element, in the flat tensor."""
        return self.offset + self.numel

    def place(self, grid: Grid) -> Place:
        """Where in their block its elements lie."""
        lead = self.start % grid.block
        base = lead // grid.group * grid.group
        groups = -(-(lead + self.cols) // grid.group) - base // grid.group
        return Place(lead, base, groups * grid.group, groups)


@dataclass(frozen=True, slots=True)
class Place:
    """A span's elements in the coordinates of their block, and the groups that cover them.

    Attributes:
        lead: index in the block of the first element.
        base: index in the block of the first covering group's first element.
        width: elements of all covering groups, a group at a parameter's end taken as full.
        groups: number of covering groups.
    """

    lead: int
    base: int
    width: int
    groups: int

    @property
    def left(self) -> int:
        """Elements of the first covering group that come before the span."""
        return self.lead - self.base

    def code_bytes(self, cols: int) -> tuple[int, int]:
        """(first, last + 1) byte of the covering groups' packed codes that the span needs."""
        return self.left // 2, (self.left + cols + 1) // 2


def cut(start: int, numel: int, offset: int, block: int) -> list[Span]:
    """The spans of a fragment.

    Args:
        start: index in the flattened parameter of its first element.
        numel: its length.
        offset: index in the flat tensor of the first element.
        block: elements of a block.
    """
    edges = [start, min(-(-start // block) * block, start + numel)]
    edges += [max(edges[1], (start + numel) // block * block), start + numel]
    spans = []
    for i, (a, b) in enumerate(itertools.pairwise(edges)):
        if a < b:
            rows, cols = ((b - a) // block, block) if i == 1 else (1, b - a)
            spans.append(Span(offset + a - start, a, rows, cols))
    return spans


def slots_of(span: Span, density: float) -> int:
    """Entries that a step keeps of each block of a span: ceil(density cols), at least 1."""
    # A product such as 0.07 * 100 = 7.000000000000001 means 7.
    return max(1, math.ceil(round(density * span.cols, 6)))


def first_places(sizes: Iterable[int]) -> tuple[tuple[int, ...], int]:
    """Where each of some consecutive pieces begins, and the length of all."""
    *first, total = itertools.accumulate(sizes, initial=0)
    return tuple(first), total


def require_spans(spans: Sequence[Span], numel: int, owner: str) -> None:
    """Raise unless spans are in order, apart from each other and inside the flat tensor.

    Args:
        spans: what lies where.
        numel: length of the flat tensor.
        owner: what an error names.

    Raises:
        ValueError: names the span.
    """
    end = 0
    for span in spans:
        if span.offset < end or span.end > numel:
            raise ValueError(
                f"{owner}: the span at [{span.offset}, {span.end}) overlaps its neighbour or "
                f"leaves the tensor: allowed is [{end}, {numel})"
            )
        end = span.end


def saved_grid(payload: Mapping[str, Any], owner: str) -> tuple[Grid, tuple[Span, ...]]:
    """The blocks and spans of a saved store.

    Args:
        payload: has the fields "grid", (block, group), and "spans", (offset, start, rows, cols).
        owner: what an error names.

    Raises:
        ValueError: they are no integers, or no blocks or parts of one.
    """
    block, group = saved.integers(payload["grid"], f"{owner}: grid", 2, 2)
    if block > _LARGEST_BLOCK or block % group or group % 2:
        raise ValueError(
            f"{owner}: the grid has blocks of {block} and groups of {group}; allowed: blocks of at "
            f"most {_LARGEST_BLOCK}, a multiple of an even group"
        )
    spans = []
    for i, fields in enumerate(saved.items(payload["spans"], f"{owner}: spans")):
        offset, start, rows, cols = saved.integers(fields, f"{owner}: span {i}", 4)
        whole = cols == block and start % block == 0
        if not (rows >= 1 <= cols and (whole or (rows == 1 and start % block + cols <= block))):
            raise ValueError(
                f"{owner}: span {i} has {rows} x {cols} elements from {start} on, which are "
                f"neither whole blocks of {block} nor a part of one"
            )
        spans.append(Span(offset, start, rows, cols))
    return Grid(block, group), tuple(spans)


def chunks(span: Span, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The blocks of a span that reach into [begin, end) of the flat tensor, a chunk at a time.

    Yields:
        (first block, last + 1, place of the first one's first element in the flat tensor).
    """
    lo, hi = max(span.offset, begin), min(span.end, end)
    if lo >= hi:
        return
    first, last = (lo - span.offset) // span.cols, -(-(hi - span.offset) // span.cols)
    height = max(1, CHUNK // span.cols)
    for a in range(first, last, height):
        yield a, min(a + height, last), span.offset + a * span.cols
