# SPDX-License-Identifier: Apache-2.0
"""One step on a batch of blocks (Algorithm 1 of the paper), vectorised over them."""

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
    """The numbers of a step; all are known on the host.

    Attributes:
        row: of the ring, that this step writes.
        mean_weights: what each row of the ring counts in the first moment at use,
            (1 - beta_1) beta_1^age / (1 - beta_1^t).
        square_weights: the same of the second moment.
        lr: learning rate.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        ascend: whether to go along the gradient instead of against it.
        weight_salt: of the random rounding of 16-bit weights; None to round them to nearest.
        alpha: the part of the error that this step leaves which is applied with the update, times
            the learning rate, and not kept.
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
    """Blocks of one width, or parts of blocks in frames of one width.

    Attributes:
        w: weights, (blocks, width), updated in place.
        g: gradients, of the same shape; only read.
        indices: (window, blocks, slots) int16, places in the blocks.
        values: of the same shape, bf16.
        error: of the frames, which hold whole groups.
        group: elements of a group; 0 for an error that is kept in full.
        outside: (blocks, width) bool, what of the frames is no element; None where all is.
        surplus: (blocks, slots) bool, slots that a block does not have; None where it has all.
        base: (blocks, 1), place in its block of each frame's first column; None for 0.
        first: (blocks,) int64, index in its parameter of each row's first column; None where
            weights are not rounded at random.
        compensation: int8, like ``w``, what rounding took from 16-bit weights, updated in place;
            None where nothing keeps it.
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
        """Let the shard have what changed; here all are views of it."""


def update(x: Batch, s: StepScalars) -> None:
    """Update weights, window and error."""
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
    """Move the accumulators' largest entries to the window.

    Args:
        x: the blocks.
        a: their accumulators, (blocks, width); what is taken is 0 afterwards.
        size: magnitudes of these, -1 for what is no element.
        row: of the ring.
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
    """A new tensor."""
    e = x.error
    if not x.group:
        return e.codes.to(dtype, copy=True)
    return dequantize(e.codes, e.low, e.high, x.group, dtype)


def _keep_error(x: Batch, a: Tensor, alpha: float) -> Tensor:
    """Keep 1 - ``alpha`` of what is left of the accumulators.

    Returns:
        all that is left, where ``alpha`` is not 0 as its codes read; may be overwritten.
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
