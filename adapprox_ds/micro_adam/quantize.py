# SPDX-License-Identifier: Apache-2.0
"""4-bit codes between a group's minimum and maximum, two to a byte (Algorithm 2 of the paper).

Let delta and Delta be the minimum and the maximum of a group, and u = (Delta - delta) / 15. An
element a has the code floor((a - delta) / u + 1/2) and is decoded as delta + code u, which differs
from a by at most u / 2. A group of equal elements is decoded exactly; a group with NaN or infinity
is decoded as NaN.

Where delta <= 0 <= Delta, the decoded values are shifted by at most u / 2, so that 0 is one of
them: its code is z = floor(-delta / u + 1/2), at most 15. An element then has the code
floor(a / u + z + 1/2), clamped to 0 and 15, and is decoded as (code - z) u, which again differs by
at most u / 2. Without this departure from the paper an error of exactly 0, as of a weight that
never has a gradient, would be decoded as another number, and the weight would move in the end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: The largest code.
LEVELS = 15


def quantize(a: Tensor, group: int, outside: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise a matrix, whose rows are divided into groups.

    Args:
        a: the matrix, (rows, width), fp32 or fp64; width is a multiple of ``group``.
        group: the number of elements of a group, which is even.
        outside: True for elements to ignore, whose codes are 0, (rows, width) bool. Each group has
            other elements too.

    Returns:
        The packed codes, (rows, width / 2) uint8, with the elements of even index in the low halves
        of bytes; and the minima and the maxima of the groups, (rows, width / group) fp32.
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
    """Decode codes, to a new tensor (rows, width).

    Args:
        packed: the packed codes, (rows, width / 2) uint8.
        low: the minima of the groups, (rows, width / group) fp32.
        high: the maxima of the groups, of the same shape.
        group: the number of elements of a group.
        dtype: the dtype to compute in, and that of the result.
    """
    cells = unpack(packed).to(dtype).unflatten(1, (-1, group))
    unit, _, zero, base = _grid(low, high, dtype)
    return cells.sub_(zero).mul_(unit).add_(base).flatten(1)


def shrink(low: Tensor, high: Tensor, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The minima and maxima with which all codes are decoded as ``factor`` times what they are now.

    The results are ``factor`` times the decoded codes 0 and 15, and not ``factor`` times the minima
    and maxima themselves, as those are not decoded values in general: rounding could then change
    the code of 0.

    Args:
        low: the minima of the groups, fp32.
        high: the maxima of the groups, of the same shape.
        factor: from 0 to 1.
        dtype: the dtype to compute in.

    Returns:
        The new minima and maxima, fp32.
    """
    unit, _, zero, base = _grid(low, high, dtype)
    ends = (((code - zero) * unit + base) * factor for code in (0, LEVELS))
    least, largest = (end.squeeze(-1).to(torch.float32) for end in ends)
    return least, largest


def unpack(packed: Tensor) -> Tensor:
    """Split bytes, (rows, n), into codes, (rows, 2 n); both uint8."""
    return torch.stack((packed & LEVELS, packed >> 4), dim=-1).flatten(1)


def pack(codes: Tensor) -> Tensor:
    """The inverse of :func:`unpack`."""
    pairs = codes.unflatten(1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


def _grid(low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The numbers of each group that quantising and decoding need, in the notation above.

    Args:
        low: the minima of the groups.
        high: the maxima of the groups, of the same shape.
        dtype: the dtype to compute in.

    Returns:
        u; u with 1 in the place of 0, for divisions; and a code and its decoded value, which are z
        and 0 where the group's range contains 0, and otherwise 0 and delta. All have the shape of
        ``low`` and one more dimension, of size 1.
    """
    low, high = low.to(dtype).unsqueeze(-1), high.to(dtype).unsqueeze(-1)
    # The divisor is a tensor, since CUDA multiplies by the reciprocal of a Python number, which
    # gives other bits.
    unit = (high - low) / low.new_full((), LEVELS)
    divisor = unit.masked_fill(unit == 0, 1.0)
    apart = (low <= 0).logical_and_(high >= 0).logical_not_()
    # Of subnormal numbers the unit may be rounded so far down that z would be beyond all codes.
    zero = low.neg().div_(divisor).add_(0.5).floor_().clamp_(max=LEVELS).masked_fill_(apart, 0.0)
    return unit, divisor, zero, low.masked_fill(apart.logical_not_(), 0.0)
