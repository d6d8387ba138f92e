# SPDX-License-Identifier: Apache-2.0
"""What a step asks of the ranks that share its matrices; of one rank alone, nothing.

Rows of a matrix's V and of Q lie where ZeRO put them; U is on every rank that holds some of the
matrix, or rows of it are, as many as the rank has of the matrix. From the others a step needs, per
matrix (m, n) at rank k, with a sketch of w and a test sketch of t columns::

    1. before the pass   Q^T Q                              k^2, fp64
                         U, where it is in parts            k n
    2. after the pass    sketches of rows that ZeRO cut     w a cut row
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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, distributed

from adapprox_ds.lowrank.factors import FactoredBlock
from adapprox_ds.lowrank.rank import max_saving_rank
from adapprox_ds.lowrank.sketch import sketch_width
from adapprox_ds.optim.hyperparameters import Hyperparameters
from adapprox_ds.zero.peers import CutParameter, Peers

# Later releases of torch have other names for them.
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_reduce_scatter = (
    getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
)

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
            values: this rank's.
            most: the most that a matrix can have, from its sizes.
        """
        return values

    def sum_units(self, values: Tensor) -> Tensor:
        """Sums over the ranks of a number of each unit of the wave, (units,)."""
        return values

    def whole_u(self, stacks: Sequence[Blocks]) -> Sequence[Tensor]:
        """All rows of each block's right factor, (B, n, k)."""
        return [torch.stack([f.u for f in x.factors]) for x in stacks]

    def join_rows(self, stacks: Sequence[Blocks], rows: Sequence[Tensor]) -> None:
        """Complete, in place, what was computed of rows that ZeRO cut: (B, rows, w)."""

    def own_columns(self, stacks: Sequence[Blocks], p: Sequence[Tensor]) -> Sequence[Tensor]:
        """Sums over the ranks of (B, t, n), of the columns whose rows of U this rank keeps."""
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
        _all_reduce(values, self.peers.group)
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

    def join_rows(self, stacks: Sequence[Blocks], rows: Sequence[Tensor]) -> None:
        """See :class:`Alone`."""
        places = [c.parameter.cut_rows if c.width else {} for c in self.cuts]
        sizes = [c.width * len(of) for c, of in zip(self.cuts, places, strict=True)]
        tables, found = [], []
        for x, values in zip(stacks, rows, strict=True):
            of, width = places[x.numbers[0]], values.shape[2]
            # At most the first and the last of a rank's rows are cut.
            ends = dict.fromkeys((0, values.shape[1] - 1))
            found.append([(i, of[x.first_row + i]) for i in ends if x.first_row + i in of])
            table = values.new_zeros(len(values), len(of), width)
            for i, place in found[-1]:
                table[:, place] = values[:, i]
            tables.append(table.flatten(1))
        sums = self._summed(sizes, self.like.dtype, stacks, tables)
        for values, own, table in zip(rows, found, sums, strict=True):
            for i, place in own:
                values[:, i] = table.view(len(values), -1, values.shape[2])[:, place]

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
        """Sums over the ranks of at most ``sizes`` numbers of each of the wave's matrices."""
        flat = torch.zeros(sum(sizes), dtype=dtype, device=self.like.device)
        slots = flat.split(list(sizes))
        for x, own in zip(stacks, values, strict=True):
            held = [slots[i][: own.shape[1]] for i in x.numbers]
            torch._foreach_copy_(held, list(own.unbind()))
        _all_reduce(flat, self.peers.group)
        return [
            torch.stack([slots[i][: own.shape[1]] for i in x.numbers])
            for x, own in zip(stacks, values, strict=True)
        ]

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
        _all_reduce(sums, self.peers.group)
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
    small += 4 * cut.width * len(parameter.cut_rows)
    if not h.shards_u:
        return Traffic(small + 4 * cut.tests * cut.cols, 0)
    rows = 4 * (cut.tests + cut.most) * cut.cols
    most = max(end - first for first, end in parameter.parts_of_u)
    return Traffic(small, rows) if in_pieces(world, most, cut.cols) else Traffic(small + rows, 0)


@dataclass(frozen=True, slots=True)
class _Table:
    """Where the rows of one matrix's table are.

    Attributes:
        at: its first number in a piece or, of summed tables, in all of them.
        rows: what a piece has room for, or all rows.
        count: all rows.
        own: [first, end) of this rank's rows.
        owners: by holder the end of its rows, and what takes a row's number to its place among
            the rows of all pieces, (2, holders); None for summed tables.
        even: whether the pieces, end to end, are the rows.
    """

    at: int
    rows: int
    count: int
    own: tuple[int, int]
    owners: Tensor | None
    even: bool


class RowPlan:
    """Tables with a row for each of U's, of several matrices, whose rows ranks keep in parts.

    Ranks exchange pieces of one length, in which each matrix has room for as many rows as any rank
    has of it: an all-gather and a reduce-scatter. Where that is more than twice the tables, since
    ranks have very different numbers of rows or most have none, whole tables are summed instead.
    Built once; nothing in it depends on a step.

    Args:
        parameters: the matrices.
        widths: columns of each one's table; of width 0 a matrix takes no part.
        peers: who holds them.
        device: where the tables are.
    """

    def __init__(
        self,
        parameters: Sequence[CutParameter],
        widths: Sequence[int],
        peers: Peers,
        device: torch.device,
    ) -> None:
        self.group, self.world, self.widths = peers.group, peers.world, widths
        rank = distributed.get_rank(peers.group)
        parts = [p.parts_of_u if width else () for p, width in zip(parameters, widths, strict=True)]
        most = [max((end - first for first, end in spans), default=0) for spans in parts]
        all_rows = [spans[-1][1] if spans else 0 for spans in parts]
        piece, whole = (
            sum(n * width for n, width in zip(rows, widths, strict=True))
            for rows in (most, all_rows)
        )
        self.pieces = in_pieces(self.world, piece, whole)
        self.length, at = (piece if self.pieces else whole), 0
        self.tables: list[_Table] = []
        known: dict[Any, Tensor] = {}  # equal shapes are often cut alike
        for parameter, spans, width, rows, count in zip(
            parameters, parts, widths, most if self.pieces else all_rows, all_rows, strict=True
        ):
            own = dict(zip(parameter.holders, spans, strict=False)).get(rank, (0, 0))
            owners, everyone = None, parameter.holders == tuple(range(self.world))
            if self.pieces and spans:
                key = (parameter.holders, spans)
                if key not in known:
                    known[key] = _owners(*key, rows).to(device)
                owners = known[key]
            even = everyone and rows * self.world == count
            self.tables.append(_Table(at, rows, count, own, owners, even))
            at += rows * width

    @property
    def numel(self) -> int:
        """Numbers given to a collective, or taken from it."""
        return self.world * self.length if self.pieces else self.length


def in_pieces(world: int, piece: int, whole: int) -> bool:
    """Whether ranks exchange pieces; else whole tables are summed, which moves them twice."""
    return world * piece <= 2 * whole


def _owners(holders: Sequence[int], spans: Sequence[tuple[int, int]], rows: int) -> Tensor:
    """See :attr:`_Table.owners`."""
    firsts, ends = torch.tensor(spans).T
    return torch.stack([ends, torch.tensor(holders) * rows - firsts])


class RowExchange:
    """One use of a :class:`RowPlan`: a gather, or a sum.

    Args:
        plan: what lies where.
        like: a tensor where the tables are, of their dtype.
    """

    def __init__(self, plan: RowPlan, like: Tensor) -> None:
        self.plan = plan
        self.flat = like.new_zeros(plan.numel)
        self.own = like.new_zeros(plan.length) if plan.pieces else self.flat
        self.places: dict[int, Tensor] = {}

    def gather(self, own: Mapping[int, Tensor]) -> None:
        """Give every rank all rows; every rank of the group does.

        Args:
            own: this rank's rows, (rows, at most the width), by matrix.
        """
        held = [self._own_rows(i)[:, : rows.shape[1]] for i, rows in own.items()]
        if held:
            torch._foreach_copy_(held, list(own.values()))
        self._run(_all_gather)

    def table(self, i: int) -> Tensor:
        """All rows of a gathered matrix's table, (rows, width)."""
        table, width = self.plan.tables[i], self.plan.widths[i]
        if table.owners is None:
            return self.flat[table.at : table.at + table.rows * width].view(-1, width)
        room = self._room(i)
        return room if table.even else room.index_select(0, self._places(table))

    def sum(self, tables: Mapping[int, Tensor]) -> None:
        """Sum tables over the ranks; every rank of the group does.

        Args:
            tables: this rank's share, (rows of U, width), of the matrices that it holds some of.
        """
        for i, values in tables.items():
            table = self.plan.tables[i]
            if table.owners is None:
                self.flat[table.at : table.at + values.numel()].view_as(values).copy_(values)
            else:
                if not table.even:
                    room = values.new_zeros(self.plan.world * table.rows, self.plan.widths[i])
                    values = room.index_copy_(0, self._places(table), values)
                pieces = self.flat.view(self.plan.world, -1)[:, self._span(i)]
                # values may be transposed.
                pieces.unflatten(1, (table.rows, -1)).copy_(values.unflatten(0, (-1, table.rows)))
        self._run(_reduce_scatter)

    def own_rows(self, i: int) -> Tensor:
        """The sums of this rank's rows of a matrix's table, (own rows, width)."""
        return self._own_rows(i)

    def _places(self, table: _Table) -> Tensor:
        """Of each row of a table among those of all pieces.

        Kept for the one use alone: they take as much as a U.
        """
        assert table.owners is not None
        key = id(table.owners)
        if key not in self.places:
            ends, moved = table.owners
            row = torch.arange(table.count, device=ends.device)
            self.places[key] = moved[torch.searchsorted(ends, row, right=True)] + row
        return self.places[key]

    def _own_rows(self, i: int) -> Tensor:
        table, width = self.plan.tables[i], self.plan.widths[i]
        first, end = table.own
        begin = table.at if self.plan.pieces else table.at + first * width
        return self.own[begin : begin + (end - first) * width].view(-1, width)

    def _span(self, i: int) -> slice:
        """A matrix's place in each piece."""
        table = self.plan.tables[i]
        return slice(table.at, table.at + table.rows * self.plan.widths[i])

    def _room(self, i: int) -> Tensor:
        """A matrix's rows in all pieces, end to end."""
        return self.flat.view(self.plan.world, -1)[:, self._span(i)].reshape(
            -1, self.plan.widths[i]
        )

    def _run(self, call: Callable[..., Any]) -> None:
        group = self.plan.group
        here = [self.flat, self.own] if call is _all_gather else [self.own, self.flat]
        if not self.plan.pieces:
            call, here = distributed.all_reduce, [self.flat]
        if not self.flat.numel():
            return
        if _elsewhere(self.flat, group):
            there = [t.cuda() for t in here]
            call(*there, group=group)
            here[0].copy_(there[0])
        else:
            call(*here, group=group)


def _all_reduce(values: Tensor, group: Any) -> None:
    """Sum over the ranks, in place."""
    if not values.numel():
        return
    if _elsewhere(values, group):
        there = values.cuda()
        distributed.all_reduce(there, group=group)
        values.copy_(there)
    else:
        distributed.all_reduce(values, group=group)


def _elsewhere(flat: Tensor, group: Any) -> bool:
    """Whether collectives run where the tensor is not: CPU offload."""
    return flat.device.type == "cpu" and bool(distributed.get_backend(group) == "nccl")
