# SPDX-License-Identifier: Apache-2.0
"""Where MicroAdam's blocks lie in a flat tensor. This is pure data: no tensor is kept here.

A flattened parameter is divided into blocks of ``block`` elements, counted from its first element,
and each block into quantisation groups of ``group`` elements. A shard contains whole blocks, end to
end, and, where its fragment of a parameter begins or ends inside a block, a part of a block::

    parameter    |block 0|block 1|block 2|block 3|bl|        the last block may be shorter
    shard 0      |-------|----
    shard 1                   ---|-------|--
    shard 2                                 -----|--|
    spans         whole   part

A *span* is several consecutive whole blocks of a parameter, or one part of a block.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapprox_ds.core import saved

#: The number of elements that are made dense at a time where a range is read or written.
CHUNK = 1 << 22

#: The largest number of elements of a block, since an index in a block is int16.
MAX_BLOCK = 1 << 15


@dataclass(frozen=True, slots=True)
class Grid:
    """The sizes of blocks and quantisation groups.

    Attributes:
        block: the number of elements of a block, a multiple of ``group`` and at most 2^15. The last
            block of a parameter may be shorter.
        group: the number of elements of a quantisation group, which is even.
    """

    block: int
    group: int


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive whole blocks, or one part of a block, of one parameter.

    Attributes:
        offset: the index in the flat tensor of the first element.
        start: the index in the flattened parameter of the first element.
        rows: the number of blocks; 1 for a part.
        cols: the number of elements of each block, or of the part.
    """

    offset: int
    start: int
    rows: int
    cols: int

    @property
    def numel(self) -> int:
        """The number of elements, rows x cols."""
        return self.rows * self.cols

    @property
    def end(self) -> int:
        """One past the index in the flat tensor of the last element."""
        return self.offset + self.numel

    def place(self, grid: Grid) -> Place:
        """The place of its elements in their block."""
        lead = self.start % grid.block
        base = lead // grid.group * grid.group
        groups = -(-(lead + self.cols) // grid.group) - base // grid.group
        return Place(lead, base, groups * grid.group, groups)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a span's elements lie in their block, and the quantisation groups that cover them.

    Attributes:
        lead: the index in the block of the span's first element.
        base: the index in the block of the first element of the first covering group.
        width: the number of elements of all covering groups, where a group that the parameter's end
            makes shorter counts as a full one.
        groups: the number of covering groups.
    """

    lead: int
    base: int
    width: int
    groups: int

    @property
    def left(self) -> int:
        """The number of elements of the first covering group that come before the span."""
        return self.lead - self.base

    def code_bytes(self, cols: int) -> tuple[int, int]:
        """The range [first, end) of bytes that the span's codes take.

        The bytes are counted in the packed codes of the covering groups, two codes to a byte.

        Args:
            cols: the number of elements of the span.
        """
        return self.left // 2, (self.left + cols + 1) // 2


def cut(start: int, numel: int, offset: int, block: int) -> list[Span]:
    """Divide a fragment into at most three spans: a part, whole blocks and a part.

    Args:
        start: the index in the flattened parameter of the fragment's first element.
        numel: the number of its elements.
        offset: the index in the flat tensor of its first element.
        block: the number of elements of a block.
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
    """The number of entries that a step keeps of each block: ceil(density cols), at least 1."""
    # The product is rounded first, as 0.07 * 100 = 7.000000000000001 means 7.
    return max(1, math.ceil(round(density * span.cols, 6)))


def first_places(sizes: Iterable[int]) -> tuple[tuple[int, ...], int]:
    """The index at which each of some consecutive pieces begins, and the sum of their sizes."""
    *first, total = itertools.accumulate(sizes, initial=0)
    return tuple(first), total


def require_spans(spans: Sequence[Span], numel: int, owner: str) -> None:
    """Raise unless spans are in order, do not overlap and lie inside the flat tensor.

    Args:
        spans: the spans.
        numel: the length of the flat tensor.
        owner: the name of the state, for the error.

    Raises:
        ValueError: a span is wrong; the message names it.
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
    """The grid and the spans of a saved store, checked.

    Args:
        payload: the saved fields: "grid" is (block, group), and "spans" has (offset, start, rows,
            cols) of each span.
        owner: the name of the state, for the error.

    Raises:
        ValueError: they are no integers, or a span is neither whole blocks nor a part of a block.
    """
    block, group = saved.integers(payload["grid"], f"{owner}: grid", 2, 2)
    if block > MAX_BLOCK or block % group or group % 2:
        raise ValueError(
            f"{owner}: the grid has blocks of {block} and groups of {group}; allowed: blocks of at "
            f"most {MAX_BLOCK}, a multiple of an even group"
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
    """Yield the blocks of a span that overlap [begin, end) of the flat tensor, in chunks.

    Yields:
        The range [first, end) of the chunk's blocks in the span, and the index in the flat tensor
        of its first element.
    """
    lo, hi = max(span.offset, begin), min(span.end, end)
    if lo >= hi:
        return
    first, last = (lo - span.offset) // span.cols, -(-(hi - span.offset) // span.cols)
    height = max(1, CHUNK // span.cols)
    for a in range(first, last, height):
        yield a, min(a + height, last), span.offset + a * span.cols
