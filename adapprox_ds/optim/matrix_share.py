# SPDX-License-Identifier: Apache-2.0
"""One rank's rows of matrices that several ranks factor as one each, through a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adapprox_ds import kernels
from adapprox_ds.kernels.interface import StepScalars
from adapprox_ds.lowrank.factors import FactoredBlock, replace_factors
from adapprox_ds.lowrank.rank import max_saving_rank, rank_in_use
from adapprox_ds.lowrank.rounding import round_factors, rounding_salt
from adapprox_ds.lowrank.sketch import gaussian_sketches, sketch_key, sketch_width
from adapprox_ds.lowrank.subspace import SharedBasis, dominant, tracking_sketch
from adapprox_ds.optim.balance import balancing_weights, factor_sums, floor_vectors
from adapprox_ds.optim.fragment import Fragment
from adapprox_ds.optim.hyperparameters import Hyperparameters
from adapprox_ds.zero.layout import MatrixBlock, Tile
from adapprox_ds.zero.peers import CutParameter


@dataclass(slots=True)
class Cut:
    """A cut parameter, and what this rank has of it."""

    parameter: CutParameter
    fragment: Fragment | None
    most: int  # its largest rank; 0 where it is dense
    width: int  # of its sketch at that rank

    @property
    def cols(self) -> int:
        """Columns of its 2-D view; 0 for a vector."""
        return self.parameter.matrix[1] if self.parameter.matrix else 0


def cut_of(parameter: CutParameter, fragment: Fragment | None, h: Hyperparameters) -> Cut:
    """A cut parameter with the width of its sketch."""
    matrix, most, width = parameter.matrix, 0, 0
    if matrix is not None and (bound := max_saving_rank(*matrix)) >= 1:
        most = int(h.rank_control.clip(float(h.rank_max), bound))
        width = sketch_width(most, h.oversampling, *matrix)
    return Cut(parameter, fragment, most, width)


def own_rows(block: MatrixBlock | FactoredBlock) -> slice:
    """Which of a share's rows this rank counts: those whose first element it holds."""
    return slice(int(block.skip > 0), None)


def first_size(cut: Cut) -> int:
    """Numbers of the second all-reduce: the sum of X^2, column sums, and each cut row's."""
    if not cut.width:
        return 1
    return 1 + cut.cols + len(cut.parameter.cut_rows) * (cut.width + 1)


class Shares:
    """This rank's rows of matrices that lie alike on the ranks, through a step.

    Attributes:
        numbers: which of a wave's matrices they are; B in all.

    Args:
        numbers: see above.
        cuts: all matrices of the wave.
        grams: sums of Q^T Q of all of the wave.
        whole_u: of these B, where a rank keeps U in parts; else None.
        t: the step, 1 at the first.
        h: the settings.
    """

    def __init__(
        self,
        numbers: Sequence[int],
        cuts: Sequence[Cut],
        grams: Sequence[Tensor],
        whole_u: list[Tensor] | None,
        t: int,
        h: Hyperparameters,
    ) -> None:
        self.numbers, self.cuts = numbers, [cuts[i] for i in numbers]
        self.fragments = [c.fragment for c in self.cuts if c.fragment is not None]
        self.factors: list[FactoredBlock] = [f.factors[0] for f in self.fragments]
        self.h, self.salt, dtype = h, rounding_salt(~t), self.fragments[0].dtype
        blocks = [f.layout.blocks[0] for f in self.fragments]
        self.cut, self.block = self.cuts[0], blocks[0]
        #: Of each tile, every one's.
        self.tiles = list(zip(*(block.tiles for block in blocks), strict=True))
        self.q = torch.stack([f.q for f in self.factors]).to(dtype)
        self.rows, self.cols = self.block.matrix_rows or 0, self.block.cols
        self.rank, k = rank_in_use(self.factors[0].rank), self.q.shape[2]
        every_u = [f.u for f in self.factors] if whole_u is None else [u[:, :k] for u in whole_u]
        self.u = torch.stack(every_u).to(dtype)
        #: U's rows that this rank keeps.
        self.own = slice(None) if self.block.u_rows is None else slice(*self.block.u_rows)
        gram = torch.stack([grams[i][: k * k] for i in numbers]).view(-1, k, k).to(dtype)
        row_sums, col_sums, scale = factor_sums(self.q, self.u, gram)
        size = (self.cols, sketch_width(self.rank, h.oversampling, self.rows, self.cols))
        keys = [sketch_key(h.seed, block.name, 0, t) for block in blocks]
        fresh = gaussian_sketches(keys, size, self.u)
        weights = balancing_weights(col_sums, bool(h.balanced))
        self.sketch, self.width = tracking_sketch(self.u, fresh, weights), size[1]
        self.floor = None
        if h.floor:
            length = max(self.block.rows, self.cols)
            self.floor = floor_vectors(row_sums, col_sums, scale, h.floor)[..., :length]
        first, rows = self.block.first_row, self.block.rows
        self.index = torch.arange(first, first + rows, device=self.q.device)
        #: (row of the share, place among the cut rows): at most its first and its last.
        places = self.cut.parameter.cut_rows
        ends = dict.fromkeys((0, rows - 1))
        self.cut_rows = [(i, places[first + i]) for i in ends if first + i in places]

    def first_pass(self, s: StepScalars) -> Tensor:
        """Sketch the roots of V; returns what the ranks sum: see :func:`first_size`."""
        width, cols = self.width, self.cols
        self.sketched = self.q.new_empty(len(self.q), self.block.rows, width)
        self.row_sums = self.q.new_empty(len(self.q), self.block.rows)
        out = self.q.new_zeros(len(self.q), first_size(self.cut))
        for tiles in self.tiles:
            here, there = _ranges(tiles[0])
            reduced = kernels.first_pass(
                [f.tile(f.g, tile) for f, tile in zip(self.fragments, tiles, strict=True)],
                self.q[:, here],
                self.u[:, there],
                self.sketch[:, there],
                self._floor_of(tiles[0]),
                s,
            )
            self.sketched[:, here], self.row_sums[:, here] = reduced.sketch, reduced.row_sums
            out[:, 0] += reduced.update_square
            out[:, 1 : 1 + cols][:, there] += reduced.col_sums
        del self.sketch
        table = self._of_cut_rows(out)
        for row, place in self.cut_rows:
            table[:, place, :width] = self.sketched[:, row]
            table[:, place, -1] = self.row_sums[:, row]
        return out

    def measured(self, slots: Sequence[Tensor]) -> Tensor:
        """Take the wave's sums of the first pass; returns the Gram matrices of the sketches."""
        width, balanced = self.width, bool(self.h.balanced)
        sums = torch.stack([slots[i] for i in self.numbers])
        table = self._of_cut_rows(sums)
        for row, place in self.cut_rows:
            self.sketched[:, row] = table[:, place, :width]
            self.row_sums[:, row] = table[:, place, -1]
        col_sums = sums[:, 1 : 1 + self.cols]
        mean = col_sums.sum(-1, keepdim=True) / self.rows
        self.row_weights = balancing_weights(self.row_sums, balanced, mean)
        self.col_weights = balancing_weights(col_sums, balanced)
        weighted = self.sketched * self.row_weights[..., None]
        del self.sketched
        self.shared = SharedBasis(weighted, self.index, own_rows(self.block), self.rows)
        return self.shared.moments().flatten(1)

    def turn(self, slots: Sequence[Tensor]) -> Tensor:
        """Take those of the sketches; returns the Gram matrices of the bases."""
        width = self.width
        moments = self._taken(slots, 2 * width**2).view(-1, 2, width, width)
        return self.shared.turn(moments).flatten(1)

    def second_pass(
        self, slots: Sequence[Tensor], clips: Sequence[Tensor], s: StepScalars
    ) -> Tensor:
        """Update weights and first moments.

        Args:
            slots: the wave's sums of what :meth:`turn` returned.
            clips: of the whole wave.
            s: the step's numbers.

        Returns:
            projections, and in the last row weighted column sums: (B, largest width + 1, cols).
        """
        width = self.width
        self.basis = self.shared.finish(self._taken(slots, width**2).view(-1, width, width))
        del self.shared
        weighted = self.basis * self.row_weights[..., None]
        clip = torch.stack([clips[i] for i in self.numbers])
        out = self.q.new_zeros(len(self.q), self.cut.width + 1, self.cols)
        for i, tiles in enumerate(self.tiles):
            here, there = _ranges(tiles[0])
            pairs = list(zip(self.fragments, tiles, strict=True))
            means: Any = [f.m[i] for f in self.fragments if f.m is not None]
            reduced = kernels.second_pass(
                [f.tile(f.w, tile) for f, tile in pairs],
                means or None,
                [f.tile(f.g, tile) for f, tile in pairs],
                self.q[:, here],
                self.u[:, there],
                self._floor_of(tiles[0]),
                weighted[:, here],
                self.row_weights[:, here].square(),
                clip,
                s,
            )
            out[:, :width, there] += reduced.projection
            out[:, -1, there] += reduced.weighted_col_sums
        del self.q, self.u
        return out

    def project(self, of_columns: Callable[[int], Tensor]) -> Tensor:
        """Take the sums of the second pass, of the columns whose rows of U this rank keeps.

        Args:
            of_columns: gives those of a matrix by its number, (columns, largest width + 1).

        Returns:
            Over these, the Gram matrices of the weighted projections and the norms' squares, fp64.
        """
        weights = self.col_weights[:, self.own, None]
        sums = torch.stack([of_columns(i) for i in self.numbers])
        self.projection = sums[..., : self.width] * weights
        wide = self.projection.double()
        total = (sums[..., -1:].double() * weights.double().square()).sum(1)
        self.energies = torch.cat([(wide.mT @ wide).flatten(1), total], dim=1)
        return self.energies

    def replace(self, slots: Sequence[Tensor] | None = None) -> None:
        """New factors, by Rayleigh-Ritz of the projections.

        Args:
            slots: the wave's sums of what :meth:`project` returned, where that was not of all
                columns.
        """
        width = self.width
        energies = self.energies if slots is None else self._taken(slots, width**2 + 1)
        total = energies[:, -1:]
        best, energy = dominant(energies[:, :-1].view(-1, width, width), self.rank)
        best = best.to(self.projection.dtype)
        q = (self.basis @ best) / self.row_weights[..., None]
        u = (self.projection @ best) / self.col_weights[:, self.own, None]
        expands = self.h.rank_policy == "expand"
        held = energy.cumsum(-1) if expands else energy.sum(-1, keepdim=True)
        missed = (1.0 - held / total).clamp(min=0).sqrt()
        errors = torch.where(total > 0, missed, torch.zeros_like(missed))
        for fragment, error in zip(self.fragments, errors, strict=True):
            fragment.errors = [error]
        replace_factors(self.factors, *round_factors(q, u, self.factors[0].q.dtype, self.salt))

    def by_number(self, values: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Each matrix's number in the wave, and what of B belongs to it."""
        return zip(self.numbers, values.unbind(), strict=True)

    def _of_cut_rows(self, numbers: Tensor) -> Tensor:
        """Of what the first pass sums, the part of the cut rows: (B, cut rows, width + 1)."""
        return numbers[:, 1 + self.cols :].view(len(numbers), -1, self.cut.width + 1)

    def _taken(self, slots: Sequence[Tensor], count: int) -> Tensor:
        """The first numbers of each one's slot, (B, count)."""
        return torch.stack([slots[i][:count] for i in self.numbers])

    def _floor_of(self, tile: Tile) -> Tensor | None:
        if self.floor is None:
            return None
        here, there = _ranges(tile)
        out = self.floor.new_zeros(len(self.floor), 2, max(tile.rows, tile.cols))
        out[:, 0, : tile.rows] = self.floor[:, 0, here]
        out[:, 1, : tile.cols] = self.floor[:, 1, there]
        return out


def alike(cuts: Sequence[Cut], numbers: Sequence[int]) -> list[list[int]]:
    """The numbers of this rank's shares, those together that :class:`Shares` takes as one."""
    found: dict[Any, list[int]] = defaultdict(list)
    for i in numbers:
        fragment, parameter = cuts[i].fragment, cuts[i].parameter
        assert fragment is not None
        (block,), (factors,), mean = fragment.layout.blocks, fragment.factors, fragment.mean_matrix
        kinds = [
            x.dtype for x in (fragment.w, fragment.g, factors.q, mean) if isinstance(x, Tensor)
        ]
        key = (
            replace(block, name="", offset=0),
            (parameter.matrix, tuple(parameter.cut_rows)),
            (factors.q.shape[1], rank_in_use(factors.rank)),
            tuple(kinds),
        )
        found[key].append(i)
    return list(found.values())


def _ranges(tile: Tile) -> tuple[slice, slice]:
    """Rows of the share and columns of the matrix that a tile covers."""
    return slice(tile.row, tile.row + tile.rows), slice(tile.col, tile.col + tile.cols)
