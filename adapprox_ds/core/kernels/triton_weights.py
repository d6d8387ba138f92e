# SPDX-License-Identifier: Apache-2.0
"""Weights in 16 bits on the device: read as fp32, and rounded at random or with a compensation."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mixed(x: tl.tensor) -> tl.tensor:
    """The hash of core/rounding.py."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_bits(index: tl.tensor, salt: tl.tensor) -> tl.tensor:
    """16 random bits of an element."""
    return _mixed(index.to(tl.uint32) * 0x9E3779B9 + salt.to(tl.uint32)) & 0xFFFF


@triton.jit
def load_weights(
    w_ptr: tl.tensor, rest_ptr: tl.tensor, here: tl.tensor, inside: tl.tensor
) -> tl.tensor:
    """Weights with their compensation in fp32; core/rounding.py has the formulas."""
    weight = tl.load(w_ptr + here, mask=inside, other=0.0)
    value = weight.to(tl.float32)
    if rest_ptr is not None:
        bits = weight.to(tl.int16, bitcast=True).to(tl.int32)
        count = ((bits & 0x7FFF) << 8) + tl.load(rest_ptr + here, mask=inside, other=0).to(tl.int32)
        if w_ptr.dtype.element_ty == tl.bfloat16:
            exact = (count << 8).to(tl.float32, bitcast=True)
        else:
            exact = ((count << 5) + (112 << 23)).to(tl.float32, bitcast=True)
            exact = tl.where(count < 1 << 18, count.to(tl.float32) * 2.0**-32, exact)
        special = (value != value) | (tl.abs(value) == float("inf"))
        value = tl.where(special, value, tl.where(bits < 0, -exact, exact))
    return value


@triton.jit
def keep_weights(
    w_ptr: tl.tensor, rest_ptr: tl.tensor, here: tl.tensor, inside: tl.tensor, weight: tl.tensor,
    index: tl.tensor, salt: tl.tensor, AT_RANDOM: tl.constexpr,
) -> None:  # fmt: skip
    """Write weights and their compensation; the bits are those of core/rounding.py."""
    if w_ptr.dtype.element_ty == tl.float32 or (rest_ptr is None and not AT_RANDOM):
        tl.store(w_ptr + here, weight.to(w_ptr.dtype.element_ty), mask=inside)
    else:
        BRAIN: tl.constexpr = w_ptr.dtype.element_ty == tl.bfloat16
        MORE: tl.constexpr = 0 if rest_ptr is None else 8
        DROP: tl.constexpr = (16 if BRAIN else 13) - MORE
        LARGEST: tl.constexpr = 0x7F7F if BRAIN else 0x7BFF
        bits = weight.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        noise = tl.full(bits.shape, 1 << (DROP - 1), tl.int32)
        if AT_RANDOM:
            noise = random_bits(index, salt).to(tl.int32) & ((1 << DROP) - 1)
        if BRAIN:
            count = (magnitude + noise) >> DROP
        else:
            count = (magnitude - (112 << 23) + noise) >> DROP
            parts = tl.minimum(tl.abs(weight), 1.0) * 2.0 ** (24 + MORE)
            parts += noise.to(tl.float32) * 2.0**-DROP
            count = tl.where(magnitude < 113 << 23, parts.to(tl.int32), count)
        kept = count
        if MORE > 0:
            kept = (count + 128) >> 8
        kept = tl.minimum(kept, LARGEST)
        special = magnitude >= 0x7F800000
        rounded = kept | ((bits >> 16) & 0x8000)
        rounded = rounded.to(tl.int16).to(w_ptr.dtype.element_ty, bitcast=True)
        rounded = tl.where(special, weight.to(w_ptr.dtype.element_ty), rounded)
        tl.store(w_ptr + here, rounded, mask=inside)
        if MORE > 0:
            rest = tl.where(special, 0, tl.minimum(count - (kept << 8), 127))
            tl.store(rest_ptr + here, rest.to(tl.int8), mask=inside)
