# SPDX-License-Identifier: Apache-2.0
"""What runs on the device; launched by :mod:`adapprox_ds.micro_adam.kernels.window_passes`.

All arithmetic is in fp32, of the operations of the torch path and in their order, so that codes,
ranges and moments have its bits (micro_adam/quantize.py, micro_adam/window.py): divisions and roots
are rounded to nearest, and the launches forbid the compiler to fuse products into sums.

A row is a block, or the frame of a part of one, and holds whole groups: rows lie end to end, and so
do groups.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adapprox_ds.core.kernels.triton_weights import keep_weights, load_weights


@triton.jit
def _grid(low: tl.tensor, high: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """What codes stand for, (code - zero) unit + base; unit, divisor, zero, base: (groups, 1)."""
    unit = tl.div_rn(high - low, 15.0)
    divisor = tl.where(unit == 0.0, 1.0, unit)
    around = (low <= 0.0) & (high >= 0.0)
    zero = tl.floor(tl.div_rn(-low, divisor) + 0.5)
    zero = tl.minimum(zero, 15.0, propagate_nan=tl.PropagateNan.ALL)
    zero = tl.where(around, zero, 0.0)
    base = tl.where(around, 0.0, low)
    return unit[:, None], divisor[:, None], zero[:, None], base[:, None]


@triton.jit
def accumulate_kernel(
    g_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    low_ptr: tl.tensor,
    high_ptr: tl.tensor,
    outside_ptr: tl.tensor,
    a_ptr: tl.tensor,
    size_ptr: tl.tensor,
    groups: tl.tensor,
    ASCEND: tl.constexpr,
    GROUP: tl.constexpr,
    WIDE: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """The gradient plus the error that its codes stand for, and what is sorted by.

    A program takes ``GROUPS`` groups of ``GROUP`` elements, padded to ``WIDE``. Elements outside
    of a frame's part become 0 and have the size -1, so that they are taken last.
    """
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    in_group = group < groups
    cell = tl.arange(0, WIDE)
    half = tl.arange(0, WIDE // 2)
    inside = in_group[:, None] & (cell < GROUP)[None, :]
    packed = tl.load(
        codes_ptr + group[:, None] * (GROUP // 2) + half[None, :],
        mask=in_group[:, None] & (half < GROUP // 2)[None, :],
        other=0,
    )
    low = tl.load(low_ptr + group, mask=in_group, other=0.0)
    high = tl.load(high_ptr + group, mask=in_group, other=0.0)
    code = tl.interleave(packed & 15, packed >> 4).to(tl.float32)
    unit, _, zero, base = _grid(low, high)
    a = (code - zero) * unit + base
    here = group[:, None] * GROUP + cell[None, :]
    g = tl.load(g_ptr + here, mask=inside, other=0.0).to(tl.float32)
    a = a - g if ASCEND else a + g
    size = tl.abs(a)
    if outside_ptr is not None:
        outside = tl.load(outside_ptr + here, mask=inside, other=0) != 0
        a = tl.where(outside, 0.0, a)
        size = tl.where(outside, -1.0, size)
    tl.store(a_ptr + here, a, mask=inside)
    tl.store(size_ptr + here, size, mask=inside)


@triton.jit
def keep_kernel(
    a_ptr: tl.tensor,
    outside_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    low_ptr: tl.tensor,
    high_ptr: tl.tensor,
    left_ptr: tl.tensor,
    groups: tl.tensor,
    kept: tl.tensor,
    GROUP: tl.constexpr,
    WIDE: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """What is left of the accumulator as codes between each group's minimum and maximum.

    Where a part of it is applied, ``left`` becomes what the codes read as, and the ranges shrink to
    those with which they read as ``kept`` times as much.
    """
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    in_group = group < groups
    cell = tl.arange(0, WIDE)
    half = tl.arange(0, WIDE // 2)
    inside = in_group[:, None] & (cell < GROUP)[None, :]
    here = group[:, None] * GROUP + cell[None, :]
    a = tl.load(a_ptr + here, mask=inside, other=0.0)
    if outside_ptr is not None:
        inside &= tl.load(outside_ptr + here, mask=inside, other=1) == 0
    # The hardware's minimum and maximum pass over NaN.
    unknown = tl.max(((a != a) & inside).to(tl.int32), axis=1) != 0
    low = tl.where(unknown, float("nan"), tl.min(tl.where(inside, a, float("inf")), axis=1))
    high = tl.where(unknown, float("nan"), tl.max(tl.where(inside, a, float("-inf")), axis=1))
    unit, divisor, zero, base = _grid(low, high)
    code = tl.floor(tl.div_rn(a - base, divisor) + zero + 0.5)
    # Of NaN and 0 the larger is 0.
    code = tl.where(inside, tl.minimum(tl.maximum(code, 0.0), 15.0), 0.0)
    even, odd = tl.split(tl.reshape(code.to(tl.uint8), (GROUPS, WIDE // 2, 2)))
    tl.store(
        codes_ptr + group[:, None] * (GROUP // 2) + half[None, :],
        even | odd << 4,
        mask=in_group[:, None] & (half < GROUP // 2)[None, :],
    )
    if left_ptr is not None:
        cells = in_group[:, None] & (cell < GROUP)[None, :]
        tl.store(left_ptr + here, (code - zero) * unit + base, mask=cells)
        low = tl.reshape(((0.0 - zero) * unit + base) * kept, (GROUPS,))
        high = tl.reshape(((15.0 - zero) * unit + base) * kept, (GROUPS,))
    tl.store(low_ptr + group, low, mask=in_group)
    tl.store(high_ptr + group, high, mask=in_group)


@triton.jit(do_not_specialize=["weight_salt"])
def update_kernel(
    w_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    square_ptr: tl.tensor,
    left_ptr: tl.tensor,
    indices_ptr: tl.tensor,
    values_ptr: tl.tensor,
    base_ptr: tl.tensor,
    first_ptr: tl.tensor,
    rest_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    width: tl.tensor,
    slots: tl.tensor,
    window: tl.tensor,
    indices_step: tl.tensor,
    values_step: tl.tensor,
    eps: tl.tensor,
    rate: tl.tensor,
    decay: tl.tensor,
    push: tl.tensor,
    weight_salt: tl.tensor,
    COLS: tl.constexpr,
    SLOTS: tl.constexpr,
    AT_RANDOM: tl.constexpr,
) -> None:
    """The moments of one row, made in two rows of work space, and its weights.

    Within one row of the ring no place occurs twice with a value other than 0, so that programs
    need no atomics; the rows are added one after the other, as in the torch path. Weights are
    (2, window), of the first and the second moment; rate is minus the learning rate, and push what
    the error that this step leaves is applied times, where there is one.
    """
    row = tl.program_id(0).to(tl.int64)
    w_ptr += row * width
    if left_ptr is not None:
        left_ptr += row * width
    if rest_ptr is not None:
        rest_ptr += row * width
    index = 0
    if first_ptr is not None:
        index = tl.load(first_ptr + row)
    mean_ptr += row * width
    square_ptr += row * width
    indices_ptr += row * slots
    values_ptr += row * slots
    base = 0
    if base_ptr is not None:
        base = tl.load(base_ptr + row).to(tl.int32)
    lane = tl.arange(0, SLOTS)
    column = tl.arange(0, COLS)
    for first in range(0, width, COLS):
        col = first + column
        tl.store(mean_ptr + col, 0.0, mask=col < width)
        tl.store(square_ptr + col, 0.0, mask=col < width)
    # Other threads add to what one has cleared, and to what one has added to.
    tl.debug_barrier()
    for ring in range(window):
        mean_weight = tl.load(weights_ptr + ring)
        square_weight = tl.load(weights_ptr + window + ring)
        for first in range(0, slots, SLOTS):
            slot = first + lane
            value = tl.load(values_ptr + slot, mask=slot < slots, other=0.0).to(tl.float32)
            place = tl.load(indices_ptr + slot, mask=slot < slots, other=0).to(tl.int32) - base
            # Slots that hold nothing all name one place.
            held = value != 0.0
            mean = tl.load(mean_ptr + place, mask=held, other=0.0)
            square = tl.load(square_ptr + place, mask=held, other=0.0)
            tl.store(mean_ptr + place, mean + value * mean_weight, mask=held)
            tl.store(square_ptr + place, square + (value * value) * square_weight, mask=held)
        indices_ptr += indices_step
        values_ptr += values_step
        tl.debug_barrier()
    for first in range(0, width, COLS):
        col = first + column
        inside = col < width
        mean = tl.load(mean_ptr + col, mask=inside, other=0.0)
        square = tl.load(square_ptr + col, mask=inside, other=0.0)
        weight = load_weights(w_ptr, rest_ptr, col, inside)
        weight = weight * decay
        if left_ptr is not None:
            weight += push * tl.load(left_ptr + col, mask=inside, other=0.0)
        weight += rate * tl.div_rn(mean, tl.sqrt_rn(square) + eps)
        keep_weights(w_ptr, rest_ptr, col, inside, weight, index + col, weight_salt, AT_RANDOM)
