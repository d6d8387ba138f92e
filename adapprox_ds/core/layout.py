# SPDX-License-Identifier: Apache-2.0
"""Where the rows of matrices lie in a flat tensor. This is pure data: no tensor is kept here.

ZeRO hands an optimizer one flat 1-D tensor, its shard, in which parameters lie end to end and are
cut anywhere::

    shard    |....pppp|wwwwwwwwwwwwwwwwwwwwwwwww|bbb|000|
                       ^ partial row            ^    ^ padding, belongs to no parameter
                          ^ whole rows: a view     ^ 1-D parameter

The part of a parameter that lies in the shard is a :class:`ParamFragment`. It becomes at most one
:class:`Block`, which is its whole rows, a 2-D view of the shard and never a copy, and some
:class:`DenseRun` for the rest: cut rows, vectors and matrices too small to gain. With
``scope="matrix"`` the block contains the cut rows too: it is then this process's share of a matrix
that all processes factor together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class NamedParameter:
    """A parameter with the name that the user gave, or else one made of its place in the groups."""

    name: str
    param: Tensor


@dataclass(frozen=True, slots=True)
class ParamFragment:
    """A contiguous range of a parameter's elements, and where it lies in a flat tensor.

    Attributes:
        name: the parameter's name. With the block's first row it seeds the block's sketches.
        shape: the shape of the whole parameter, not of the fragment.
        start: the index in the flattened parameter of the fragment's first element.
        numel: the number of elements of the fragment.
        offset: the index in the flat tensor of the fragment's first element.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    offset: int

    @property
    def end(self) -> int:
        """One past the index in the flat tensor of the fragment's last element."""
        return self.offset + self.numel

    def view(self, flat: Tensor) -> Tensor:
        """The fragment as a 1-D view of the flat tensor; shares its storage."""
        return flat[self.offset : self.end]


#: What one factorisation spans: the local rows of a process, or the whole matrix.
SCOPES = ("partition", "matrix")
#: How U is kept, the right factor of a matrix that several processes factor together: each of them
#: has all of U, or each has some rows of it.
RIGHT_FACTORS = ("replicated", "sharded")


@dataclass(frozen=True, slots=True)
class Tile:
    """A rectangle of a block whose elements lie end to end in the flat tensor.

    Attributes:
        offset: the index in the flat tensor of its first element.
        row: the index of its first row, counted from the block's first row.
        rows: the number of its rows.
        col: the index of its first column; 0 unless the tile is a part of one row.
        cols: the number of its columns.
    """

    offset: int
    row: int
    rows: int
    col: int
    cols: int

    @property
    def numel(self) -> int:
        """The number of elements, rows x cols."""
        return self.rows * self.cols

    def view(self, flat: Tensor) -> Tensor:
        """The tile as a (rows, cols) view of the flat tensor; shares its storage."""
        return flat[self.offset : self.offset + self.numel].view(self.rows, self.cols)


@dataclass(frozen=True)
class Block:
    """The local rows of a matrix, and where they lie in a flat tensor.

    Two blocks are equal where they lie alike, whatever they are called.

    Attributes:
        offset: the index in the flat tensor of the block's first element.
        rows: the number of rows, with those that are cut.
        cols: the number of columns of the parameter's 2-D view.
        skip: the number of elements at the start of the first row that lie on other processes.
        missing: the number of elements at the end of the last row that lie on other processes.
        matrix_rows: the number of rows of the whole matrix, where the block is a share of a matrix
            that several processes factor together; None where the block is factored by itself.
        u_rows: [first, end) of the rows of U that this process keeps, where U is in parts; None
            where it keeps all of U.
        name: the parameter's name; empty where only its place is known.
        first_row: the global row index, in the parameter's 2-D view, of the block's first row.
    """

    offset: int
    rows: int
    cols: int
    skip: int = 0
    missing: int = 0
    matrix_rows: int | None = None
    u_rows: tuple[int, int] | None = None
    name: str = field(default="", compare=False)
    first_row: int = field(default=0, compare=False)

    @property
    def numel(self) -> int:
        """The number of elements that lie on this process."""
        return self.rows * self.cols - self.skip - self.missing

    @property
    def rank_bound(self) -> int:
        """The largest rank at which the factors take less memory than the dense matrix."""
        return max_saving_rank(self.matrix_rows or self.rows, self.cols)

    @property
    def end(self) -> int:
        """One past the index in the flat tensor of the block's last element."""
        return self.offset + self.numel

    @property
    def kept_u_rows(self) -> int:
        """How many rows of U this process keeps."""
        return self.cols if self.u_rows is None else self.u_rows[1] - self.u_rows[0]

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        """The block as rectangles: its left partial row, its whole rows, its right partial row.

        Those that have no elements are left out.
        """
        if self.rows == 1:
            return (Tile(self.offset, 0, 1, self.skip, self.numel),)
        left, right = int(self.skip > 0), int(self.missing > 0)
        after_left = self.offset + left * (self.cols - self.skip)
        whole = self.rows - left - right
        tiles = []
        if left:
            tiles.append(Tile(self.offset, 0, 1, self.skip, self.cols - self.skip))
        if whole:
            tiles.append(Tile(after_left, left, whole, 0, self.cols))
        if right:
            at = after_left + whole * self.cols
            tiles.append(Tile(at, self.rows - 1, 1, 0, self.cols - self.missing))
        return tuple(tiles)

    def view(self, flat: Tensor) -> Tensor:
        """A block without cut rows as a (rows, cols) view of the flat tensor."""
        return flat[self.offset : self.offset + self.numel].view(self.rows, self.cols)


@dataclass(frozen=True, slots=True)
class DenseRun:
    """Consecutive elements of a parameter whose second moment is kept dense.

    Attributes:
        name: the parameter's name.
        start: the index in the flattened parameter of the first element.
        numel: the number of elements.
        offset: the index in the flat tensor of the first element.
    """

    name: str
    start: int
    numel: int
    offset: int

    def view(self, flat: Tensor) -> Tensor:
        """The run as a 1-D view of the flat tensor; shares its storage."""
        return flat[self.offset : self.offset + self.numel]


@dataclass(frozen=True)
class FragmentLayout:
    """A fragment, and the block and runs that cover each of its elements exactly once.

    Attributes:
        fragment: the fragment.
        block: its matrix block, or None.
        runs: its dense runs, in the order of their offsets.
    """

    fragment: ParamFragment
    block: Block | None
    runs: tuple[DenseRun, ...]

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        """The tiles of its block; none where it has no block."""
        return () if self.block is None else self.block.tiles

    @cached_property
    def elements(self) -> slice:
        """Where the fragment lies in the flat tensor."""
        return slice(self.fragment.offset, self.fragment.offset + self.fragment.numel)

    @cached_property
    def pieces(self) -> tuple[Tile | DenseRun, ...]:
        """Its tiles and its dense runs, which are the rectangles that first moments are kept by."""
        return (*self.tiles, *self.runs)

    def within(self, piece: Block | Tile | DenseRun) -> slice:
        """Where a piece lies in the fragment."""
        begin = piece.offset - self.fragment.offset
        return slice(begin, begin + piece.numel)

    @cached_property
    def block_elements(self) -> slice:
        """Where the block lies in the fragment."""
        assert self.block is not None
        return self.within(self.block)

    @cached_property
    def run_elements(self) -> tuple[slice, ...]:
        """Where the dense runs lie in the fragment."""
        return tuple(map(self.within, self.runs))


@dataclass(frozen=True)
class ShardLayout:
    """Which part of which parameter lies at which offset in one flat tensor.

    Attributes:
        numel: the length of the flat tensor, with its padding.
        fragments: the fragments in it, in the order of their offsets. Elements that are in no
            fragment are padding, and are neither read nor written.
    """

    numel: int
    fragments: tuple[FragmentLayout, ...]

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """All matrix blocks, in the order of their offsets."""
        return tuple(part.block for part in self.fragments if part.block is not None)

    @cached_property
    def runs(self) -> tuple[DenseRun, ...]:
        """All dense runs, in the order of their offsets."""
        return tuple(run for part in self.fragments for run in part.runs)

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """(offset, rows, cols) of every rectangle: the tiles of all blocks, then the dense runs."""
        tiles = [(t.offset, t.rows, t.cols) for part in self.fragments for t in part.tiles]
        return tiles + [(r.offset, 1, r.numel) for r in self.runs]

    @classmethod
    def build(
        cls,
        fragments: Iterable[ParamFragment],
        numel: int,
        scope: str = "partition",
        sharded_u: bool = False,
    ) -> ShardLayout:
        """Split each fragment into blocks and runs.

        Args:
            fragments: the fragments in any order; empty ones are dropped.
            numel: the length of the flat tensor.
            scope: one of ``SCOPES``.
            sharded_u: with the scope "matrix", whether each process keeps some rows of U only.

        Raises:
            ValueError: fragments overlap, or reach outside the flat tensor or their parameter.
        """
        ordered = sorted((f for f in fragments if f.numel), key=lambda f: f.offset)
        end = 0
        for f in ordered:
            if f.offset < end or f.end > numel:
                raise ValueError(
                    f"fragment of {f.name!r} at [{f.offset}, {f.end}) overlaps its neighbour"
                    f" or leaves the shard: allowed is [{end}, {numel})"
                )
            if f.start < 0 or f.start + f.numel > math.prod(f.shape):
                raise ValueError(
                    f"fragment [{f.start}, {f.start + f.numel}) of {f.name!r} leaves the "
                    f"parameter of shape {f.shape}"
                )
            end = f.end
        parts = tuple(split_fragment(f, scope, sharded_u) for f in ordered)
        return cls(numel=numel, fragments=parts)

    def with_scope(self, scope: str, sharded_u: bool) -> ShardLayout:
        """The layout of the same fragments, split for another scope; see :meth:`build`."""
        fragments = [part.fragment for part in self.fragments]
        return ShardLayout.build(fragments, self.numel, scope, sharded_u)

    @classmethod
    def of_parameter(cls, name: str, shape: Sequence[int]) -> ShardLayout:
        """The layout of a whole parameter that is its own flat tensor (plain torch, stage 0)."""
        numel = math.prod(shape)
        return cls.build([ParamFragment(name, tuple(shape), 0, numel, 0)], numel)


def max_saving_rank(rows: int, cols: int) -> int:
    """The largest k with k * (rows + cols) < rows * cols; 0 where no rank saves memory."""
    return (rows * cols - 1) // (rows + cols)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int] | None:
    """The shape of the most nearly square row-major 2-D view of a parameter.

    A convolution (o, i, h, w) becomes (o, i*h*w), stacked experts (E, m, n) become (E*m, n). The
    leading dimensions become the rows and the others the columns, split where rows + cols, the
    number of elements of factors of rank 1, is smallest; at the first such place where there are
    several.

    Returns:
        (rows, cols); None for a parameter of fewer than two dimensions, or without elements.
    """
    if len(shape) < 2 or math.prod(shape) == 0:
        return None
    splits = [(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape))]
    return min(splits, key=sum)


def rows_of_u(begin: int, end: int, matrix_rows: int) -> tuple[int, int]:
    """The rows of U that the owner of some elements of a matrix keeps, where U is in parts.

    Its part of U's rows is as large, in proportion, as its part of the matrix's elements.

    Args:
        begin: the index in the flattened matrix of the owner's first element.
        end: one past the index of its last element.
        matrix_rows: the number of rows of the matrix.

    Returns:
        [first, end) of the rows of U.
    """
    return begin // matrix_rows, end // matrix_rows


def split_fragment(
    fragment: ParamFragment, scope: str = "partition", sharded_u: bool = False
) -> FragmentLayout:
    """Cut a fragment into a left partial row, a block of whole rows and a right partial row.

    The partial rows become dense runs. With the scope "matrix" the fragment of a matrix that lies
    on several processes is one block, with its cut rows. A fragment is dense as a whole where its
    parameter has no 2-D view, or where factors would save no memory at any rank.

    Args:
        fragment: the fragment.
        scope: one of ``SCOPES``.
        sharded_u: with the scope "matrix", whether each process keeps some rows of U only.
    """
    begin, end = fragment.start, fragment.start + fragment.numel

    def run(lo: int, hi: int) -> tuple[DenseRun, ...]:
        if lo >= hi:
            return ()
        return (DenseRun(fragment.name, lo, hi - lo, fragment.offset + lo - begin),)

    view = matrix_shape(fragment.shape)
    if view is None:
        return FragmentLayout(fragment, None, run(begin, end))
    cols = view[1]
    if scope == "matrix" and fragment.numel < math.prod(view) and max_saving_rank(*view) >= 1:
        share = _share(fragment, *view, sharded_u)
        return FragmentLayout(fragment, share, ())
    first_row, last_row = -(-begin // cols), end // cols
    rows = last_row - first_row
    if rows < 1 or max_saving_rank(rows, cols) < 1:
        return FragmentLayout(fragment, None, run(begin, end))
    lo, hi = first_row * cols, last_row * cols
    offset = fragment.offset + lo - begin
    block = Block(offset, rows, cols, name=fragment.name, first_row=first_row)
    return FragmentLayout(fragment, block, run(begin, lo) + run(hi, end))


def _share(fragment: ParamFragment, matrix_rows: int, cols: int, sharded: bool) -> Block:
    """The block of a fragment whose matrix several processes factor together.

    Args:
        fragment: the fragment.
        matrix_rows: the number of rows of the whole matrix.
        cols: the number of its columns.
        sharded: whether each process keeps some rows of U only.
    """
    begin, end = fragment.start, fragment.start + fragment.numel
    first_row, last_row = begin // cols, -(-end // cols)
    return Block(
        fragment.offset,
        last_row - first_row,
        cols,
        skip=begin - first_row * cols,
        missing=last_row * cols - end,
        matrix_rows=matrix_rows,
        u_rows=rows_of_u(begin, end, matrix_rows) if sharded else None,
        name=fragment.name,
        first_row=first_row,
    )


def gather_runs(runs: Sequence[DenseRun], flat: Tensor) -> Tensor:
    """Copy the dense runs of a flat tensor, end to end, to a new 1-D tensor."""
    return torch.cat([run.view(flat) for run in runs]) if runs else flat.new_empty(0)
