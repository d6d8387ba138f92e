# SPDX-License-Identifier: Apache-2.0
"""The parameters that MatrixViews gives to the optimizers inside it.

A tensor of the outer optimizer (a parameter, or one of ZeRO's flat shards) is cut into pieces. A
piece is a leaf tensor of its own that lasts, so that an optimizer can key its state by it, and that
views the outer tensor's storage during a step only: DeepSpeed may move, free or replace that
storage, and the gradient's, at any other time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adapprox_ds.zero.layout import ShardLayout, matrix_shape


class Piece:
    """A parameter of an inner optimizer.

    Attributes:
        owner: the parameter or shard that it is a part of.
        span: its place there, (offset, length) of a vector or (offset, rows, columns).
        param: what the inner optimizer holds: the owner itself, or a leaf that views it.
    """

    def __init__(self, owner: Tensor, offset: int, shape: Sequence[int]) -> None:
        self.owner, self.span = owner, (offset, *shape)
        self.param = owner
        if tuple(shape) != tuple(owner.shape):
            self.param = torch.nn.Parameter(owner.detach().new_empty(0))

    @property
    def is_matrix(self) -> bool:
        """Whether it has rows and columns."""
        return len(self.span) == 3

    def bind(self) -> None:
        """Let ``param`` view the owner's values and gradient as they are now."""
        if self.param is not self.owner:
            self.param.data = self._of(self.owner.detach())
            if self.owner.grad is not None:
                self.param.grad = self._of(self.owner.grad)

    def release(self) -> None:
        """Let go of both: DeepSpeed may want to free them."""
        if self.param is not self.owner:
            self.param.grad = None
            self.param.data = self.param.data.new_empty(0)

    def _of(self, whole: Tensor) -> Tensor:
        offset, *shape = self.span
        return whole.reshape(-1)[offset : offset + math.prod(shape)].view(shape)


def cut(tensor: Tensor, layout: ShardLayout, whole: bool) -> list[Piece]:
    """The pieces of a tensor, in the order of their offsets.

    Args:
        tensor: a parameter or a shard.
        layout: what lies where in it.
        whole: whether it is a parameter. One of up to two dimensions is a piece as it is, one of
            more is its most nearly square matrix. Of a shard, matrix blocks are matrices and dense
            runs vectors.

    Raises:
        ValueError: a parameter of more than two dimensions is not contiguous.
    """
    if not whole:
        blocks = [(block.offset, block.rows, block.cols) for block in layout.blocks]
        runs = [(run.offset, run.numel) for run in layout.runs]
        return [Piece(tensor, offset, shape) for offset, *shape in sorted([*blocks, *runs])]
    view = matrix_shape(tensor.shape) if tensor.dim() > 2 else None
    if view is None:
        return [Piece(tensor, 0, tensor.shape)]
    if not tensor.is_contiguous():
        raise ValueError(
            f"MatrixViews: parameter {layout.fragments[0].fragment.name!r} has shape "
            f"{tuple(tensor.shape)} and strides {tensor.stride()}, which no matrix views; allowed: "
            "contiguous parameters"
        )
    return [Piece(tensor, 0, view)]
