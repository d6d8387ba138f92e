# SPDX-License-Identifier: Apache-2.0
"""Rounding to bf16 up or down at random, so that what is lost is zero on average.

The random bits of an element are a hash of its place and of the step: a run repeats and resumes bit
by bit, and no generator is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 32) - 1
#: Of a Weyl sequence, and of the 32-bit hash "lowbias32" (C. Wellons, "hash-prospector", 2018).
_WEYL, _FIRST, _SECOND = 0x9E3779B9, 0x7FEB352D, 0x846CA68B


def rounding_salt(step: int) -> int:
    """A 32-bit number of a step."""
    return _mixed_int(step & _MASK)


def round_stochastically(x: Tensor, first: int, salt: int) -> Tensor:
    """``x`` in bf16: each value becomes one of its two neighbours, the nearer one more often.

    Args:
        x: fp32, contiguous. NaN and infinity stay what they are.
        first: index in the matrix of the first element.
        salt: from :func:`rounding_salt`.
    """
    return _rounded(x.reshape(1, -1), first, salt).view(x.shape)


def round_factor(x: Tensor, dtype: torch.dtype, first_row: int, salt: int) -> Tensor:
    """A factor in the dtype it is kept in; to bf16 it is rounded at random.

    To the nearest it would stand still: V changes by 1 - beta_2 of itself a step, bf16 by 1/256.

    Args:
        x: (B, r, k), fp32 or fp64.
        dtype: bf16, or that of ``x``.
        first_row: index in the whole factor of the first row: ranks that hold other rows, or the
            same, round alike.
        salt: from :func:`rounding_salt`. All blocks have the same noise, wherever they lie.
    """
    if dtype == x.dtype:
        return x
    rows = x.float().reshape(len(x), -1)
    return _rounded(rows, first_row * x.shape[2], salt).view(x.shape)


def _rounded(x: Tensor, first: int, salt: int) -> Tensor:
    """Rows in bf16, each by the same random bits."""
    index = torch.arange(first, first + x.shape[1], dtype=torch.int64, device=x.device)
    noise = _mixed(index.mul_(_WEYL).add_(salt)).bitwise_and_(0xFFFF).to(torch.int32)
    bits = x.view(torch.int32)
    special = (bits & 0x7F800000) == 0x7F800000
    rounded = torch.where(special, bits, bits + noise) & -0x10000
    return rounded.view(torch.float32).to(torch.bfloat16)


def _mixed(x: Tensor) -> Tensor:
    x.bitwise_and_(_MASK)
    x ^= x >> 16
    x.mul_(_FIRST).bitwise_and_(_MASK)
    x ^= x >> 15
    x.mul_(_SECOND).bitwise_and_(_MASK)  # the product wraps; its low half is right all the same
    x ^= x >> 16
    return x


def _mixed_int(x: int) -> int:
    x ^= x >> 16
    x = x * _FIRST & _MASK
    x ^= x >> 15
    x = x * _SECOND & _MASK
    return x ^ (x >> 16)
