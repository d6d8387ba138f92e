# SPDX-License-Identifier: Apache-2.0
"""4-bit codes between a group's minimum and maximum, two to a byte (Algorithm 2 of the paper).

With delta and Delta the least and the largest element of a group and u = (Delta - delta) / 15, an
element a has the code floor((a - delta) / u + 1/2) and reads as delta + code u, within u / 2. A
group of equal elements reads as they are, one that holds NaN or infinity as NaN.
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
    unit = _unit(low, high, a.dtype)
    codes = (cells - low.to(a.dtype).unsqueeze(-1)).div_(unit.masked_fill(unit == 0, 1.0))
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
    cells.mul_(_unit(low, high, dtype)).add_(low.to(dtype).unsqueeze(-1))
    return cells.flatten(1)


def unpack(packed: Tensor) -> Tensor:
    """(rows, n) bytes as (rows, 2 n) codes, uint8."""
    return torch.stack((packed & LEVELS, packed >> 4), dim=-1).flatten(1)


def pack(codes: Tensor) -> Tensor:
    """The inverse of :func:`unpack`."""
    pairs = codes.unflatten(1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


def _unit(low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    """U of each group, with a last dimension of 1."""
    # By a tensor: CUDA would multiply by the reciprocal of a number, and have other bits.
    levels = low.new_full((), LEVELS, dtype=dtype)
    return ((high.to(dtype) - low.to(dtype)) / levels).unsqueeze(-1)
