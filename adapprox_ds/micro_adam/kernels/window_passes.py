# SPDX-License-Identifier: Apache-2.0
"""MicroAdam's step on a batch of blocks in Triton, but for the choice of the largest entries.

Two passes of which each program takes some groups: one before that choice, and one that keeps what
is left. Then one of which each program takes a row. Nothing here waits for the device.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from adapprox_ds.micro_adam.kernels.window_kernels import (
    accumulate_kernel,
    keep_kernel,
    update_kernel,
)
from adapprox_ds.micro_adam.step import Batch, StepScalars, take_largest

#: Elements that a program of the passes over groups takes, if a group has not more.
_TILE = 2048
#: Elements that a program takes at a time of a row, and of its slots.
_COLS, _SLOTS = 1024, 512


def update(x: Batch, s: StepScalars) -> None:
    """Update weights, window and error; as :func:`adapprox_ds.micro_adam.step.update`.

    Args:
        x: the blocks, or frames, of contiguous weights and gradients in fp32, bf16 or fp16; with
            an error in 4 bits.
        s: the step's numbers.
    """
    e, (rows, width) = x.error, x.g.shape
    a = torch.empty_like(x.g, dtype=torch.float32)
    size = torch.empty_like(a)
    outside = None if x.outside is None else x.outside.view(torch.uint8)
    slots = x.indices.shape[2]
    tiles, groups = tiles_of(x.group), e.low.numel()
    grid = (-(-groups // tiles["GROUPS"]),)
    with torch.cuda.device_of(x.g):
        accumulate_kernel[grid](
            x.g, e.codes, e.low, e.high, outside, a, size, groups, ASCEND=s.ascend, **tiles
        )
        take_largest(x, a, size, s.row)
        left = torch.empty_like(a) if s.alpha else None
        keep_kernel[grid](
            a, outside, e.codes, e.low, e.high, left, groups, float(1.0 - s.alpha), **tiles
        )
        update_kernel[(rows,)](
            x.w, a, size, left, x.indices, x.values, x.base, x.first, x.compensation,
            _weights(s, x.w.device),
            width, slots, x.indices.shape[0], x.indices.stride(0), x.values.stride(0),
            float(s.eps), -float(s.lr), float(1.0 - s.lr * s.weight_decay),
            -float(s.lr * s.alpha),
            ((s.weight_salt or 0) ^ 1 << 31) - (1 << 31),
            AT_RANDOM=s.weight_salt is not None and x.first is not None, **rows_of(slots),
        )  # fmt: skip


def tiles_of(group: int) -> dict[str, int | bool]:
    """Compile-time arguments of the passes over groups, and how to compile them."""
    wide = triton.next_power_of_2(group)
    tile = max(_TILE, wide)
    return {
        "GROUP": group,
        "WIDE": wide,
        "GROUPS": tile // wide,
        "num_warps": min(16, tile // 512),
        "enable_fp_fusion": False,
    }


def rows_of(slots: int) -> dict[str, int | bool]:
    """Compile-time arguments of the pass over rows, and how to compile it."""
    return {
        "COLS": _COLS,
        "SLOTS": min(_SLOTS, triton.next_power_of_2(slots)),
        "num_warps": 4,
        # No load may come before the stores of the turn before.
        "num_stages": 1,
        "enable_fp_fusion": False,
    }


def _weights(s: StepScalars, device: torch.device) -> Tensor:
    """What the rows of the ring count in the first and the second moment, (2, window) fp32."""
    # From pinned memory, so that the host does not wait for the device to come to this copy.
    rows, pinned = [s.mean_weights, s.square_weights], device.type == "cuda"
    host = torch.tensor(rows, dtype=torch.float32, device="cpu", pin_memory=pinned)
    return host.to(device, non_blocking=True)
