# SPDX-License-Identifier: Apache-2.0
"""Random sketches that depend on what a block is and when, and on nothing else.

Numbers come from a counter: they are a hash of the block's key and their place. So all blocks of a
stack are drawn at once, on their device and without a generator's state; a resumed run draws what
the unbroken one drew; the order of ranks is free, and the model's own random stream is untouched.

Algorithm 1 asks for Gaussian columns. The one-pass step takes uniform ones, which have the same
guarantees up to constants, as all sub-Gaussian ones do, and cost a quarter of a hash each.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: The odd constant of a Weyl sequence and the multipliers of SplitMix64's finaliser (Steele, Lea
#: and Flood, "Fast splittable pseudorandom number generators", 2014), as signed 64-bit integers.
_WEYL, _FIRST, _SECOND = (
    x - (1 << 64) if x >> 63 else x
    for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def sketch_key(seed: int, name: str, first_row: int, step: int) -> int:
    """A signed 64-bit number of a block at a step.

    Args:
        seed: the optimizer's seed.
        name: the parameter's name.
        first_row: first row of the block in the parameter's 2-D view.
        step: the step count, 1 at the first step; negative for the test sketch.
    """
    key = f"{seed}\0{name}\0{first_row}\0{step}".encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def sketch_width(rank: int, oversampling: int, rows: int, cols: int) -> int:
    """k + p, never more than the matrix has dimensions."""
    return min(rank + oversampling, rows, cols)


def gaussian_sketches(keys: Sequence[int], size: tuple[int, int], like: Tensor) -> Tensor:
    """The Gaussian matrices that S-RSI starts from.

    Args:
        keys: of B blocks, from :func:`sketch_key`.
        size: (cols, k + p).
        like: tensor whose dtype and device the result takes.

    Returns:
        (B, cols, k + p), iid standard normal, drawn in fp32 whatever the dtype.
    """
    count = size[0] * size[1]
    pairs = (count + 1) // 2
    start = _on_device(keys, like.device)
    index = torch.arange(1, pairs + 1, dtype=torch.int64, device=like.device)
    bits = _mixed(start[:, None] + index.mul_(_WEYL))
    # 24 bits each, as many as fp32 resolves: the first in (0, 1], the second in [0, 1).
    radius = ((bits >> 40) & 0xFFFFFF).float().add_(1.0).mul_(2.0**-24).log_().mul_(-2.0).sqrt_()
    angle = (bits & 0xFFFFFF).float().mul_(2.0 * math.pi * 2.0**-24)
    normal = torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1)
    return normal[:, :count].to(like.dtype).view(-1, *size)


def uniform_sketches(
    keys: Sequence[int], first: int, rows: int, width: int, deviation: float, like: Tensor
) -> Tensor:
    """Independent columns of mean 0, uniform on 2^16 points.

    Args:
        keys: of B blocks, from :func:`sketch_key`.
        first: the first row drawn; a row's numbers do not depend on which rows are.
        rows: how many are.
        width: number of columns.
        deviation: the standard deviation of each number.
        like: tensor whose dtype and device the result takes.

    Returns:
        (B, rows, width).
    """
    quads = (width + 3) // 4
    index = torch.arange(
        first * quads + 1, (first + rows) * quads + 1, dtype=torch.int64, device=like.device
    )
    bits = _mixed(_on_device(keys, like.device)[:, None] + index.mul_(_WEYL))
    # Four numbers of 16 bits from each hash.
    drawn = bits.view(torch.int16).view(len(keys), rows, 4 * quads)[..., :width]
    return drawn.to(like.dtype).add_(0.5).mul_(deviation * math.sqrt(3.0) * 2.0**-15)


def gaussian_sketch(
    seed: int, name: str, first_row: int, step: int, size: tuple[int, int], like: Tensor
) -> Tensor:
    """One block's Gaussian matrix, (cols, k + p): arguments as of the functions above."""
    return gaussian_sketches([sketch_key(seed, name, first_row, step)], size, like)[0]


def _on_device(keys: Sequence[int], device: torch.device) -> Tensor:
    numbers = torch.tensor(keys, dtype=torch.int64, device="cpu")
    if device.type != "cpu":
        numbers = numbers.pin_memory().to(device, non_blocking=True)
    return numbers


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finaliser of int64 numbers, in place; products wrap."""
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
        x ^= (x >> shift) & ((1 << (64 - shift)) - 1)  # a logical shift: torch's keeps the sign
        x *= factor
    return x
