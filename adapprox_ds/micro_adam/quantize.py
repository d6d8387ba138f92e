# SPDX-License-Identifier: Apache-2.0
"""4-bit codes between a group's minimum and maximum, two to a byte (Algorithm 2 of the paper).

With delta and Delta the least and the largest element of a group and u = (Delta - delta) / 15, an
element a has the code floor((a - delta) / u + 1/2) and reads as delta + code u, within u / 2. A
group of equal elements reads as they are, one that holds NaN or infinity as NaN.

Where delta <= 0 <= Delta, the grid of what codes read as is moved by at most u / 2, so that 0 is on
it, at the code z = floor(-delta / u + 1/2): a has the code floor(a / u + z + 1/2), held within 0
and 15, and reads as (code - z) u, again within u / 2. Otherwise what is exactly 0, as the error of
a weight that never has a gradient, would not read as 0, and move the weight in the end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: The largest code.
LEVELS = 15


def quantize(a: Tensor, group: int, outside: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The codes and ranges of a matrix.

    Args:
        a: (rows, width), fp32 or fp64; width is a multiple of ``group``.
        group: elements of a group, even.
        outside: (rows, width) bool, elements that take no part: their codes are 0. Each group has
            one that does.

    Returns:
        packed codes (rows, width / 2) uint8, an even element in the low half of its byte; minima
        and maxima (rows, width / group) fp32.
    """
    cells = a.unflatten(1, (-1, group))
    if outside is None:
        low, high = torch.aminmax(cells, dim=-1)
    else:
        out = outside.unflatten(1, (-1, group))
        low = cells.masked_fill(out, math.inf).amin(dim=-1)
        high = cells.masked_fill(out, -math.inf).amax(dim=-1)
    low, high = low.to(torch.float32), high.to(torch.float32)
    divisor, zero, base = _grid(low, high, a.dtype)[1:]
    codes = (cells - base).div_(divisor).add_(zero)
    codes.add_(0.5).floor_().clamp_(0, LEVELS).nan_to_num_(nan=0.0)
    if outside is not None:
        codes.masked_fill_(out, 0.0)
    return pack(codes.flatten(1).to(torch.uint8)), low, high


def dequantize(packed: Tensor, low: Tensor, high: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """What codes and ranges stand for: a new (rows, width) tensor.

    Args:
        packed: (rows, width / 2) uint8.
        low: (rows, width / group) fp32.
        high: of the same shape.
        group: elements of a group.
        dtype: of the arithmetic and the result.
    """
    cells = unpack(packed).to(dtype).unflatten(1, (-1, group))
    unit, _, zero, base = _grid(low, high, dtype)
    return cells.sub_(zero).mul_(unit).add_(base).flatten(1)


def shrink(low: Tensor, high: Tensor, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The ranges with which codes read as ``factor`` times what they read as now.

    They are ``factor`` times what the codes 0 and 15 read as, not times the ranges themselves:
    these need not be on the grid, and a rounding could move the code of 0.

    Args:
        low: fp32, of each group.
        high: of the same shape.
        factor: from 0 to 1.
        dtype: of the arithmetic.

    Returns:
        new minima and maxima, fp32.
    """
    unit, _, zero, base = _grid(low, high, dtype)
    ends = (((code - zero) * unit + base) * factor for code in (0, LEVELS))
    least, largest = (end.squeeze(-1).to(torch.float32) for end in ends)
    return least, largest


def unpack(packed: Tensor) -> Tensor:
    """(rows, n) bytes as (rows, 2 n) codes, uint8."""
    return torch.stack((packed & LEVELS, packed >> 4), dim=-1).flatten(1)


def pack(codes: Tensor) -> Tensor:
    """The inverse of :func:`unpack`."""
    pairs = codes.unflatten(1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


def _grid(low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, what to divide by for it, the code of 0 and what that code reads as, of each group.

    All have a last dimension of 1. Where 0 is not between the ends of a group, the last two are the
    code 0 and delta.
    """
    low, high = low.to(dtype).unsqueeze(-1), high.to(dtype).unsqueeze(-1)
    # By a tensor: CUDA would multiply by the reciprocal of a number, and have other bits.
    unit = (high - low) / low.new_full((), LEVELS)
    divisor = unit.masked_fill(unit == 0, 1.0)
    apart = (low <= 0).logical_and_(high >= 0).logical_not_()
    zero = low.neg().div_(divisor).add_(0.5).floor_().masked_fill_(apart, 0.0)
    return unit, divisor, zero, low.masked_fill(apart.logical_not_(), 0.0)
