# SPDX-License-Identifier: Apache-2.0
"""What ranks that factor a matrix together send each other: sums, and rows of U."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from adapprox_ds.zero.layout import rows_of_u
from adapprox_ds.zero.peers import CutParameter, Peers

# Later releases of torch have other names for them.
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_reduce_scatter = (
    getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
)


class Sums:
    """Numbers of several matrices that are summed over the ranks in one call.

    Attributes:
        slots: each matrix's numbers: the rank's own until :meth:`start`, then their sums.
    """

    def __init__(self, sizes: Sequence[int], like: Tensor, dtype: torch.dtype) -> None:
        self.flat = torch.zeros(sum(sizes), dtype=dtype, device=like.device)
        self.slots = self.flat.split(list(sizes))
        self.work: Any = None

    def start(self, group: Any) -> None:
        """Begin to sum; every rank of the group does."""
        if _elsewhere(self.flat, group):
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


class RowExchange:
    """Tables with a row for each of U's, of several matrices, whose rows ranks keep in parts.

    Every rank's rows lie end to end in a piece, and pieces are as long as the longest.

    Args:
        parameters: the matrices.
        widths: columns of each one's table; of width 0 a matrix takes no part.
        peers: who holds them.
    """

    def __init__(
        self, parameters: Sequence[CutParameter], widths: Sequence[int], peers: Peers
    ) -> None:
        self.peers, self.widths = peers, widths
        #: By matrix: (rank, first row, end, where its rows begin in the rank's piece).
        self.parts: list[list[tuple[int, int, int, int]]] = []
        ends = [0] * peers.world
        for parameter, width in zip(parameters, widths, strict=True):
            held = []
            for rank, span in zip(parameter.holders, parameter.spans, strict=True) if width else ():
                assert parameter.matrix is not None
                first, end = rows_of_u(*span, parameter.matrix[0])
                held.append((rank, first, end, ends[rank]))
                ends[rank] += (end - first) * width
            self.parts.append(held)
        self.length = max(ends)
        self.work: Any = None

    def gather(self, own: Mapping[int, Tensor], like: Tensor) -> None:
        """Begin to give every rank all rows; every rank of the group does.

        Args:
            own: this rank's rows, (rows, at most the width), by matrix.
            like: a tensor where they lie, of their dtype.
        """
        rank = distributed.get_rank(self.peers.group)
        piece = like.new_zeros(self.length)
        self.pieces = like.new_empty(self.peers.world, self.length)
        for i, rows in own.items():
            for holder, first, end, at in self.parts[i]:
                if holder == rank:
                    self._rows(piece, i, end - first, at)[:, : rows.shape[1]] = rows
        flat, group = self.pieces.view(-1), self.peers.group
        if _elsewhere(piece, group):
            there = flat.cuda()
            _all_gather(there, piece.cuda(), group=group)
            flat.copy_(there)
        else:
            self.work = _all_gather(flat, piece, group=group, async_op=True)

    def table(self, i: int) -> Tensor:
        """All rows of a gathered matrix's table, (rows, width)."""
        self._wait()
        parts = [self._rows(self.pieces[r], i, end - a, at) for r, a, end, at in self.parts[i]]
        return torch.cat(parts)

    def sum(self, tables: Mapping[int, Tensor], like: Tensor) -> None:
        """Begin to sum tables over the ranks; every rank of the group calls.

        Args:
            tables: this rank's share, (rows of U, width), of the matrices that it holds some of.
            like: a tensor where they lie, of their dtype.
        """
        # Kept until the sums are there: they are read meanwhile.
        self.pieces = like.new_zeros(self.peers.world, self.length)
        for i, table in tables.items():
            for holder, first, end, at in self.parts[i]:
                self._rows(self.pieces[holder], i, end - first, at).copy_(table[first:end])
        flat, group = self.pieces.view(-1), self.peers.group
        self.own = like.new_empty(self.length)
        if _elsewhere(flat, group):
            there = self.own.cuda()
            _reduce_scatter(there, flat.cuda(), group=group)
            self.own.copy_(there)
        else:
            self.work = _reduce_scatter(self.own, flat, group=group, async_op=True)

    def own_rows(self, i: int) -> Tensor:
        """The sums of this rank's rows of a matrix's table, (own rows, width)."""
        self._wait()
        rank = distributed.get_rank(self.peers.group)
        ((_, first, end, at),) = (part for part in self.parts[i] if part[0] == rank)
        return self._rows(self.own, i, end - first, at)

    def _wait(self) -> None:
        if self.work is not None:
            self.work.wait()
            self.work = None

    def _rows(self, piece: Tensor, i: int, rows: int, at: int) -> Tensor:
        """A matrix's rows in a piece; shares memory."""
        width = self.widths[i]
        return piece[at : at + rows * width].view(rows, width)


def _elsewhere(flat: Tensor, group: Any) -> bool:
    """Whether collectives run where the tensor is not: CPU offload."""
    return flat.device.type == "cpu" and bool(distributed.get_backend(group) == "nccl")
