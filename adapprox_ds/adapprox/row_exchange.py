# SPDX-License-Identifier: Apache-2.0
"""Exchanges rows between the processes that each keep some rows of a right factor U.

Where U is in parts, a process owns some of its rows. Two things are exchanged for every matrix of a
step at once: in a *gather* each owner gives its rows of U to all processes; in a *sum* each process
has computed some numbers for every row of U, and each owner gets the sums for its own rows. Both
work on *tables*: the table of a matrix has a row for each row of U, and as many columns as there
are numbers for a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from adapprox_ds.core.peers import CutParameter, Peers, place_of

# Later releases of torch have other names for these two collectives.
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_reduce_scatter = (
    getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
)


@dataclass(frozen=True, slots=True)
class _Table:
    """Where the table of one matrix lies in the buffers; see :class:`RowPlan` for the two layouts.

    Attributes:
        at: the buffer offset of the table's first number, within each process's piece or, of tables
            that are summed whole, within the buffer.
        rows: the number of rows that each piece has room for or, of a table that is summed whole,
            all its rows.
        count: the number of all its rows.
        own: [first, end) of the global row indices that this process owns.
        owners: (2, number of owners), None for tables that are summed whole. For each owner, in the
            order of the rows: one past its last global row index; and what is to be added to a
            global row index of its own to get the row's index among the rows of all pieces, laid
            end to end.
        even: whether the pieces, laid end to end, are just the rows in order: every process owns
            as many of them, and no piece has room to spare.
    """

    at: int
    rows: int
    count: int
    own: tuple[int, int]
    owners: Tensor | None
    even: bool


class RowPlan:
    """The buffer offsets of the tables of several matrices; nothing in it depends on a step.

    There are two layouts. In pieces: the buffer has a piece for each process, all of one length,
    and in a piece each matrix has room for the largest number of its rows that any process owns. A
    gather is then an all-gather, and a sum is a reduce-scatter. Whole: where the pieces would take
    more than twice the memory of the tables, since processes own very different numbers of rows or
    most own none, the buffer has each table once, and a gather and a sum are all-reduces.

    Args:
        parameters: the matrices.
        widths: for each matrix the number of columns of its table; a matrix of width 0 takes no
            part.
        peers: the group of processes.
        device: the device that the tables are on.
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
        """The number of elements of the buffer that a collective fills or reads."""
        return self.world * self.length if self.pieces else self.length


def in_pieces(world: int, piece: int, whole: int) -> bool:
    """Whether the buffer is in pieces; otherwise tables are summed whole, which moves them twice.

    Args:
        world: the number of processes in the group.
        piece: the length of a piece (elements).
        whole: the length of all tables (elements).
    """
    return world * piece <= 2 * whole


def _owners(holders: Sequence[int], spans: Sequence[tuple[int, int]], rows: int) -> Tensor:
    """Compute :attr:`_Table.owners`.

    Args:
        holders: the number of each owner in the group, in the order of the rows.
        spans: [first, end) of the global row indices that each one owns.
        rows: the number of rows that a piece has room for.

    Returns:
        (2, number of owners), int64, on the CPU.
    """
    firsts, ends = torch.tensor(spans, dtype=torch.int64, device="cpu").T
    places = torch.tensor(holders, dtype=torch.int64, device="cpu") * rows
    return torch.stack([ends, places - firsts])


class RowExchange:
    """The buffers of one gather or one sum; used once.

    Args:
        plan: the buffer offsets.
        like: a tensor on the tables' device, of their dtype.
    """

    def __init__(self, plan: RowPlan, like: Tensor) -> None:
        self.plan, self.like = plan, like
        self.places: dict[int, Tensor] = {}

    def _make_room(self, sums: bool) -> None:
        """Make the buffers; what other processes' numbers are added to begins at 0."""
        adds = sums or not self.plan.pieces
        new = self.like.new_zeros if adds else self.like.new_empty
        self.flat = new(self.plan.numel)
        self.own = self.like.new_empty(self.plan.length) if self.plan.pieces else self.flat

    def gather(self, own: Mapping[int, Tensor]) -> None:
        """Give every process all rows of all tables. A collective call.

        Args:
            own: by the index of the matrix, the rows that this process owns: (own rows, columns),
                with at most as many columns as the table.
        """
        self._make_room(sums=False)
        held = [self.own_rows(i)[:, : rows.shape[1]] for i, rows in own.items()]
        if held:
            torch._foreach_copy_(held, list(own.values()))
        self._run(_all_gather)

    def table(self, i: int) -> Tensor:
        """All rows of matrix ``i``'s table after a gather, (rows, width)."""
        table, width = self.plan.tables[i], self.plan.widths[i]
        if table.owners is None:
            return self.flat[table.at : table.at + table.rows * width].view(-1, width)
        # The rows that all pieces have room for, end to end.
        room = self.flat.view(self.plan.world, -1)[:, self._span(i)].reshape(-1, width)
        return room if table.even else room.index_select(0, self._places(table))

    def sum(self, tables: Mapping[int, Tensor]) -> None:
        """Add up tables over the processes. A collective call.

        Args:
            tables: by the index of the matrix, what this process adds to its table: (rows of U,
                columns), with at most as many columns as the table. Matrices that this process
                holds nothing of are left out.
        """
        self._make_room(sums=True)
        for i, values in tables.items():
            table, used = self.plan.tables[i], values.shape[1]
            if table.owners is None:
                self.table(i)[:, :used].copy_(values)
            else:
                if not table.even:
                    room = values.new_zeros(self.plan.world * table.rows, used)
                    values = room.index_copy_(0, self._places(table), values)
                pieces = self.flat.view(self.plan.world, -1)[:, self._span(i)]
                # Unflattened, since a view would fail where values are transposed.
                pieces.unflatten(1, (table.rows, -1))[..., :used].copy_(
                    values.unflatten(0, (-1, table.rows))
                )
        self._run(_reduce_scatter)

    def own_rows(self, i: int) -> Tensor:
        """The rows of matrix ``i``'s table that this process owns, (own rows, width).

        After a sum they are the sums; where it was given fewer columns than the table has, the sums
        are the first columns.
        """
        table, width = self.plan.tables[i], self.plan.widths[i]
        first, end = table.own
        begin = table.at if self.plan.pieces else table.at + first * width
        return self.own[begin : begin + (end - first) * width].view(-1, width)

    def _places(self, table: _Table) -> Tensor:
        """For each row of a table its index among the rows of all pieces, (rows,), int64.

        They are kept for this exchange only, as they take about as much memory as a U.
        """
        assert table.owners is not None
        key = id(table.owners)
        if key not in self.places:
            ends, moved = table.owners
            row = torch.arange(table.count, dtype=torch.int64, device=ends.device)
            self.places[key] = moved[torch.searchsorted(ends, row, right=True)] + row
        return self.places[key]

    def _span(self, i: int) -> slice:
        """The range of matrix ``i``'s table within each piece."""
        table = self.plan.tables[i]
        return slice(table.at, table.at + table.rows * self.plan.widths[i])

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
    """Add up a tensor over the processes of a group, in place. A collective call."""
    if not values.numel():
        return
    there = _sent(values, group)
    distributed.all_reduce(there, group=group)
    _received(values, there)


def _sent(x: Tensor, group: Any) -> Tensor:
    """The tensor, or a copy of it on the device that the group's collectives take.

    With CPU offload shards lie on the CPU, while NCCL takes tensors of the GPU alone.
    """
    return x.to(place_of(group, x.device))


def _received(x: Tensor, there: Tensor) -> None:
    """Copy back what a collective left in :func:`_sent`'s copy, if that was one."""
    if there is not x:
        x.copy_(there)
