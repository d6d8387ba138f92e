# SPDX-License-Identifier: Apache-2.0
"""What processes exchange in a step where several of them hold rows of one matrix.

ZeRO decides which process holds which rows of a matrix, and so of V and Q. The right factor U has a
row for each column of the matrix: either every process that holds rows of the matrix keeps all of
U, or each keeps a part of U's rows, in proportion to its elements of the matrix (``right_factor``).
For a matrix (m, n) of rank k, with w columns in the sketch and t in the test sketch, a step
exchanges these numbers::

    1. before the pass   sum of Q^T Q                               k^2, fp64
                         all-gather of U, where it is in parts      k n
    2. after the pass    sum of sketch and energy of cut rows       w + 1 for each row that ZeRO cut
                         sum or reduce-scatter of Z^T D_r R         t n
    3. then              sum of G, H and ||T||_F^2                  w^2 + w t + 1, fp64
                         sum of S, where U is in parts              t^2, fp64

Where a pass that does not write goes first (in the first steps, and where updates are clipped), the
cut rows, G and the sum of X^2 are exchanged after that pass. Each process then computes the new
factors from the same numbers, so that they agree. Every ``_CHECK_EVERY`` steps the processes check
that they do: their copies of U, or, where U is in parts, the matrices' ranks.

:class:`Alone` has these phases for matrices that lie on one process: there each returns what it is
given. :class:`Together` has them for matrices that lie on several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from adapprox_ds.adapprox.factors import Factors
from adapprox_ds.adapprox.hyperparameters import Hyperparameters
from adapprox_ds.adapprox.row_exchange import RowExchange, RowPlan, all_reduce, in_pieces
from adapprox_ds.adapprox.sketch import sketch_width
from adapprox_ds.core.layout import max_saving_rank
from adapprox_ds.core.peers import CutParameter, Peers

#: The number of steps between checks that all processes have the same factors, and the prime that
#: checksums are taken modulo.
_CHECK_EVERY, _CHECK_PRIME = 64, 32749


class Blocks(Protocol):
    """What the phases need to know of a stack of B blocks.

    Attributes:
        numbers: for each block the index of its unit in the wave.
        factors: the state of each block.
        first_row: the global row index of the blocks' first local row, the same for all of them.
    """

    numbers: list[int]
    factors: list[Factors]
    first_row: int


class Alone:
    """The phases of a step for matrices that lie on this process alone.

    Attributes:
        sharded: whether U is in parts, so that a process keeps some of its rows only.
    """

    sharded = False

    def kind(self, unit: int) -> tuple:
        """A key of a unit: blocks of units with different keys cannot form a stack.

        Args:
            unit: the index of the unit in the wave.
        """
        return ()

    def sum_small(
        self,
        stacks: Sequence[Blocks],
        values: Sequence[Tensor],
        most: Callable[[Cut], int],
    ) -> Sequence[Tensor]:
        """Add up a few numbers of each block over the processes.

        Args:
            stacks: the stacks whose numbers are added up.
            values: for each stack this process's numbers, (B, count), fp64; may be overwritten.
            most: gives the largest count that a matrix can have, so that all processes reserve the
                same room, whatever the ranks of their matrices are.

        Returns:
            For each stack the sums, (B, count), fp64.
        """
        return values

    def sum_units(self, values: Tensor) -> Tensor:
        """Add up one number of each of the wave's units over the processes, (units,)."""
        return values

    def whole_u(self, stacks: Sequence[Blocks]) -> Sequence[Tensor]:
        """Give all rows of the right factor U of each stack's blocks, (B, n, k).

        Raises:
            RuntimeError: the processes' factors differ.
        """
        return [torch.stack([f.u for f in x.factors]) for x in stacks]

    def join_rows(
        self, stacks: Sequence[Blocks], rows: Sequence[Tensor], numbers: Sequence[Tensor]
    ) -> None:
        """Add up, in place, what several processes computed for their parts of a cut row.

        Args:
            stacks: the stacks that the tensors belong to.
            rows: for each stack w numbers of each local row, (B, m, w).
            numbers: for each stack one more number of each local row, (B, m).
        """

    def own_columns(self, stacks: Sequence[Blocks], p: Sequence[Tensor]) -> Sequence[Tensor]:
        """Add up ``p`` over the processes; each gets the columns that its rows of U belong to.

        Args:
            stacks: the stacks that the tensors belong to.
            p: for each stack (B, t, n); may be overwritten.

        Returns:
            For each stack (B, t, n), or, where U is in parts, (B, t, number of own rows of U).
        """
        return p


@dataclass(frozen=True, slots=True)
class Cut:
    """A parameter that lies on several processes, and the largest sizes that its step can need.

    Attributes:
        parameter: the parameter, and which process holds which part of it.
        most: the largest rank that its factors can have; 0 where its second moment is dense.
        width: the number of columns of its sketch at that rank.
        tests: the number of columns of its test sketch at that rank.
    """

    parameter: CutParameter
    most: int
    width: int
    tests: int

    @property
    def cols(self) -> int:
        """The number of columns of its 2-D view; 0 for a vector."""
        return self.parameter.matrix[1] if self.parameter.matrix else 0

    def products(self, sharded: bool) -> int:
        """How many numbers G, H and ||T||_F^2 have, and S where U is in parts (``sharded``)."""
        return self.width**2 + self.width * self.tests + 1 + sharded * self.tests**2

    @classmethod
    def all_of(cls, peers: Peers, h: Hyperparameters) -> list[Cut]:
        """The sizes of all parameters that a group's processes cut; made once, and kept."""
        key = ("cuts", h.rank_control, h.rank_max, h.oversampling, h.test_oversampling)
        if key not in peers.plans:
            peers.plans[key] = [cls.of(parameter, h) for parameter in peers.cut.values()]
        found: list[Cut] = peers.plans[key]
        return found

    @classmethod
    def of(cls, parameter: CutParameter, h: Hyperparameters) -> Cut:
        """The sizes that a cut parameter has with the settings."""
        matrix = parameter.matrix
        if matrix is None or (bound := max_saving_rank(*matrix)) < 1:
            return cls(parameter, 0, 0, 0)
        most = int(h.rank_control.clip(float(h.rank_max), bound))
        width = sketch_width(most, h.oversampling, *matrix)
        return cls(parameter, most, width, min(most + h.test_oversampling, matrix[0]))


class Together(Alone):
    """The phases of a step for matrices that lie on several processes.

    Each phase is a collective call: every process of the group makes it, also one that holds no row
    of any of the matrices.

    Args:
        cuts: the wave's units, the same on all processes of the group.
        peers: the group of processes.
        like: a tensor on the shard's device, of the dtype to compute in.
        sharded: whether U is in parts.
        t: the number of the step, 1 at the first.
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
            # Of a process's local rows at most the first and the last are cut.
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
        """Add up numbers of each matrix over the processes, in one all-reduce.

        Args:
            sizes: for each unit the room that it has in the buffer, the same on all processes.
            dtype: the dtype of the buffer.
            stacks: the stacks that this process has.
            values: for each stack (B, count), with no more numbers than there is room for;
                overwritten by the sums.

        Returns:
            ``values``.
        """
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
        """The plan by which processes exchange rows that belong to those of U; made once, and kept.

        Args:
            widths: for each unit how many numbers a row has.
        """
        names = tuple(c.parameter.name for c in self.cuts)
        key = (names, tuple(widths), self.like.device)
        if key not in self.peers.plans:
            parameters = [c.parameter for c in self.cuts]
            self.peers.plans[key] = RowPlan(parameters, widths, self.peers, self.like.device)
        found: RowPlan = self.peers.plans[key]
        return found

    def _require_agreement(self, stacks: Sequence[Blocks]) -> None:
        """Compare checksums of U over the processes, or of the matrices' ranks where U is in parts.

        Raises:
            RuntimeError: they differ for some matrix; raised on all processes of the group.
        """
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
                    f"the processes' factors of {cut.parameter.name!r} differ before step "
                    f"{self.t}: the state of one was changed, or loaded from another checkpoint"
                )


class Traffic(NamedTuple):
    """The bytes that a step hands to collectives; of an all-gather, the bytes that it returns.

    Attributes:
        summed: bytes of all-reduces, each of which crosses the network about twice.
        exchanged: bytes of reduce-scatters and all-gathers, without the padding that makes the
            processes' pieces of U equally long.
    """

    summed: int
    exchanged: int


def traffic(parameter: CutParameter, world: int, h: Hyperparameters) -> Traffic:
    """The traffic of a one-pass step for one cut parameter, at its largest rank and in fp32.

    Args:
        parameter: the parameter.
        world: the number of processes in the group.
        h: the settings.
    """
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
