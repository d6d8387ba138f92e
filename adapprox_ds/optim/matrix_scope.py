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
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapprox_ds.lowrank.factors import FactoredBlock
from adapprox_ds.optim.dense import DenseRuns
from adapprox_ds.optim.exchange import RowExchange, RowPlan, Sums, in_pieces
from adapprox_ds.optim.fragment import Fragment
from adapprox_ds.optim.hyperparameters import Hyperparameters
from adapprox_ds.optim.matrix_share import Cut, Shares, alike, cut_of, first_size, own_rows
from adapprox_ds.optim.tracking import clip_factors, step_scalars
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
        held = [i for i, c in enumerate(self.cuts) if c.width and c.fragment is not None]
        for numbers in alike(self.cuts, held):
            blocks = [f.factors[0] for i in numbers if (f := self.cuts[i].fragment) is not None]
            own = own_rows(blocks[0])
            q = torch.stack([block.q[own] for block in blocks]).double()
            self.grams.put(numbers, (q.mT @ q).flatten(1))
            for i, block in zip(numbers if self.checks else (), blocks, strict=False):
                number = self._checksum(block)
                slot = self.grams.slots[i]
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
        grams = [self.of_q[i] for i in wave]
        stacks = []
        for numbers in alike(cuts, list(factored)):
            whole = [whole_u.table(i) for i in numbers] if self.sharded else None
            stacks.append(Shares(numbers, cuts, grams, whole, self.t, h))
            del whole
        if self.sharded:
            del whole_u
        bucket = Sums([first_size(c) for c in cuts], like, like.dtype)
        for x in stacks:
            bucket.put(x.numbers, x.first_pass(s))
        runs = DenseRuns(list(dense.values())) if dense else None
        if runs:
            bucket.put(list(dense), runs.measure(s)[:, None])
        bucket.start(group)
        yield
        sums = bucket.wait()
        squares = torch.stack([slot[0] for slot in sums])
        clips = clip_factors(squares, [c.parameter.numel for c in cuts], h).unbind()
        if runs:
            runs.update(torch.stack([clips[i] for i in dense]), s)
        squared = [c.width**2 for c in cuts]
        bucket = self._summed([2 * n for n in squared], stacks, [x.measured(sums) for x in stacks])
        yield
        sums = bucket.wait()
        bucket = self._summed(squared, stacks, [x.turn(sums) for x in stacks])
        yield
        sums = bucket.wait()
        tables = [x.second_pass(sums, clips, s) for x in stacks]
        if self.sharded:
            widths = [c.width + 1 if c.width else 0 for c in cuts]
            exchange = RowExchange(self._plan(wave, widths), like)
            of_stacks = zip(stacks, tables, strict=True)
            exchange.sum({i: t.mT for x, own in of_stacks for i, t in x.by_number(own)})
            del tables
            yield
            bucket = self._summed(
                [n + 1 for n in squared], stacks, [x.project(exchange.own_rows) for x in stacks]
            )
            yield
            sums = bucket.wait()
            for x in stacks:
                x.replace(sums)
            return
        bucket = Sums([(c.width + 1) * c.cols if c.width else 0 for c in cuts], like, like.dtype)
        for x in stacks:
            bucket.put(x.numbers, tables.pop(0).flatten(1))
        bucket.start(group)
        yield
        sums = bucket.wait()
        for x in stacks:
            x.project(lambda i: sums[i].view(-1, cuts[i].cols).mT)
            x.replace()

    def _plan(self, wave: Sequence[int], widths: Sequence[int]) -> RowPlan:
        """How the ranks exchange rows of U, or numbers a row, of a wave's matrices."""
        key = (tuple(wave), tuple(widths), self.like.device)
        if key not in self.peers.plans:
            parameters = [self.cuts[i].parameter for i in wave]
            self.peers.plans[key] = RowPlan(parameters, widths, self.peers, self.like.device)
        found: RowPlan = self.peers.plans[key]
        return found

    def _summed(
        self, sizes: Sequence[int], stacks: Sequence[Shares], numbers: Sequence[Tensor]
    ) -> Sums:
        """Begin to sum small matrices over the ranks, in fp64."""
        bucket = Sums(sizes, self.like, torch.float64)
        for x, values in zip(stacks, numbers, strict=True):
            bucket.put(x.numbers, values)
        bucket.start(self.peers.group)
        return bucket

    def _checksum(self, factors: FactoredBlock) -> Any:
        """A number that is the same on all ranks: of U, or of the rank where U is in parts."""
        if self.sharded:
            rank = hash(factors.rank) % _CHECK_PRIME
            return torch.tensor(rank, dtype=torch.int64, device="cpu")
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
