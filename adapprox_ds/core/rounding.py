# SPDX-License-Identifier: Apache-2.0
"""Rounding to few bits up or down at random, so that what is lost is zero on average.

The random bits of an element are a hash of its place and of the step: a run repeats and resumes bit
by bit, and no generator is kept.

Weights in bf16 or fp16 lose updates that are smaller than half of their last place, if they are
rounded to nearest. They are rounded at random instead, or, where a *compensation* is kept, first at
random to eight more bits. An element's magnitude then is an integer c of units of 1/256 of a last
place; the weight is the nearest, h = floor((c + 128) / 256), and its compensation c - 256 h, an
int8, so that both together are exactly c. In this form fp16's subnormal numbers follow its normal
ones without a seam, as in the format itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = (1 << 32) - 1
#: Of a Weyl sequence, and of the 32-bit hash "lowbias32" (C. Wellons, "hash-prospector", 2018).
_WEYL, _FIRST, _SECOND = 0x9E3779B9, 0x7FEB352D, 0x846CA68B


#: Bits of a compensation.
_MORE = 8
#: Tells the noise of weights from that of moments and factors in the same step.
_OF_WEIGHTS = 1 << 30


def rounding_salt(step: int) -> int:
    """A 32-bit number of a step, for moments."""
    return _mixed_int(step & _MASK)


def weight_salt(step: int) -> int:
    """A 32-bit number of a step, for weights."""
    return rounding_salt(step ^ _OF_WEIGHTS)


@dataclass(frozen=True, slots=True)
class _Format:
    """A 16-bit format, seen from fp32.

    Attributes:
        dropped: bits of an fp32 magnitude beyond it.
        bias: what of these bits is the difference of the exponents.
        normal: bits in fp32 of its least normal number; 0 where fp32 has no other subnormal ones.
        largest: bits of its largest finite number.
    """

    dropped: int
    bias: int
    normal: int
    largest: int


_FORMATS = {
    torch.bfloat16: _Format(16, 0, 0, 0x7F7F),
    torch.float16: _Format(13, 112 << 23, 113 << 23, 0x7BFF),
}


def is_rounded(dtype: torch.dtype) -> bool:
    """Whether weights of a dtype are rounded at random, and can have a compensation."""
    return dtype in _FORMATS


def load_weights(w: Tensor, compensation: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Weights with what their compensation says, in ``dtype``.

    Args:
        w: any shape.
        compensation: int8 of the same shape, for bf16 and fp16; or None.
        dtype: of the result, fp32 or fp64.

    Returns:
        ``w`` itself where it has that dtype, else a new tensor.
    """
    if compensation is None:
        return w.to(dtype)
    form, bits = _FORMATS[w.dtype], w.view(torch.int16).to(torch.int32)
    magnitude = bits & 0x7FFF
    count = (magnitude << _MORE) + compensation
    drop = form.dropped - _MORE
    value = ((count << drop) + form.bias).view(torch.float32)
    if form.normal:
        least = (form.normal - form.bias) >> drop
        value = torch.where(count < least, count.float() * 2.0 ** -(24 + _MORE), value)
    value = torch.where(magnitude > form.largest, w.float().abs(), value)
    return torch.where(bits < 0, -value, value).to(dtype)


def keep_weights(
    w: Tensor,
    compensation: Tensor | None,
    values: Tensor,
    first: int | Tensor,
    salt: int | None,
) -> None:
    """Write weights in the dtype that they are kept in.

    Finite numbers stay finite: those beyond the largest become that. NaN and infinity stay.

    Args:
        w: any shape.
        compensation: int8 of the same shape, for bf16 and fp16; takes what ``w`` loses. Or None.
        values: of the same shape, contiguous, fp32 where they are rounded at random.
        first: index in the parameter of the first element, or (rows,) of each row's, int64; seeds
            the random bits.
        salt: from :func:`weight_salt`; None to round to nearest, a compensation too.
    """
    if w.dtype not in _FORMATS or (salt is None and compensation is None):
        w.copy_(values)
        return
    form, x = _FORMATS[w.dtype], values.float().contiguous()
    more = 0 if compensation is None else _MORE
    drop, bits = form.dropped - more, x.view(torch.int32)
    noise = torch.full_like(bits, 1 << (drop - 1))
    if salt is not None:
        if isinstance(first, Tensor):
            column = torch.arange(x.shape[1], dtype=torch.int64, device=x.device)
            index = first[:, None] + column
        else:
            index = _indices(first, x.numel(), x.device)
        noise = _noise(index.view(x.shape), salt) & ((1 << drop) - 1)
    magnitude = bits & 0x7FFFFFFF
    count = (magnitude - form.bias + noise) >> drop
    if form.normal:
        parts = x.abs().clamp(max=1.0) * 2.0 ** (24 + more) + noise.float() * 2.0**-drop
        count = torch.where(magnitude < form.normal, parts.floor().to(torch.int32), count)
    kept = count if compensation is None else (count + (1 << (more - 1))) >> more
    kept = kept.clamp_(max=form.largest)
    special = magnitude >= 0x7F800000
    rounded = torch.where(bits < 0, kept | -0x8000, kept).to(torch.int16).view(w.dtype)
    w.copy_(torch.where(special, x.to(w.dtype), rounded))
    if compensation is not None:
        rest = (count - (kept << more)).clamp_(max=127)
        compensation.copy_(rest.masked_fill_(special, 0))


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
    noise = noise_from(first, x.shape[1], salt, x.device)
    bits = x.view(torch.int32)
    special = (bits & 0x7F800000) == 0x7F800000
    rounded = torch.where(special, bits, bits + noise) & -0x10000
    return rounded.view(torch.float32).to(torch.bfloat16)


def noise_from(first: int, count: int, salt: int, device: torch.device) -> Tensor:
    """16 random bits for each of so many elements in a row, (count,) int32.

    Args:
        first: index in the parameter of the first element.
        count: how many.
        salt: from :func:`rounding_salt`.
        device: where.
    """
    return _noise(_indices(first, count, device), salt)


def _indices(first: int, count: int, device: torch.device) -> Tensor:
    return torch.arange(first, first + count, dtype=torch.int64, device=device)


def _noise(index: Tensor, salt: int) -> Tensor:
    """16 random bits of each index, int32; ``index`` is overwritten."""
    return _mixed(index.mul_(_WEYL).add_(salt)).bitwise_and_(0xFFFF).to(torch.int32)


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
