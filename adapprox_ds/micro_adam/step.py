# SPDX-License-Identifier: Apache-2.0
"""One step of MicroAdam for a batch of blocks, in plain torch (Algorithm 1 of the paper).

The error is added to the gradient, which gives the accumulators. The largest entries of each block
move from there to the window, and the rest is the new error. The weights then move by Adam's
update, with moments that are computed from the window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adapprox_ds.core.rounding import keep_weights, load_weights
from adapprox_ds.micro_adam.feedback import ErrorRows
from adapprox_ds.micro_adam.quantize import dequantize, quantize, shrink
from adapprox_ds.micro_adam.window import add_rows


@dataclass(frozen=True, slots=True)
class StepScalars:
    """The numbers of a step, which are the same for all of its blocks.

    Attributes:
        row: the row of the ring that this step writes.
        mean_weights: the weight of each row of the ring in the bias-corrected first moment,
            (1 - beta_1) beta_1^age / (1 - beta_1^t).
        square_weights: the same for the second moment, with beta_2.
        lr: the learning rate.
        eps: the number that is added to the root of the second moment.
        weight_decay: the decoupled weight decay.
        ascend: whether to go along the gradient instead of against it.
        weight_salt: the seed of the random rounding of 16-bit weights; None rounds to nearest.
        alpha: the part of the new error that moves the weights in this step, times the learning
            rate, and is not kept.
    """

    row: int
    mean_weights: tuple[float, ...]
    square_weights: tuple[float, ...]
    lr: float
    eps: float
    weight_decay: float
    ascend: bool
    weight_salt: int | None = None
    alpha: float = 0.0


@dataclass(slots=True)
class Batch:
    """Whole blocks, or parts of blocks in frames of one width (see batches.py).

    Attributes:
        w: the weights, (blocks, width); updated in place.
        g: the gradients, of the same shape; only read.
        indices: the entries' indices in their blocks, (window, blocks, slots) int16.
        values: the entries' values, of the same shape, bf16.
        error: the error, which covers whole groups.
        group: the number of elements of a quantisation group; 0 for an error that is kept in full.
        outside: True for elements of frames that belong to no part, (blocks, width) bool; None
            where there are none.
        surplus: True for slots that a part does not have, since it has fewer than others,
            (blocks, slots) bool; None where there are none.
        base: the index in its block of each frame's first column, (blocks, 1); None for 0.
        first: the index in its flattened parameter of each first column, (blocks,) int64; None
            where weights are not rounded at random.
        compensation: what rounding took from 16-bit weights, like ``w`` but int8; updated in place.
            None where it is not kept.
    """

    w: Tensor
    g: Tensor
    indices: Tensor
    values: Tensor
    error: ErrorRows
    group: int
    outside: Tensor | None = None
    surplus: Tensor | None = None
    base: Tensor | None = None
    first: Tensor | None = None
    compensation: Tensor | None = None

    def write_back(self) -> None:
        """Copy what changed to the flat tensors; does nothing here, where all tensors are views."""


def update(x: Batch, s: StepScalars) -> None:
    """Update the weights, the window and the error of a batch.

    Args:
        x: the batch.
        s: the numbers of the step.
    """
    dtype = torch.promote_types(torch.promote_types(x.w.dtype, x.g.dtype), torch.float32)
    a = _load_error(x, dtype)
    if s.ascend:
        a.sub_(x.g)
    else:
        a.add_(x.g)
    if x.outside is not None:
        a.masked_fill_(x.outside, 0.0)
    size = a.abs()
    if x.outside is not None:
        size.masked_fill_(x.outside, -1.0)
    take_largest(x, a, size, s.row)
    a = _keep_error(x, a, s.alpha)
    weight = load_weights(x.w, x.compensation, a.dtype).mul_(1.0 - s.lr * s.weight_decay)
    if s.alpha:
        weight.add_(a, alpha=-s.lr * s.alpha)
    mean, square = a.zero_(), size.zero_()
    base = 0 if x.base is None else x.base
    add_rows(mean, x.indices, x.values, base, s.mean_weights, 1)
    add_rows(square, x.indices, x.values, base, s.square_weights, 2)
    weight.add_(mean.div_(square.sqrt_().add_(s.eps)), alpha=-s.lr)
    if weight is not x.w:
        first = 0 if x.first is None else x.first
        keep_weights(x.w, x.compensation, weight, first, s.weight_salt)


def take_largest(x: Batch, a: Tensor, size: Tensor, row: int) -> None:
    """Move the largest entries of the accumulators to the window.

    Args:
        x: the batch.
        a: the accumulators, (blocks, width); entries that were moved are 0 afterwards.
        size: their magnitudes, and -1 outside the parts, (blocks, width).
        row: the row of the ring to write.
    """
    count = x.indices.shape[2]
    places = size.topk(count, dim=1, sorted=x.surplus is not None).indices
    taken = a.gather(1, places)
    if x.surplus is None:
        a.scatter_(1, places, 0.0)
    else:
        a.scatter_(1, places, taken.masked_fill(~x.surplus, 0.0))
        taken.masked_fill_(x.surplus, 0.0)
    x.indices[row].copy_(places if x.base is None else places + x.base)
    x.values[row].copy_(taken)


def _load_error(x: Batch, dtype: torch.dtype) -> Tensor:
    """The error, decoded to a new tensor (blocks, width)."""
    e = x.error
    if not x.group:
        return e.codes.to(dtype, copy=True)
    return dequantize(e.codes, e.low, e.high, x.group, dtype)


def _keep_error(x: Batch, a: Tensor, alpha: float) -> Tensor:
    """Keep 1 - ``alpha`` times the rest of the accumulators as the new error.

    Args:
        x: the batch.
        a: the rest of the accumulators, (blocks, width).
        alpha: the part that is not kept.

    Returns:
        The rest, (blocks, width), which the caller may overwrite. If ``alpha`` is not 0, it is
        decoded from the codes.
    """
    if not x.group:
        x.error.codes.copy_(a * (1.0 - alpha) if alpha else a)
        return a
    codes, low, high = quantize(a, x.group, x.outside)
    if alpha:
        a = dequantize(codes, low, high, x.group, a.dtype)
        low, high = shrink(low, high, 1.0 - alpha, a.dtype)
    x.error.codes.copy_(codes)
    x.error.low.copy_(low)
    x.error.high.copy_(high)
    return a
