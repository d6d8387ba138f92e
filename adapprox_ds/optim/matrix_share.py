# SPDX-License-Identifier: Apache-2.0
"""One rank's rows of a matrix that several ranks factor as one, through a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adapprox_ds import kernels
from adapprox_ds.kernels.interface import StepScalars
from adapprox_ds.lowrank.factors import FactoredBlock
from adapprox_ds.lowrank.rank import max_saving_rank, rank_in_use
from adapprox_ds.lowrank.rounding import round_factors, rounding_salt
from adapprox_ds.lowrank.sketch import gaussian_sketch, sketch_width
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


def own_rows(block: MatrixBlock) -> slice:
    """Which of a share's rows this rank counts: those whose first element it holds."""
    return slice(int(block.skip > 0), None)


def first_size(cut: Cut) -> int:
    """Numbers of the second all-reduce: the sum of X^2, column sums, and each cut row's."""
    if not cut.width:
        return 1
    return 1 + cut.cols + len(cut.parameter.cut_rows) * (cut.width + 1)


class Share:
    """This rank's rows of one matrix, through the step."""

    def __init__(
        self,
        cut: Cut,
        fragment: Fragment,
        gram: Tensor,
        whole_u: Tensor | None,
        t: int,
        h: Hyperparameters,
    ) -> None:
        self.cut, self.fragment, self.h, self.salt = cut, fragment, h, rounding_salt(~t)
        (self.block,) = fragment.layout.blocks
        self.factors: FactoredBlock = fragment.factors[0]
        self.q = self.factors.q.to(fragment.dtype)
        self.rows, self.cols = self.block.matrix_rows or 0, self.block.cols
        self.rank, k = rank_in_use(self.factors.rank), self.q.shape[1]
        self.u = self.factors.u.to(fragment.dtype) if whole_u is None else whole_u[:, :k]
        #: U's rows that this rank keeps.
        self.own = slice(None) if self.block.u_rows is None else slice(*self.block.u_rows)
        gram = gram[: k * k].view(k, k).to(self.q.dtype)
        row_sums, col_sums, scale = factor_sums(self.q[None], self.u[None], gram[None])
        size = (self.cols, sketch_width(self.rank, h.oversampling, self.rows, self.cols))
        fresh = gaussian_sketch(h.seed, self.block.name, 0, t, size, self.u)[None]
        weights = balancing_weights(col_sums, bool(h.balanced))
        self.sketch = tracking_sketch(self.u[None], fresh, weights)[0]
        self.floor = None
        if h.floor:
            length = max(self.block.rows, self.cols)
            self.floor = floor_vectors(row_sums, col_sums, scale, h.floor)[0, :, :length]
        first, rows = self.block.first_row, self.block.rows
        self.index = torch.arange(first, first + rows, device=self.q.device)
        #: (row of the share, place among the cut rows): at most its first and its last.
        places = cut.parameter.cut_rows
        ends = dict.fromkeys((0, rows - 1))
        self.cut_rows = [(i, places[first + i]) for i in ends if first + i in places]

    def first_pass(self, s: StepScalars, slot: Tensor) -> None:
        """Sketch the root of V; writes what the ranks sum: see :func:`first_size`."""
        width, numel = self.sketch.shape[1], self.cols
        self.sketched = self.q.new_empty(self.block.rows, width)
        self.row_sums = self.q.new_empty(self.block.rows)
        for tile in self.block.tiles:
            rows, cols = _ranges(tile)
            reduced = kernels.first_pass(
                [self.fragment.tile(self.fragment.g, tile)],
                self.q[None, rows],
                self.u[None, cols],
                self.sketch[None, cols],
                self._floor_of(tile),
                s,
            )
            self.sketched[rows], self.row_sums[rows] = reduced.sketch[0], reduced.row_sums[0]
            slot[0] += reduced.update_square[0]
            slot[1 : 1 + numel][cols] += reduced.col_sums[0]
        table = slot[1 + numel :].view(-1, self.cut.width + 1)
        for row, place in self.cut_rows:
            table[place, :width], table[place, -1] = self.sketched[row], self.row_sums[row]

    def measured(self, slot: Tensor) -> Tensor:
        """Take the sums of the first pass; returns the Gram matrices of the sketch."""
        width, balanced = self.sketch.shape[1], bool(self.h.balanced)
        table = slot[1 + self.cols :].view(-1, self.cut.width + 1)
        for row, place in self.cut_rows:
            self.sketched[row], self.row_sums[row] = table[place, :width], table[place, -1]
        col_sums = slot[None, 1 : 1 + self.cols]
        mean = col_sums.sum(-1, keepdim=True) / self.rows
        self.row_weights = balancing_weights(self.row_sums[None], balanced, mean)[0]
        self.col_weights = balancing_weights(col_sums, balanced)[0]
        weighted = self.sketched * self.row_weights[:, None]
        self.shared = SharedBasis(weighted, self.index, own_rows(self.block), self.rows)
        return self.shared.moments()

    def turn(self, slot: Tensor) -> Tensor:
        """Take those of the sketch; returns the Gram matrix of the basis."""
        width = self.sketch.shape[1]
        return self.shared.turn(slot[: 2 * width**2].view(2, width, width))

    def second_pass(self, gram: Tensor, clip: Tensor, s: StepScalars, by_col: Tensor) -> None:
        """Update weights and first moment; writes the projection and weighted column sums.

        ``by_col``: zeros, (largest width + 1, cols); the sums are its last row.
        """
        width = self.sketch.shape[1]
        self.basis = self.shared.finish(gram[: width**2].view(width, width))
        weighted = self.basis * self.row_weights[:, None]
        for i, tile in enumerate(self.block.tiles):
            rows, cols = _ranges(tile)
            reduced = kernels.second_pass(
                [self.fragment.tile(self.fragment.w, tile)],
                None if self.fragment.m is None else [self.fragment.m[i]],  # type: ignore[arg-type]
                [self.fragment.tile(self.fragment.g, tile)],
                self.q[None, rows],
                self.u[None, cols],
                self._floor_of(tile),
                weighted[None, rows],
                self.row_weights[None, rows].square(),
                clip[None],
                s,
            )
            by_col[:width, cols] += reduced.projection[0]
            by_col[-1, cols] += reduced.weighted_col_sums[0]

    def project(self, by_col: Tensor) -> Tensor:
        """Take the sums of the second pass, of the columns whose rows of U this rank keeps.

        Returns:
            Over these, the Gram matrix of the weighted projection and the norm's square, fp64.
        """
        weights = self.col_weights[self.own]
        self.projection = by_col[: self.sketch.shape[1]] * weights
        wide = self.projection.double()
        total = torch.linalg.vecdot(by_col[-1].double(), weights.double().square())
        return torch.cat([(wide @ wide.mT).flatten(), total[None]])

    def replace(self, energies: Tensor) -> None:
        """New factors, by Rayleigh-Ritz of the projection; ``energies``: of all columns."""
        width = self.sketch.shape[1]
        total = energies[width**2]
        best, energy = dominant(energies[: width**2].view(1, width, width), self.rank)
        chosen = best[0].to(self.projection.dtype)
        q = (self.basis @ chosen) / self.row_weights[:, None]
        u = (self.projection.mT @ chosen) / self.col_weights[self.own, None]
        expands = self.h.rank_policy == "expand"
        held = energy[0].cumsum(-1) if expands else energy[0].sum(-1, keepdim=True)
        missed = (1.0 - held / total).clamp(min=0).sqrt()
        self.fragment.errors = [torch.where(total > 0, missed, torch.zeros_like(missed))]
        f = self.factors
        (f.q,), (f.u,) = round_factors(q[None], u[None], f.q.dtype, self.salt)

    def _floor_of(self, tile: Tile) -> Tensor | None:
        if self.floor is None:
            return None
        rows, cols = _ranges(tile)
        out = self.floor.new_zeros(1, 2, max(tile.rows, tile.cols))
        out[0, 0, : tile.rows], out[0, 1, : tile.cols] = self.floor[0, rows], self.floor[1, cols]
        return out


def _ranges(tile: Tile) -> tuple[slice, slice]:
    """Rows of the share and columns of the matrix that a tile covers."""
    return slice(tile.row, tile.row + tile.rows), slice(tile.col, tile.col + tile.cols)
