# SPDX-License-Identifier: Apache-2.0
"""The tracking step of matrices that ZeRO cut, each factored as one: ``scope="matrix"``.

What :mod:`adapprox_ds.optim.tracking` computes of a block's rows is here computed of rows that lie
on several ranks, and of rows that ZeRO cut. Elements and rows of Q are the rank's own; U is on
every rank. From the others a step needs sums, in five all-reduces for all cut matrices of a flat
tensor together (of the last four, one each for some megabytes of them at a time)::

    Q^T Q                                      k^2 numbers a matrix
    column sums of V, sketches of cut rows     n + (w + 1) a cut row
    Gram matrix of the sketch                  2 w^2
    Gram matrix of the basis                   w^2
    projection, weighted column sums           (w + 1) n

with w = k + p. All that follows from them is computed by every rank from the same numbers, and so
alike; ranks check now and then that their U is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from adapprox_ds import kernels
from adapprox_ds.kernels.interface import StepScalars
from adapprox_ds.lowrank.factors import FactoredBlock
from adapprox_ds.lowrank.rank import max_saving_rank, rank_in_use
from adapprox_ds.lowrank.rounding import round_factors, rounding_salt
from adapprox_ds.lowrank.sketch import gaussian_sketch, sketch_width
from adapprox_ds.lowrank.subspace import SharedBasis, dominant, tracking_sketch
from adapprox_ds.optim.balance import balancing_weights, factor_sums, floor_vectors
from adapprox_ds.optim.dense import DenseRuns
from adapprox_ds.optim.fragment import Fragment
from adapprox_ds.optim.hyperparameters import Hyperparameters
from adapprox_ds.optim.tracking import step_scalars
from adapprox_ds.zero.layout import MatrixBlock, Tile
from adapprox_ds.zero.peers import CutParameter, Peers

#: Bytes of one all-reduce, but for a single matrix that is larger.
_BUCKET_BYTES = 64 << 20
#: Steps between checks that all ranks have the same U, and the prime that checksums are taken of.
_CHECK_EVERY, _CHECK_PRIME = 64, 32749


@dataclass(slots=True)
class _Cut:
    """A cut parameter, and what this rank has of it."""

    parameter: CutParameter
    fragment: Fragment | None
    width: int  # of its sketch at the largest rank; 0 where it is dense

    @property
    def cols(self) -> int:
        """Columns of its 2-D view; 0 for a vector."""
        return self.parameter.matrix[1] if self.parameter.matrix else 0


class _Bucket:
    """Numbers of several matrices that are summed over the ranks in one call."""

    def __init__(self, sizes: Sequence[int], like: Tensor, dtype: torch.dtype) -> None:
        self.flat = torch.zeros(sum(sizes), dtype=dtype, device=like.device)
        self.slots = self.flat.split(list(sizes))
        self.work: Any = None

    def start(self, group: Any) -> None:
        """Begin to sum; every rank of the group does."""
        if self.flat.device.type == "cpu" and distributed.get_backend(group) == "nccl":
            # CPU offload: shards are not where collectives run.
            there = self.flat.cuda()
            distributed.all_reduce(there, group=group)
            self.flat.copy_(there)
        else:
            self.work = distributed.all_reduce(self.flat, group=group, async_op=True)

    def wait(self) -> Sequence[Tensor]:
        """The sums."""
        if self.work is not None:
            self.work.wait()
        return self.slots


class MatrixStep:
    """One step of the parameters that a partition cut: start, then finish.

    In between the rank can work on what is all its own.

    Args:
        fragments: this rank's, of cut parameters and others.
        peers: who holds the rest.
        like: a tensor of the dtype to compute in, where the shard lies.
        t: the step, 1 at the first.
        h: the settings.
    """

    def __init__(
        self,
        fragments: Sequence[Fragment],
        peers: Peers,
        like: Tensor,
        t: int,
        h: Hyperparameters,
    ) -> None:
        self.peers, self.like, self.t, self.h = peers, like, t, h
        self.s, self.cuts = step_scalars(h, t), []
        held = {f.layout.fragment.name: f for f in fragments}
        for name, parameter in peers.cut.items():
            self.cuts.append(_cut(parameter, held.get(name), h))

    def start(self) -> None:
        """Begin the first sum, Q^T Q of each matrix."""
        self.checks = self.t % _CHECK_EVERY == 1
        sizes = [c.width**2 + 2 for c in self.cuts]
        self.grams = _Bucket(sizes, self.like, torch.float64)
        for cut, slot in zip(self.cuts, self.grams.slots, strict=True):
            if cut.width and cut.fragment is not None:
                (factors,) = cut.fragment.factors
                (block,) = cut.fragment.layout.blocks
                q = factors.q[_own_rows(block)].double()
                k = q.shape[1]
                slot[: k * k] = (q.mT @ q).flatten()
                if self.checks:
                    number = factors.u.view(torch.uint8).long().sum() % _CHECK_PRIME
                    slot[-2], slot[-1] = number, number.square()
        self.grams.start(self.peers.group)

    def finish(self) -> None:
        """The rest of the step."""
        grams = self.grams.wait()
        if self.checks:
            self._require_agreement(grams)
        for wave in self._waves():
            self._step(wave, grams)

    def _waves(self) -> Iterator[list[int]]:
        """Indices of cut parameters whose largest bucket is bounded; the same on all ranks."""
        wave: list[int] = []
        held = 0
        for i, cut in enumerate(self.cuts):
            size = (cut.width + 1) * cut.cols * self.like.element_size()
            if wave and held + size > _BUCKET_BYTES:
                yield wave
                wave, held = [], 0
            wave.append(i)
            held += size
        if wave:
            yield wave

    def _step(self, wave: list[int], grams: Sequence[Tensor]) -> None:
        group, h, s = self.peers.group, self.h, self.s
        cuts = [self.cuts[i] for i in wave]
        dense = [c.fragment for c in cuts if not c.width and c.fragment is not None]
        shares = {
            i: _Share(cut, cut.fragment, grams[w], self.t, h)
            for i, (w, cut) in enumerate(zip(wave, cuts, strict=True))
            if cut.width and cut.fragment is not None
        }
        bucket = _Bucket([_first_size(c) for c in cuts], self.like, self.like.dtype)
        runs = DenseRuns(dense) if dense else None
        squares = iter(runs.measure(s)) if runs else iter(())
        for i, (cut, slot) in enumerate(zip(cuts, bucket.slots, strict=True)):
            if i in shares:
                shares[i].first_pass(s, slot)
            elif not cut.width and cut.fragment is not None:
                slot[0] = next(squares)
        bucket.start(group)
        sums = bucket.wait()
        clips = torch.stack([_clip(slot[0], c, h) for slot, c in zip(sums, cuts, strict=True)])
        if runs:
            mine = [i for i, c in enumerate(cuts) if not c.width and c.fragment is not None]
            runs.update(clips[mine], s)

        def summed(numbers: dict[int, Tensor], sizes: list[int], dtype: torch.dtype) -> Any:
            bucket = _Bucket(sizes, self.like, dtype)
            for i, values in numbers.items():
                bucket.slots[i][: values.numel()] = values.flatten()
            bucket.start(group)
            return bucket.wait()

        squared = [c.width**2 for c in cuts]
        moments = {i: share.measured(sums[i]) for i, share in shares.items()}
        first = summed(moments, [2 * x for x in squared], torch.float64)
        turned = {i: share.turn(first[i]) for i, share in shares.items()}
        second = summed(turned, squared, torch.float64)
        sizes = [(c.width + 1) * c.cols if c.width else 0 for c in cuts]
        bucket = _Bucket(sizes, self.like, self.like.dtype)
        for i, share in shares.items():
            share.second_pass(second[i], clips[i], s, bucket.slots[i])
        bucket.start(group)
        last = bucket.wait()
        for i, share in shares.items():
            share.replace(last[i])

    def _require_agreement(self, grams: Sequence[Tensor]) -> None:
        """Raise, on all ranks alike, unless every rank's U gave the same checksum."""
        sums = torch.stack([slot[-2:] for slot in grams]).cpu()
        for cut, (total, squares) in zip(self.cuts, sums.long().tolist(), strict=True):
            holders = len(cut.parameter.spans)
            if cut.width and holders * squares != total * total:
                raise RuntimeError(
                    f"the ranks' factors of {cut.parameter.name!r} differ before step {self.t}: "
                    "the state of one was changed, or loaded from another checkpoint"
                )


def traffic(parameter: CutParameter, h: Hyperparameters) -> int:
    """Bytes that a step gives to all-reduces for one cut parameter, computed in fp32."""
    cut = _cut(parameter, None, h)
    wide = (cut.width**2 + 2) + 3 * cut.width**2
    projection = (cut.width + 1) * cut.cols if cut.width else 0
    return 8 * wide + 4 * (_first_size(cut) + projection)


def _cut(parameter: CutParameter, fragment: Fragment | None, h: Hyperparameters) -> _Cut:
    """A cut parameter with the width of its sketch."""
    matrix, width = parameter.matrix, 0
    if matrix is not None and (bound := max_saving_rank(*matrix)) >= 1:
        most = int(h.rank_control.clip(float(h.rank_max), bound))
        width = sketch_width(most, h.oversampling, *matrix)
    return _Cut(parameter, fragment, width)


def _own_rows(block: MatrixBlock) -> slice:
    """Which of a share's rows this rank counts: those whose first element it holds."""
    return slice(int(block.skip > 0), None)


def _first_size(cut: _Cut) -> int:
    """Numbers of the second all-reduce: the sum of X^2, column sums, and each cut row's."""
    if not cut.width:
        return 1
    return 1 + cut.cols + len(cut.parameter.cut_rows) * (cut.width + 1)


def _clip(square: Tensor, cut: _Cut, h: Hyperparameters) -> Tensor:
    """max(1, RMS(X) / d) of a whole parameter."""
    if not h.clips:
        return torch.ones_like(square)
    return (square / (cut.parameter.numel * h.clip_limit**2)).sqrt().clamp(min=1.0)


class _Share:
    """This rank's rows of one matrix, through the step."""

    def __init__(
        self, cut: _Cut, fragment: Fragment, gram: Tensor, t: int, h: Hyperparameters
    ) -> None:
        self.cut, self.fragment, self.h, self.salt = cut, fragment, h, rounding_salt(~t)
        (self.block,) = fragment.layout.blocks
        self.factors: FactoredBlock = fragment.factors[0]
        self.q, self.u = (x.to(fragment.dtype) for x in (self.factors.q, self.factors.u))
        self.rows, self.cols = self.block.matrix_rows or 0, self.block.cols
        self.rank, k = rank_in_use(self.factors.rank), self.q.shape[1]
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
        numbers = range(self.block.first_row, self.block.first_row + self.block.rows)
        self.index = torch.arange(numbers.start, numbers.stop, device=self.q.device)
        cut_rows = {row: i for i, row in enumerate(cut.parameter.cut_rows)}
        #: (row of the share, place among the cut rows).
        self.cut_rows = [(i, cut_rows[row]) for i, row in enumerate(numbers) if row in cut_rows]

    def first_pass(self, s: StepScalars, slot: Tensor) -> None:
        """Sketch the root of V; writes what the ranks sum: see :func:`_first_size`."""
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
        self.shared = SharedBasis(weighted, self.index, _own_rows(self.block), self.rows)
        return self.shared.moments()

    def turn(self, slot: Tensor) -> Tensor:
        """Take those of the sketch; returns the Gram matrix of the basis."""
        width = self.sketch.shape[1]
        return self.shared.turn(slot[: 2 * width**2].view(2, width, width))

    def second_pass(self, gram: Tensor, clip: Tensor, s: StepScalars, slot: Tensor) -> None:
        """Update weights and first moment; writes the projection and weighted column sums."""
        width = self.sketch.shape[1]
        self.basis = self.shared.finish(gram[: width**2].view(width, width))
        weighted = self.basis * self.row_weights[:, None]
        by_col = slot.view(-1, self.cols)
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

    def replace(self, slot: Tensor) -> None:
        """New factors, by Rayleigh-Ritz of the projection."""
        width, by_col = self.sketch.shape[1], slot.view(-1, self.cols)
        projection = by_col[:width] * self.col_weights
        total = torch.linalg.vecdot(by_col[-1].double(), self.col_weights.double().square())
        scale = projection.abs().amax().clamp(min=torch.finfo(projection.dtype).tiny)
        unit = (projection / scale).double()
        best, energy = dominant((unit @ unit.mT)[None], self.rank)
        chosen = best[0].to(projection.dtype)
        q = (self.basis @ chosen) / self.row_weights[:, None]
        u = (projection.mT @ chosen) / self.col_weights[:, None]
        expands = self.h.rank_policy == "expand"
        held = energy[0].cumsum(-1) if expands else energy[0].sum(-1, keepdim=True)
        missed = (1.0 - held * scale.double().square() / total).clamp(min=0).sqrt()
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
