# SPDX-License-Identifier: Apache-2.0
"""How ranks give each other rows of right factors, or add up numbers for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from adapprox_ds.zero.peers import CutParameter, Peers, place_of

# Later releases of torch have other names for them.
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_reduce_scatter = (
    getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
)


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
    firsts, ends = torch.tensor(spans, dtype=torch.int64, device="cpu").T
    places = torch.tensor(holders, dtype=torch.int64, device="cpu") * rows
    return torch.stack([ends, places - firsts])


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
            tables: this rank's share, (rows of U, at most the width), of the matrices that it holds
                some of.
        """
        for i, values in tables.items():
            table, used = self.plan.tables[i], values.shape[1]
            if table.owners is None:
                self.table(i)[:, :used].copy_(values)
            else:
                if not table.even:
                    room = values.new_zeros(self.plan.world * table.rows, used)
                    values = room.index_copy_(0, self._places(table), values)
                pieces = self.flat.view(self.plan.world, -1)[:, self._span(i)]
                # values may be transposed.
                pieces.unflatten(1, (table.rows, -1))[..., :used].copy_(
                    values.unflatten(0, (-1, table.rows))
                )
        self._run(_reduce_scatter)

    def own_rows(self, i: int) -> Tensor:
        """The sums of this rank's rows of a matrix's table, (own rows, width).

        Where less than the width was given, the first columns are what was.
        """
        return self._own_rows(i)

    def _places(self, table: _Table) -> Tensor:
        """Of each row of a table among those of all pieces.

        Kept for the one use alone: they take as much as a U.
        """
        assert table.owners is not None
        key = id(table.owners)
        if key not in self.places:
            ends, moved = table.owners
            row = torch.arange(table.count, dtype=torch.int64, device=ends.device)
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
        there = [_sent(x, group) for x in here]
        call(*there, group=group)
        _received(here[0], there[0])


def all_reduce(values: Tensor, group: Any) -> None:
    """Sum over the ranks, in place."""
    if not values.numel():
        return
    there = _sent(values, group)
    distributed.all_reduce(there, group=group)
    _received(values, there)


def _sent(x: Tensor, group: Any) -> Tensor:
    """A tensor, or a copy where the group's collectives run: elsewhere with CPU offload."""
    return x.to(place_of(group, x.device))


def _received(x: Tensor, there: Tensor) -> None:
    """What a collective left in a tensor's copy, if it was one."""
    if there is not x:
        x.copy_(there)
