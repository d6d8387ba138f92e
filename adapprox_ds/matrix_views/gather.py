# SPDX-License-Identifier: Apache-2.0
"""Brings parameters that ZeRO cut to the processes that step them whole, and takes them back."""

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
    """A parameter that this process steps whole, though others hold parts of it.

    Its span is the offset of this process's own part, and the shape of the whole.

    Attributes:
        weights: the whole parameter's, 1-D, during a step.
        gradient: likewise.
    """

    def __init__(self, owner: Tensor, offset: int, shape: Sequence[int]) -> None:
        super().__init__(owner, offset, shape)
        # Never the shard itself, which may be just as long.
        self.param = torch.nn.Parameter(owner.detach().new_empty(0))
        self.weights = self.gradient = owner.detach().new_empty(0)

    def bind(self) -> None:
        """Let ``param`` view what was gathered."""
        self.param.data = self.weights.view(self.span[1:])
        self.param.grad = self.gradient.view(self.span[1:])


def whole_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """In which shape a whole parameter is stepped: that of its matrix, or its length."""
    return matrix_shape(shape) or (math.prod(shape),)


def cut_whole(tensor: Tensor, layout: ShardLayout, sharing: Sharing) -> list[Piece]:
    """The pieces of a shard with the scope "matrix", in the order of their offsets.

    Parameters that lie in it whole and cut ones that this process steps are one piece each. What is
    cut and not gathered has the pieces that it has with the scope "partition".

    Args:
        tensor: the shard.
        layout: what lies where in it.
        sharing: who steps what.
    """
    pieces: list[Piece] = []
    rank = None if sharing.peers is None else distributed.get_rank(sharing.peers.group)
    for part in layout.fragments:
        f = part.fragment
        if f.name in sharing.owners:
            if sharing.owners[f.name] == rank:
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
    """The way of a shard's cut parameters to the processes that step them, and back.

    Args:
        tensor: the shard.
        layout: what lies where in it.
        sharing: who holds and who steps what.
        pieces: the shard's pieces on this process.
    """

    def __init__(
        self, tensor: Tensor, layout: ShardLayout, sharing: Sharing, pieces: Sequence[Piece]
    ) -> None:
        assert sharing.peers is not None
        self._tensor, self._peers = tensor, sharing.peers
        rank = distributed.get_rank(self._peers.group)
        self._pieces = [piece for piece in pieces if isinstance(piece, WholePiece)]
        at = {part.fragment.name: part.fragment.offset for part in layout.fragments}
        piece_at = {piece.span[0]: number for number, piece in enumerate(self._pieces)}
        #: By process: what of this shard it steps, and what it holds of the pieces.
        self._lent: list[list[slice]] = [[] for _ in range(self._peers.world)]
        self._borrowed: list[list[tuple[int, slice]]] = [[] for _ in range(self._peers.world)]
        #: What of the pieces lies here: piece, place in it, place in the shard.
        self._own: list[tuple[int, slice, slice]] = []
        for name, parameter in self._peers.cut.items():
            owner = sharing.owners[name]
            for (begin, end), holder in zip(parameter.spans, parameter.holders, strict=True):
                span = slice(begin, end)
                if holder == rank:
                    here = slice(at[name], at[name] + end - begin)
                    if owner == rank:
                        self._own.append((piece_at[at[name]], span, here))
                    else:
                        self._lent[owner].append(here)
                elif owner == rank:
                    self._borrowed[holder].append((piece_at[at[name]], span))

    def bring(self) -> None:
        """Give the pieces the weights and gradients of their parameters. A collective call."""
        assert self._tensor.grad is not None
        weights = self._gathered(self._tensor.detach().view(-1))
        gradients = self._gathered(self._tensor.grad.detach().reshape(-1))
        for piece, w, g in zip(self._pieces, weights, gradients, strict=True):
            piece.weights, piece.gradient = w, g

    def give_back(self) -> None:
        """Write the pieces' weights to the shards that they are from. A collective call."""
        flat = self._tensor.detach().view(-1)
        for piece in self._pieces:  # so that the copies below are not the peak of memory
            piece.gradient = flat.new_empty(0)
        for number, span, here in self._own:
            flat[here] = self._pieces[number].weights[span]
        sent = [[self._pieces[n].weights[span] for n, span in parts] for parts in self._borrowed]
        received = swap(sent, [_total(parts) for parts in self._lent], flat, self._peers)
        for parts, values in zip(self._lent, received, strict=True):
            sizes = [part.stop - part.start for part in parts]
            for part, new in zip(parts, values.split(sizes), strict=True):
                flat[part] = new

    def let_go(self) -> None:
        """Free what was gathered."""
        for piece in self._pieces:
            piece.weights = piece.gradient = self._tensor.detach().new_empty(0)

    def _gathered(self, flat: Tensor) -> list[Tensor]:
        """The whole values of each piece's parameter, of which processes have parts in ``flat``."""
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
    """Send some tensors to each process of a group, and get some from each. A collective call.

    Args:
        sent: by process, 1-D tensors.
        sizes: by process, how many elements come from it.
        like: a tensor of their dtype and device.
        peers: the processes.

    Returns:
        By process, all that came from it, end to end.
    """
    place = place_of(peers.group, like.device)
    out = torch.cat([like.new_empty(0), *chain.from_iterable(sent)]).to(place)
    into = torch.empty(sum(sizes), dtype=like.dtype, device=place)
    counts = [sum(part.numel() for part in parts) for parts in sent]
    distributed.all_to_all_single(into, out, list(sizes), counts, group=peers.group)
    return list(into.to(like.device).split(list(sizes)))
