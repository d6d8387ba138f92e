# SPDX-License-Identifier: Apache-2.0
"""What a step asks of the ranks that share its matrices; of one rank alone, nothing.

Rows of a matrix's V and of Q lie where ZeRO put them; U is on every rank that holds some of the
matrix, or rows of it are, as many as the rank has of the matrix. From the others a step needs, per
matrix (m, n) at rank k, with a sketch of w and a test sketch of t columns::

    1. before the pass   Q^T Q                              k^2, fp64
                         U, where it is in parts            k n
    2. after the pass    sketch and energy of cut rows      w + 1 a row that ZeRO cut
                         projection Z^T D_r R               t n
    3. then              G, H and the norm of T             w^2 + w t + 1, fp64
                         S, where U is in parts             t^2, fp64

A pass that does not write (the first steps, and clipping) needs the cut rows, G and the sum of X^2
before the one that does. All that follows is computed by every rank from the same numbers, and so
alike; ranks check now and then that their U, or else their ranks, are the same.

:class:`Alone` has these phases for matrices that lie on one rank, where each gives back what it
gets; :class:`Together` for matrices that lie on several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from adapprox_ds.lowrank.factors import FactoredBlock
from adapprox_ds.lowrank.rank import max_saving_rank
from adapprox_ds.lowrank.sketch import sketch_width
from adapprox_ds.optim.hyperparameters import Hyperparameters
from adapprox_ds.optim.row_exchange import RowExchange, RowPlan, all_reduce, in_pieces
from adapprox_ds.zero.peers import CutParameter, Peers

#: Steps between checks that all ranks have the same U, and the prime that checksums are taken of.
_CHECK_EVERY, _CHECK_PRIME = 64, 32749


class Blocks(Protocol):
    """What the phases see of a stack of B blocks.

    Attributes:
        numbers: which of the wave's units each block is.
        factors: the blocks' state.
        first_row: of the blocks, in their matrices.
    """

    numbers: list[int]
    factors: list[FactoredBlock]
    first_row: int


class Alone:
    """The phases of a step for matrices that lie on this rank.

    Attributes:
        sharded: whether ranks keep rows of U only.
    """

    sharded = False

    def kind(self, unit: int) -> tuple:
        """Blocks of units of different kinds cannot form a stack."""
        return ()

    def sum_small(
        self,
        stacks: Sequence[Blocks],
        values: Sequence[Tensor],
        most: Callable[[Cut], int],
    ) -> Sequence[Tensor]:
        """Sums over the ranks of a few numbers a block, each (B, count) in fp64.

        Args:
            stacks: whose they are.
            values: this rank's; may be overwritten.
            most: the most that a matrix can have, from its sizes.
        """
        return values

    def sum_units(self, values: Tensor) -> Tensor:
        """Sums over the ranks of a number of each unit of the wave, (units,)."""
        return values

    def whole_u(self, stacks: Sequence[Blocks]) -> Sequence[Tensor]:
        """All rows of each block's right factor, (B, n, k)."""
        return [torch.stack([f.u for f in x.factors]) for x in stacks]

    def join_rows(
        self, stacks: Sequence[Blocks], rows: Sequence[Tensor], numbers: Sequence[Tensor]
    ) -> None:
        """Complete, in place, what was computed of rows that ZeRO cut.

        Args:
            stacks: whose they are.
            rows: of each, (B, rows, w).
            numbers: one more of each row, (B, rows).
        """

    def own_columns(self, stacks: Sequence[Blocks], p: Sequence[Tensor]) -> Sequence[Tensor]:
        """Sums over the ranks of (B, t, n), of the columns whose rows of U this rank keeps.

        May overwrite ``p``.
        """
        return p


@dataclass(frozen=True, slots=True)
class Cut:
    """A parameter that lies on several ranks.

    Attributes:
        parameter: who holds what of it.
        most: the largest rank of its factors; 0 where it is dense.
        width: columns of its sketch at that rank.
        tests: columns of its test sketch.
    """

    parameter: CutParameter
    most: int
    width: int
    tests: int

    @property
    def cols(self) -> int:
        """Columns of its 2-D view; 0 for a vector."""
        return self.parameter.matrix[1] if self.parameter.matrix else 0

    def products(self, sharded: bool) -> int:
        """Numbers of G and H, of S where U is in parts, and of the norm of T."""
        return self.width**2 + self.width * self.tests + 1 + sharded * self.tests**2

    @classmethod
    def of(cls, parameter: CutParameter, h: Hyperparameters) -> Cut:
        """A cut parameter's sizes under the settings."""
        matrix = parameter.matrix
        if matrix is None or (bound := max_saving_rank(*matrix)) < 1:
            return cls(parameter, 0, 0, 0)
        most = int(h.rank_control.clip(float(h.rank_max), bound))
        width = sketch_width(most, h.oversampling, *matrix)
        return cls(parameter, most, width, min(most + h.test_oversampling, matrix[0]))


class Together(Alone):
    """The phases of a step for some matrices that lie on several ranks; each is collective.

    Args:
        cuts: the wave's units; the same on all ranks of the group.
        peers: the ranks.
        like: a tensor of the dtype to compute in, where the shard lies.
        sharded: whether U is in parts.
        t: the step, 1 at the first.
    """

    def __init__(
        self, cuts: Sequence[Cut], peers: Peers, like: Tensor, sharded: bool, t: int
    ) -> None:
        self.cuts, self.peers, self.like, self.sharded, self.t = cuts, peers, like, sharded, t

    def kind(self, unit: int) -> tuple:
        """See :class:`Alone`."""
        parameter = self.cuts[unit].parameter
        return tuple(parameter.cut_rows) if parameter.matrix is not None else ()

    def sum_small(
        self,
        stacks: Sequence[Blocks],
        values: Sequence[Tensor],
        most: Callable[[Cut], int],
    ) -> Sequence[Tensor]:
        """See :class:`Alone`."""
        sizes = [most(c) if c.width else 0 for c in self.cuts]
        return self._summed(sizes, torch.float64, stacks, values)

    def sum_units(self, values: Tensor) -> Tensor:
        """See :class:`Alone`."""
        values = values.clone()
        all_reduce(values, self.peers.group)
        return values

    def whole_u(self, stacks: Sequence[Blocks]) -> Sequence[Tensor]:
        """See :class:`Alone`."""
        if self.t % _CHECK_EVERY == 1:
            self._require_agreement(stacks)
        if not self.sharded:
            return super().whole_u(stacks)
        exchange = RowExchange(self._plan([c.most for c in self.cuts]), self.like)
        exchange.gather(
            {
                i: f.u.to(self.like.dtype)
                for x in stacks
                for i, f in zip(x.numbers, x.factors, strict=True)
            }
        )
        return [
            torch.stack(
                [
                    exchange.table(i)[:, : f.u.shape[1]]
                    for i, f in zip(x.numbers, x.factors, strict=True)
                ]
            )
            for x in stacks
        ]

    def join_rows(
        self, stacks: Sequence[Blocks], rows: Sequence[Tensor], numbers: Sequence[Tensor]
    ) -> None:
        """See :class:`Alone`."""
        places = [c.parameter.cut_rows if c.width else {} for c in self.cuts]
        sizes = [(c.width + 1) * len(of) for c, of in zip(self.cuts, places, strict=True)]
        tables, found = [], []
        for x, values, more in zip(stacks, rows, numbers, strict=True):
            of, width = places[x.numbers[0]], values.shape[2]
            # At most the first and the last of a rank's rows are cut.
            ends = dict.fromkeys((0, values.shape[1] - 1))
            found.append([(i, of[x.first_row + i]) for i in ends if x.first_row + i in of])
            table = values.new_zeros(len(values), len(of), width + 1)
            for i, place in found[-1]:
                table[:, place, :width] = values[:, i]
                table[:, place, width] = more[:, i]
            tables.append(table.flatten(1))
        sums = self._summed(sizes, self.like.dtype, stacks, tables)
        for values, more, own, table in zip(rows, numbers, found, sums, strict=True):
            width = values.shape[2]
            for i, place in own:
                joined = table.view(len(values), -1, width + 1)[:, place]
                values[:, i], more[:, i] = joined[:, :width], joined[:, width]

    def own_columns(self, stacks: Sequence[Blocks], p: Sequence[Tensor]) -> Sequence[Tensor]:
        """See :class:`Alone`."""
        if not self.sharded:
            sizes = [c.tests * c.cols for c in self.cuts]
            sums = self._summed(sizes, self.like.dtype, stacks, [x.flatten(1) for x in p])
            return [total.view_as(x) for total, x in zip(sums, p, strict=True)]
        exchange = RowExchange(self._plan([c.tests for c in self.cuts]), self.like)
        exchange.sum(
            {
                i: own.mT
                for x, of in zip(stacks, p, strict=True)
                for i, own in zip(x.numbers, of, strict=True)
            }
        )
        return [
            torch.stack([exchange.own_rows(i)[:, : of.shape[1]] for i in x.numbers]).mT
            for x, of in zip(stacks, p, strict=True)
        ]

    def _summed(
        self,
        sizes: Sequence[int],
        dtype: torch.dtype,
        stacks: Sequence[Blocks],
        values: Sequence[Tensor],
    ) -> list[Tensor]:
        """Sums over the ranks, in place, of at most ``sizes`` numbers of each of the matrices."""
        flat = torch.zeros(sum(sizes), dtype=dtype, device=self.like.device)
        slots = flat.split(list(sizes))
        for x, own in zip(stacks, values, strict=True):
            held = [slots[i][: own.shape[1]] for i in x.numbers]
            torch._foreach_copy_(held, list(own.unbind()))
        all_reduce(flat, self.peers.group)
        for x, own in zip(stacks, values, strict=True):
            sums = [slots[i][: own.shape[1]] for i in x.numbers]
            torch._foreach_copy_(list(own.unbind()), sums)
        return list(values)

    def _plan(self, widths: Sequence[int]) -> RowPlan:
        """How the ranks exchange rows of U, or numbers a row, of the wave's matrices."""
        names = tuple(c.parameter.name for c in self.cuts)
        key = (names, tuple(widths), self.like.device)
        if key not in self.peers.plans:
            parameters = [c.parameter for c in self.cuts]
            self.peers.plans[key] = RowPlan(parameters, widths, self.peers, self.like.device)
        found: RowPlan = self.peers.plans[key]
        return found

    def _require_agreement(self, stacks: Sequence[Blocks]) -> None:
        """Raise, on all ranks alike, unless every rank's U, or rank, gives the same checksum."""
        sums = torch.zeros(len(self.cuts), 2, dtype=torch.float64, device=self.like.device)
        for x in stacks:
            for i, f in zip(x.numbers, x.factors, strict=True):
                number = hash(f.rank) if self.sharded else f.u.view(torch.uint8).long().sum()
                sums[i, 0] = number % _CHECK_PRIME
        sums[:, 1] = sums[:, 0].square()
        all_reduce(sums, self.peers.group)
        for cut, (total, squares) in zip(self.cuts, sums.long().tolist(), strict=True):
            if cut.width and len(cut.parameter.spans) * squares != total * total:
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
    """What a step of one pass needs for a cut parameter, at its largest rank, in fp32."""
    cut = Cut.of(parameter, h)
    if not cut.width:
        return Traffic(0, 0)
    small = 8 * (cut.most**2 + cut.products(h.shards_u))
    small += 4 * (cut.width + 1) * len(parameter.cut_rows)
    if not h.shards_u:
        return Traffic(small + 4 * cut.tests * cut.cols, 0)
    rows = 4 * (cut.tests + cut.most) * cut.cols
    most = max(end - first for first, end in parameter.parts_of_u)
    return Traffic(small, rows) if in_pieces(world, most, cut.cols) else Traffic(small + rows, 0)
