# SPDX-License-Identifier: Apache-2.0
"""Parameters' fragments in a flat tensor, re-viewed as row blocks of matrices. Pure data.

ZeRO hands an optimizer one flat 1-D shard in which parameters lie end to end, cut anywhere::

    shard    |....pppp|wwwwwwwwwwwwwwwwwwwwwwwww|bbb|000|
                       ^ partial row            ^    ^ padding, belongs to nobody
                          ^ whole rows: a view     ^ 1-D parameter

Each fragment of a parameter becomes at most one :class:`MatrixBlock` (its whole rows, a 2-D view
of the shard, never a copy) and some :class:`DenseRun` (cut rows, vectors, tiny matrices). With the
scope "matrix" the block takes the cut rows too: it is then a share of a matrix that is factored as
one over all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from adapprox_ds.lowrank.factors import Place
from adapprox_ds.lowrank.rank import max_saving_rank


@dataclass(frozen=True, slots=True, eq=False)
class NamedParameter:
    """A parameter as the optimizer was given it, or named by its place in the groups."""

    name: str
    param: Tensor


@dataclass(frozen=True, slots=True)
class ParamFragment:
    """A contiguous range of a parameter and where it lies in a flat tensor.

    Attributes:
        name: the parameter's name; with ``start`` it seeds the block's random stream.
        shape: shape of the whole parameter, not of the fragment.
        start: index in the flattened parameter where the fragment starts (inclusive).
        numel: number of elements of the fragment.
        offset: index in the flat tensor where the fragment starts (inclusive).
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    offset: int


#: What one factorisation spans: the rows that a rank holds, or a matrix on all ranks.
SCOPES = ("partition", "matrix")
#: Where the right factor U of a matrix on several ranks is: on each of them, or in parts.
RIGHT_FACTORS = ("replicated", "sharded")


@dataclass(frozen=True, slots=True)
class Tile:
    """A rectangle of a block, contiguous in the flat tensor.

    Attributes:
        offset: index of its first element in the flat tensor.
        row: its first row, counted from the block's first.
        rows: number of rows.
        col: its first column; 0 unless it is a part of one row.
        cols: number of columns.
    """

    offset: int
    row: int
    rows: int
    col: int
    cols: int

    @property
    def numel(self) -> int:
        """Number of elements, rows x cols."""
        return self.rows * self.cols

    def view(self, flat: Tensor) -> Tensor:
        """The tile as a (rows, cols) view of the flat tensor; shares its storage."""
        return flat[self.offset : self.offset + self.numel].view(self.rows, self.cols)


@dataclass(frozen=True, slots=True)
class MatrixBlock:
    """Rows ``[first_row, first_row + rows)`` of a parameter's 2-D view.

    Attributes:
        name: the parameter's.
        first_row: see above.
        rows: number of rows, cut ones included.
        cols: number of columns of the view.
        offset: index of the block's first element in the flat tensor.
        skip: elements of the first row that lie on other ranks.
        missing: elements of the last row that do.
        matrix_rows: rows of the whole matrix where the block is a share of one that is factored as
            one; None where it is factored by itself.
        u_rows: [first, end) of U's rows that the rank keeps, of a share whose U is in parts; None
            where it keeps all.
    """

    name: str
    first_row: int
    rows: int
    cols: int
    offset: int
    skip: int = 0
    missing: int = 0
    matrix_rows: int | None = None
    u_rows: tuple[int, int] | None = None

    @property
    def numel(self) -> int:
        """Number of elements held."""
        return self.rows * self.cols - self.skip - self.missing

    @property
    def rank_bound(self) -> int:
        """The largest rank whose factors are smaller than the dense matrix that is factored."""
        return max_saving_rank(self.matrix_rows or self.rows, self.cols)

    @property
    def place(self) -> Place:
        """What a factored block keeps of it."""
        cut = (self.skip, self.missing, self.matrix_rows, self.u_rows)
        return Place(self.offset, self.rows, self.cols, *cut)

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """The left partial row, the whole rows, the right partial row; those that there are."""
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
    """Elements kept dense: ``numel`` of them from ``offset`` in the flat tensor.

    ``start`` is the index of the first one in the flattened parameter ``name``.
    """

    name: str
    start: int
    numel: int
    offset: int

    def view(self, flat: Tensor) -> Tensor:
        """The run as a 1-D view of the flat tensor; shares its storage."""
        return flat[self.offset : self.offset + self.numel]


@dataclass(frozen=True, slots=True)
class FragmentLayout:
    """One fragment and the pieces that cover it, each element exactly once."""

    fragment: ParamFragment
    blocks: tuple[MatrixBlock, ...]
    runs: tuple[DenseRun, ...]


@dataclass(frozen=True)
class ShardLayout:
    """Every fragment of one flat tensor, in the order of their offsets.

    Attributes:
        numel: length of the flat tensor, padding included.
        fragments: what lies in it; elements in no fragment are padding and never touched.
    """

    numel: int
    fragments: tuple[FragmentLayout, ...]

    @cached_property
    def blocks(self) -> tuple[MatrixBlock, ...]:
        """All matrix blocks, in the order of their offsets."""
        return tuple(block for part in self.fragments for block in part.blocks)

    @cached_property
    def runs(self) -> tuple[DenseRun, ...]:
        """All dense runs, in the order of their offsets."""
        return tuple(run for part in self.fragments for run in part.runs)

    @cached_property
    def param_numel(self) -> int:
        """Elements that belong to a parameter: the length without padding."""
        return sum(part.fragment.numel for part in self.fragments)

    @classmethod
    def build(
        cls,
        fragments: Iterable[ParamFragment],
        numel: int,
        scope: str = "partition",
        sharded_u: bool = False,
    ) -> ShardLayout:
        """Split fragments into pieces.

        Args:
            fragments: in any order; empty ones are dropped.
            numel: length of the flat tensor.
            scope: one of ``SCOPES``.
            sharded_u: with the scope "matrix", whether a share keeps rows of U only.

        Raises:
            ValueError: fragments overlap, or reach outside the flat tensor or their parameter.
        """
        ordered = sorted((f for f in fragments if f.numel), key=lambda f: f.offset)
        end = 0
        for f in ordered:
            if f.offset < end or f.offset + f.numel > numel:
                raise ValueError(
                    f"fragment of {f.name!r} at [{f.offset}, {f.offset + f.numel}) overlaps its "
                    f"neighbour or leaves the shard: allowed is [{end}, {numel})"
                )
            if f.start < 0 or f.start + f.numel > math.prod(f.shape):
                raise ValueError(
                    f"fragment [{f.start}, {f.start + f.numel}) of {f.name!r} leaves the "
                    f"parameter of shape {f.shape}"
                )
            end = f.offset + f.numel
        parts = tuple(split_fragment(f, scope, sharded_u) for f in ordered)
        return cls(numel=numel, fragments=parts)

    def with_scope(self, scope: str, sharded_u: bool) -> ShardLayout:
        """The same fragments, split for another scope."""
        fragments = [part.fragment for part in self.fragments]
        return ShardLayout.build(fragments, self.numel, scope, sharded_u)

    @classmethod
    def of_parameter(cls, name: str, shape: Sequence[int]) -> ShardLayout:
        """The layout of a whole parameter that is its own flat tensor (plain torch, stage 0)."""
        numel = math.prod(shape)
        return cls.build([ParamFragment(name, tuple(shape), 0, numel, 0)], numel)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int] | None:
    """The most nearly square row-major 2-D view of a parameter.

    A convolution (o, i, h, w) becomes (o, i*h*w), stacked experts (E, m, n) become (E*m, n). Of
    all splits of the dimensions into rows and columns this is the one with the fewest factor
    elements a rank, rows + cols; the earliest one where several are equal.

    Returns:
        (rows, cols), or None for parameters of fewer than two dimensions or elements.
    """
    if len(shape) < 2 or math.prod(shape) == 0:
        return None
    splits = [(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape))]
    return min(splits, key=sum)


def rows_of_u(begin: int, end: int, matrix_rows: int) -> tuple[int, int]:
    """Which rows of U belong to elements [begin, end) of a flattened matrix, where U is in parts.

    As many of U's rows as elements of the matrix, in proportion.
    """
    return begin // matrix_rows, end // matrix_rows


def split_fragment(
    fragment: ParamFragment, scope: str = "partition", sharded_u: bool = False
) -> FragmentLayout:
    """Cut a fragment into left partial row, block of whole rows, right partial row.

    With the scope "matrix" a part of a matrix is one block, its cut rows included. A block of which
    no rank saves memory stays dense, as do parameters without a 2-D view.
    """
    begin, end = fragment.start, fragment.start + fragment.numel

    def run(lo: int, hi: int) -> tuple[DenseRun, ...]:
        if lo >= hi:
            return ()
        return (DenseRun(fragment.name, lo, hi - lo, fragment.offset + lo - begin),)

    view = matrix_shape(fragment.shape)
    if view is None:
        return FragmentLayout(fragment, (), run(begin, end))
    cols = view[1]
    if scope == "matrix" and fragment.numel < math.prod(view) and max_saving_rank(*view) >= 1:
        share = _share(fragment, *view, sharded_u)
        return FragmentLayout(fragment, (share,), ())
    first_row, last_row = -(-begin // cols), end // cols
    rows = last_row - first_row
    if rows < 1 or max_saving_rank(rows, cols) < 1:
        return FragmentLayout(fragment, (), run(begin, end))
    lo, hi = first_row * cols, last_row * cols
    block = MatrixBlock(fragment.name, first_row, rows, cols, fragment.offset + lo - begin)
    return FragmentLayout(fragment, (block,), run(begin, lo) + run(hi, end))


def _share(fragment: ParamFragment, matrix_rows: int, cols: int, sharded: bool) -> MatrixBlock:
    """A part of a matrix that is factored as one over the ranks."""
    begin, end = fragment.start, fragment.start + fragment.numel
    first_row, last_row = begin // cols, -(-end // cols)
    return MatrixBlock(
        fragment.name,
        first_row,
        last_row - first_row,
        cols,
        fragment.offset,
        skip=begin - first_row * cols,
        missing=last_row * cols - end,
        matrix_rows=matrix_rows,
        u_rows=rows_of_u(begin, end, matrix_rows) if sharded else None,
    )


def gather_runs(runs: Sequence[DenseRun], flat: Tensor) -> Tensor:
    """The dense runs of a flat tensor, end to end, as a new 1-D tensor without padding."""
    return torch.cat([run.view(flat) for run in runs]) if runs else flat.new_empty(0)
