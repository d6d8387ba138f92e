# SPDX-License-Identifier: Apache-2.0
"""The tracking step of matrices that ZeRO cut, each factored as one: ``scope="matrix"``.

What :mod:`adapprox_ds.optim.tracking` computes of a block's rows is here computed of rows that lie
on several ranks, and of rows that ZeRO cut. Elements and rows of Q are the rank's own; U is on
every rank, or rows of it as many as the rank has of the matrix. From the others a step needs sums,
in five all-reduces for all cut matrices of a flat tensor together (of the last four, one each for
some megabytes of them at a time)::

    Q^T Q                                      k^2 numbers a matrix
    column sums of V, sketches of cut rows     n + (w + 1) a cut row
    Gram matrix of the sketch                  2 w^2
    Gram matrix of the basis                   w^2
    projection, weighted column sums           (w + 1) n

with w = k + p. Where U is in parts, an all-gather of k n numbers comes before the second, the last
is a reduce-scatter, and the Gram matrix of the projection, w^2 + 1, is summed after it. All that
follows is computed by every rank from the same numbers, and so alike; ranks check now and then that
their U, or else their ranks, are the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapprox_ds.lowrank.factors import FactoredBlock
from adapprox_ds.optim.dense import DenseRuns
from adapprox_ds.optim.exchange import RowExchange, RowPlan, Sums, in_pieces
from adapprox_ds.optim.fragment import Fragment
from adapprox_ds.optim.hyperparameters import Hyperparameters
from adapprox_ds.optim.matrix_share import Cut, Share, cut_of, first_size, own_rows
from adapprox_ds.optim.tracking import step_scalars
from adapprox_ds.zero.peers import CutParameter, Peers

#: Waves of matrices under way at a time: while one waits for others' numbers, the next computes.
_WAVES = 2
#: Bytes of a wave's largest collective: no more, but for a single matrix that is larger; and no
#: less for the sake of a second wave.
_MOST_BYTES, _LEAST_BYTES = 32 << 20, 4 << 20
#: Steps between checks that all ranks have the same U, and the prime that checksums are taken of.
_CHECK_EVERY, _CHECK_PRIME = 64, 32749


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
        self.s, self.sharded = step_scalars(h, t), h.shards_u
        held = {f.layout.fragment.name: f for f in fragments}
        self.cuts = [cut_of(p, held.get(name), h) for name, p in peers.cut.items()]
        self.waves = list(_waves(self.cuts, like.element_size()))

    def start(self) -> None:
        """Begin the first sum, Q^T Q of each matrix."""
        self.checks = bool(self.cuts) and self.t % _CHECK_EVERY == 1
        sizes = [c.width**2 + 2 for c in self.cuts]
        self.grams = Sums(sizes, self.like, torch.float64)
        for cut, slot in zip(self.cuts, self.grams.slots, strict=True):
            if cut.width and cut.fragment is not None:
                (factors,) = cut.fragment.factors
                (block,) = cut.fragment.layout.blocks
                q = factors.q[own_rows(block)].double()
                k = q.shape[1]
                slot[: k * k] = (q.mT @ q).flatten()
                if self.checks:
                    number = self._checksum(factors)
                    slot[-2], slot[-1] = number, number.square()
        self.grams.start(self.peers.group)
        self.ahead = deque(self._wave(wave) for wave in self.waves)
        self.running = [self.ahead.popleft() for _ in range(min(_WAVES, len(self.ahead)))]
        for wave in self.running:
            next(wave)

    def finish(self) -> None:
        """The rest of the step."""
        self.of_q = self.grams.wait()
        if self.checks:
            self._require_agreement(self.of_q)
        while self.running:
            self.running = [wave for wave in self.running if next(wave, "done") is None]
            if self.ahead and len(self.running) < _WAVES:
                self.running.append(self.ahead.popleft())

    def _wave(self, wave: list[int]) -> Iterator[None]:
        """The step of some matrices, by their numbers; yields where it would wait for sums."""
        group, h, s, like = self.peers.group, self.h, self.s, self.like
        cuts = [self.cuts[i] for i in wave]
        mine = {i: c.fragment for i, c in enumerate(cuts) if c.fragment is not None}
        factored = {i: fragment for i, fragment in mine.items() if cuts[i].width}
        dense = {i: fragment for i, fragment in mine.items() if not cuts[i].width}
        if self.sharded:
            whole_u = RowExchange(self._plan(wave, [c.most for c in cuts]), like)
            whole_u.gather({i: f.factors[0].u.to(like.dtype) for i, f in factored.items()})
        yield
        shares = {
            i: Share(
                cuts[i],
                fragment,
                self.of_q[wave[i]],
                whole_u.table(i) if self.sharded else None,
                self.t,
                h,
            )
            for i, fragment in factored.items()
        }
        bucket = Sums([first_size(c) for c in cuts], like, like.dtype)
        for i, share in shares.items():
            share.first_pass(s, bucket.slots[i])
        runs = DenseRuns(list(dense.values())) if dense else None
        for i, square in zip(dense, runs.measure(s) if runs else (), strict=True):
            bucket.slots[i][0] = square
        bucket.start(group)
        yield
        sums = bucket.wait()
        clips = [_clip(slot[0], c, h) for slot, c in zip(sums, cuts, strict=True)]
        if runs:
            runs.update(torch.stack([clips[i] for i in dense]), s)
        squared = [c.width**2 for c in cuts]
        numbers = {i: share.measured(sums[i]) for i, share in shares.items()}
        bucket = self._summed([2 * x for x in squared], numbers)
        yield
        sums = bucket.wait()
        bucket = self._summed(squared, {i: share.turn(sums[i]) for i, share in shares.items()})
        yield
        sums = bucket.wait()
        sizes = [(c.width + 1) * c.cols if c.width else 0 for c in cuts]
        bucket = Sums(sizes, like, like.dtype)
        tables = {i: bucket.slots[i].view(-1, cuts[i].cols) for i in shares}
        for i, share in shares.items():
            share.second_pass(sums[i], clips[i], s, tables[i])
        if self.sharded:
            widths = [c.width + 1 if c.width else 0 for c in cuts]
            exchange = RowExchange(self._plan(wave, widths), like)
            exchange.sum({i: table.mT for i, table in tables.items()})
            yield
            tables = {i: exchange.own_rows(i).mT for i in shares}
            numbers = {i: share.project(tables[i]) for i, share in shares.items()}
            bucket = self._summed([x + 1 for x in squared], numbers)
            yield
            sums = bucket.wait()
            numbers = {i: sums[i] for i in shares}
        else:
            bucket.start(group)
            yield
            bucket.wait()
            numbers = {i: share.project(tables[i]) for i, share in shares.items()}
        for i, share in shares.items():
            share.replace(numbers[i])

    def _plan(self, wave: Sequence[int], widths: Sequence[int]) -> RowPlan:
        """How the ranks exchange rows of U, or numbers a row, of a wave's matrices."""
        key = (tuple(wave), tuple(widths), self.like.device)
        if key not in self.peers.plans:
            parameters = [self.cuts[i].parameter for i in wave]
            self.peers.plans[key] = RowPlan(parameters, widths, self.peers, self.like.device)
        found: RowPlan = self.peers.plans[key]
        return found

    def _summed(self, sizes: Sequence[int], numbers: Mapping[int, Tensor]) -> Sums:
        """Begin to sum small matrices over the ranks, in fp64."""
        bucket = Sums(sizes, self.like, torch.float64)
        for i, values in numbers.items():
            bucket.slots[i][: values.numel()] = values.flatten()
        bucket.start(self.peers.group)
        return bucket

    def _checksum(self, factors: FactoredBlock) -> Any:
        """A number that is the same on all ranks: of U, or of the rank where U is in parts."""
        if self.sharded:
            return torch.tensor(hash(factors.rank) % _CHECK_PRIME)
        return factors.u.view(torch.uint8).long().sum() % _CHECK_PRIME

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


class Traffic(NamedTuple):
    """Bytes that a step gives to collectives, or, of an all-gather, takes from them.

    Attributes:
        summed: of all-reduces, which move them about twice.
        exchanged: of reduce-scatters and all-gathers, without the filling that makes the ranks'
            pieces of U equally long.
    """

    summed: int
    exchanged: int


def traffic(parameter: CutParameter, world: int, h: Hyperparameters) -> Traffic:
    """What a step needs for one cut parameter, at its largest rank, computed in fp32."""
    cut = cut_of(parameter, None, h)
    if not cut.width:
        return Traffic(4 * first_size(cut), 0)
    squares = 4 * cut.width**2 + 2
    projection = 4 * (cut.width + 1) * cut.cols
    if not h.shards_u:
        return Traffic(8 * squares + 4 * first_size(cut) + projection, 0)
    small = 8 * (squares + cut.width**2 + 1) + 4 * first_size(cut)
    rows = projection + 4 * cut.most * cut.cols
    most = max(end - first for first, end in parameter.parts_of_u)
    return Traffic(small, rows) if in_pieces(world, most, cut.cols) else Traffic(small + rows, 0)


def _waves(cuts: Sequence[Cut], element_size: int) -> Iterator[list[int]]:
    """Indices of cut parameters whose largest bucket is bounded; the same on all ranks."""
    sizes = [(cut.width + 1) * cut.cols * element_size for cut in cuts]
    limit = min(max(-(-sum(sizes) // _WAVES), _LEAST_BYTES), _MOST_BYTES)
    wave: list[int] = []
    held = 0
    for i, size in enumerate(sizes):
        if wave and held + size > limit:
            yield wave
            wave, held = [], 0
        wave.append(i)
        held += size
    if wave:
        yield wave


def _clip(square: Tensor, cut: Cut, h: Hyperparameters) -> Tensor:
    """max(1, RMS(X) / d) of a whole parameter."""
    if not h.clips:
        return torch.ones_like(square)
    return (square / (cut.parameter.numel * h.clip_limit**2)).sqrt().clamp(min=1.0)
