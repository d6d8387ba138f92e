# SPDX-License-Identifier: Apache-2.0
"""Gathers each parameter that ZeRO cut on one process, its owner, which steps all of it.

This is MatrixViews with ``scope="matrix"``. In each step the owner receives the weights and the
gradient of the parts that lie on other processes, and sends the new weights back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, distributed

from adapprox_ds.core.layout import ShardLayout, matrix_shape
from adapprox_ds.core.peers import Peers, place_of
from adapprox_ds.matrix_views.table import Sharing
from adapprox_ds.matrix_views.unit import Piece


class WholePiece(Piece):
    """A whole parameter that this process owns, while other processes have parts of it.

    Its span is the offset in the shard of this process's own part, and the shape of the whole.

    Attributes:
        weights: the weights of the whole parameter, (numel,), during a step; otherwise empty.
        gradient: its gradient, (numel,), during a step; otherwise empty.
    """

    def __init__(self, tensor: Tensor, offset: int, shape: Sequence[int]) -> None:
        super().__init__(tensor, offset, shape)
        # A Piece of the tensor's own shape has the tensor itself as param, which is wrong here.
        self.param = torch.nn.Parameter(tensor.detach().new_empty(0))
        self.weights = self.gradient = tensor.detach().new_empty(0)

    def bind(self) -> None:
        """Let ``param`` view the gathered weights and gradient."""
        self.param.data = self.weights.view(self.span[1:])
        self.param.grad = self.gradient.view(self.span[1:])


def whole_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape in which a whole parameter is stepped: its 2-D view, or (numel,) for a vector."""
    return matrix_shape(shape) or (math.prod(shape),)


def cut_whole(tensor: Tensor, layout: ShardLayout, sharing: Sharing) -> list[Piece]:
    """The pieces of a shard with the scope "matrix", in the order of their offsets.

    A parameter that lies in the shard as a whole is one piece, and so is a cut parameter that this
    process owns. A cut parameter of another owner has no piece here. Cut parameters that are not
    gathered have the same pieces as with the scope "partition".

    Args:
        tensor: the shard.
        layout: the shard's layout.
        sharing: the owners of the shard's cut parameters.
    """
    pieces: list[Piece] = []
    this = None if sharing.peers is None else distributed.get_rank(sharing.peers.group)
    for part in layout.fragments:
        f = part.fragment
        if f.name in sharing.owners:
            if sharing.owners[f.name] == this:
                pieces.append(WholePiece(tensor, f.offset, whole_shape(f.shape)))
        elif f.numel == math.prod(f.shape):
            pieces.append(Piece(tensor, f.offset, whole_shape(f.shape)))
        else:
            places: list[tuple[int, ...]] = [(run.offset, run.numel) for run in part.runs]
            if part.block is not None:
                places.append((part.block.offset, part.block.rows, part.block.cols))
            pieces += [Piece(tensor, offset, shape) for offset, *shape in sorted(places)]
    return pieces


class Exchange:
    """The exchange of a shard's cut parameters between their owners and the other processes.

    Args:
        tensor: the shard.
        layout: the shard's layout.
        sharing: the owners of the shard's cut parameters, and the processes that have parts.
        pieces: the shard's pieces on this process.
    """

    def __init__(
        self, tensor: Tensor, layout: ShardLayout, sharing: Sharing, pieces: Sequence[Piece]
    ) -> None:
        assert sharing.peers is not None
        self._tensor, self._peers = tensor, sharing.peers
        this = distributed.get_rank(self._peers.group)
        self._pieces = [piece for piece in pieces if isinstance(piece, WholePiece)]
        at = {part.fragment.name: part.fragment.offset for part in layout.fragments}
        piece_at = {piece.span[0]: number for number, piece in enumerate(self._pieces)}
        #: For each process the ranges of this shard that it owns.
        self._lent: list[list[slice]] = [[] for _ in range(self._peers.world)]
        #: For each process the ranges of the pieces that lie in its shard: the index of the piece,
        #: and the range in it.
        self._borrowed: list[list[tuple[int, slice]]] = [[] for _ in range(self._peers.world)]
        #: The ranges of the pieces that lie in this shard: the index of the piece, the range in it,
        #: and the range in the shard.
        self._own: list[tuple[int, slice, slice]] = []
        for name, parameter in self._peers.cut.items():
            owner = sharing.owners[name]
            for (begin, end), holder in zip(parameter.spans, parameter.holders, strict=True):
                span = slice(begin, end)
                if holder == this:
                    here = slice(at[name], at[name] + end - begin)
                    if owner == this:
                        self._own.append((piece_at[at[name]], span, here))
                    else:
                        self._lent[owner].append(here)
                elif owner == this:
                    self._borrowed[holder].append((piece_at[at[name]], span))

    def bring(self) -> None:
        """Gather the weights and gradients of the pieces; a collective call."""
        assert self._tensor.grad is not None
        weights = self._gathered(self._tensor.detach().view(-1))
        gradients = self._gathered(self._tensor.grad.detach().reshape(-1))
        for piece, w, g in zip(self._pieces, weights, gradients, strict=True):
            piece.weights, piece.gradient = w, g

    def give_back(self) -> None:
        """Write the weights of the pieces to the shards that they are from; a collective call."""
        flat = self._tensor.detach().view(-1)
        # The gradients are freed first, to make room for the copies below.
        for piece in self._pieces:
            piece.gradient = flat.new_empty(0)
        for number, span, here in self._own:
            flat[here] = self._pieces[number].weights[span]
        sent = [[self._pieces[n].weights[span] for n, span in parts] for parts in self._borrowed]
        received = swap(sent, [_total(parts) for parts in self._lent], flat, self._peers)
        for parts, values in zip(self._lent, received, strict=True):
            sizes = [part.stop - part.start for part in parts]
            for part, new in zip(parts, values.split(sizes), strict=True):
                flat[part] = new

    def free(self) -> None:
        """Free the gathered tensors."""
        for piece in self._pieces:
            piece.weights = piece.gradient = self._tensor.detach().new_empty(0)

    def _gathered(self, flat: Tensor) -> list[Tensor]:
        """Gather one tensor for each piece, (numel,); a collective call.

        Args:
            flat: this process's values, in the order of its shard, 1-D.
        """
        sent = [[flat[part] for part in parts] for parts in self._lent]
        sizes = [_total([span for _, span in parts]) for parts in self._borrowed]
        received = swap(sent, sizes, flat, self._peers)
        wholes = [flat.new_empty(math.prod(piece.span[1:])) for piece in self._pieces]
        for number, span, here in self._own:
            wholes[number][span] = flat[here]
        for parts, values in zip(self._borrowed, received, strict=True):
            sizes = [span.stop - span.start for _, span in parts]
            for (number, span), new in zip(parts, values.split(sizes), strict=True):
                wholes[number][span] = new
        return wholes


def _total(spans: Sequence[slice]) -> int:
    return sum(span.stop - span.start for span in spans)


def swap(
    sent: Sequence[Sequence[Tensor]], sizes: Sequence[int], like: Tensor, peers: Peers
) -> list[Tensor]:
    """Send tensors to each process of a group and receive some from each, by one all-to-all.

    Args:
        sent: for each process the tensors to send to it, each 1-D.
        sizes: for each process the number of elements that come from it.
        like: a tensor of the dtype and on the device of those tensors.
        peers: the group of processes.

    Returns:
        For each process what came from it, end to end, 1-D.
    """
    place = place_of(peers.group, like.device)
    out = torch.cat([like.new_empty(0), *chain.from_iterable(sent)]).to(place)
    into = torch.empty(sum(sizes), dtype=like.dtype, device=place)
    counts = [sum(part.numel() for part in parts) for parts in sent]
    distributed.all_to_all_single(into, out, list(sizes), counts, group=peers.group)
    return list(into.to(like.device).split(list(sizes)))
