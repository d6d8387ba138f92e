# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding: a number is rounded up or down at random, so that the mean error is zero.

The random bits of an element are a hash of its index and of the step. So no random generator is
kept, and a run that is repeated or resumed computes the same bits.

If weights in bf16 or fp16 are rounded to nearest, updates of less than half a unit in the last
place (ulp) are lost. So they are rounded stochastically, or, where a *compensation* is kept,
stochastically to eight more bits. The magnitude of an element is then an integer c, in units of
ulp/256. The weight is the nearest number of ulps, h = floor((c + 128) / 256), and the compensation
is c - 256 h, an int8, so that both together give c exactly. Counted in this way, fp16's subnormal
numbers are continued by its normal ones without a gap, as in the format itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = (1 << 32) - 1
#: Constants of a Weyl sequence and of the hash "lowbias32" (C. Wellons, "hash-prospector", 2018).
_WEYL, _FIRST, _SECOND = 0x9E3779B9, 0x7FEB352D, 0x846CA68B

#: The bits of a compensation.
_MORE = 8
#: A bit that is flipped in the step's number, so that weights get other random bits than moments.
_OF_WEIGHTS = 1 << 30


def rounding_salt(step: int) -> int:
    """The salt of a step's random bits, 32 bits, for moments and factors."""
    return _mixed_int(step & _MASK)


def weight_salt(step: int) -> int:
    """The salt of a step's random bits, 32 bits, for weights."""
    return rounding_salt(step ^ _OF_WEIGHTS)


@dataclass(frozen=True, slots=True)
class _Format:
    """A 16-bit format, compared with fp32.

    Attributes:
        dropped: the number of bits of an fp32 magnitude that the format does not have.
        bias: the difference of the exponents' biases, at the exponent's place in fp32.
        normal: the bits in fp32 of its least normal number; 0 where that is fp32's own.
        largest: the bits of its largest finite number.
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
    """Weights with their compensation added, in ``dtype``.

    Args:
        w: the weights, of any shape.
        compensation: int8 of the same shape, for bf16 and fp16; or None.
        dtype: the dtype of the result, fp32 or fp64.

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
    """Round new values to the dtype of the weights, and write them there.

    Finite numbers that are too large become the largest finite one. NaN and infinity stay.

    Args:
        w: the weights, of any shape.
        compensation: int8 of the same shape, for bf16 and fp16, which receives what ``w`` loses by
            rounding; or None.
        values: the new values, of the same shape, contiguous; fp32 if they are rounded at random.
        first: the index in the flattened parameter of the first element, or of that of each row,
            (rows,) int64; it determines the random bits.
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
    """``x``, rounded stochastically to bf16.

    Args:
        x: fp32, contiguous. NaN and infinity stay.
        first: the index in the flattened parameter of the first element.
        salt: from :func:`rounding_salt`.
    """
    return _rounded(x.reshape(1, -1), first, salt).view(x.shape)


def round_factor(x: Tensor, dtype: torch.dtype, first_row: int, salt: int) -> Tensor:
    """A factor in the dtype in which it is kept; to bf16 it is rounded stochastically.

    Rounded to nearest it would not change, as a step changes V by only 1 - beta_2 of itself.

    Args:
        x: the factors of B blocks, (B, r, k), fp32 or fp64.
        dtype: bf16, or the dtype of ``x``.
        first_row: the index in the whole factor of the first row, so that processes that hold the
            same row round it alike.
        salt: from :func:`rounding_salt`. All blocks get the same random bits.
    """
    if dtype == x.dtype:
        return x
    rows = x.float().reshape(len(x), -1)
    return _rounded(rows, first_row * x.shape[2], salt).view(x.shape)


def _rounded(x: Tensor, first: int, salt: int) -> Tensor:
    """The rows of ``x`` in bf16, all rounded by the same random bits."""
    noise = noise_from(first, x.shape[1], salt, x.device)
    bits = x.view(torch.int32)
    special = (bits & 0x7F800000) == 0x7F800000
    rounded = torch.where(special, bits, bits + noise) & -0x10000
    return rounded.view(torch.float32).to(torch.bfloat16)


def noise_from(first: int, count: int, salt: int, device: torch.device) -> Tensor:
    """16 random bits for each of ``count`` consecutive elements, (count,) int32.

    Args:
        first: the index in the flattened parameter of the first element.
        count: the number of elements.
        salt: from :func:`rounding_salt`.
        device: the device of the result.
    """
    return _noise(_indices(first, count, device), salt)


def _indices(first: int, count: int, device: torch.device) -> Tensor:
    return torch.arange(first, first + count, dtype=torch.int64, device=device)


def _noise(index: Tensor, salt: int) -> Tensor:
    """16 random bits for each index, int32; ``index`` is overwritten."""
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
