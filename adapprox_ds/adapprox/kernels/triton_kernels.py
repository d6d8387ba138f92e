# SPDX-License-Identifier: Apache-2.0
"""What runs on the device; launched by :mod:`adapprox_ds.adapprox.kernels.triton_pass`.

All arithmetic is in fp32. A launch takes blocks of many shapes: what differs between them, and
where they lie, programs read from tables of int64. The first field of a table's row is the first
program that works on it, and ``owners_ptr`` has each program's row. What lies outside of a piece is
masked to 0, so that it adds nothing to any sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adapprox_ds.adapprox.quantized import GAPS_4, LEVELS_4
from adapprox_ds.core.kernels.triton_weights import keep_weights, load_weights, random_bits

#: Fields of a row: of pieces of stacks, of runs, and of sums.
PIECE, RUN, SUM = tl.constexpr(23), tl.constexpr(11), tl.constexpr(8)
#: Fields of a place, of which each block of a piece has one.
PLACE = tl.constexpr(6)
#: Elements that share a scale of codes, and the numbers of that format (adapprox/quantized.py).
GROUP = tl.constexpr(128)
_LEVELS, _INVERSE_SQUARE = tl.constexpr(127.0), tl.constexpr(1.0 / 127**2)
_SMALLEST_SCALE = tl.constexpr(2.0**-110)
_LEVELS_4 = tl.constexpr(LEVELS_4)
_GAPS_4 = tl.constexpr(GAPS_4)


@triton.jit
def pointer(field: tl.tensor, KIND: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """The address that a field holds; ``ALIGNED`` to 16 bytes, as only the host can know."""
    pointer = tl.load(field).to(tl.pointer_type(KIND))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def floats(field: tl.tensor, step: tl.tensor) -> tl.tensor:
    """The address that a field holds, ``step`` floats on."""
    return tl.load(field).to(tl.pointer_type(tl.float32)) + step


@triton.jit
def _split(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """``x`` as a sum of two numbers of TF32's precision, the first rounded to nearest."""
    bits = x.to(tl.int32, bitcast=True)
    high = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def product(a: tl.tensor, b: tl.tensor, total: tl.tensor, TF32: tl.constexpr) -> tl.tensor:
    """``total + a b``, as exact as fp32, by three TF32 products of the split factors.

    Triton's own "tf32x3" does the same, and then replaces NaN by 0: a sixth of all instructions.
    """
    if TF32:
        a_high, a_low = _split(a)
        b_high, b_low = _split(b)
        total = tl.dot(a_low, b_high, total, input_precision="tf32")
        total = tl.dot(a_high, b_low, total, input_precision="tf32")
        total = tl.dot(a_high, b_high, total, input_precision="tf32")
    else:
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def slice_of(
    pointer: tl.tensor, row: tl.tensor, inside: tl.tensor, first: tl.tensor, columns: tl.tensor,
    SLICE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Columns from ``first`` on of rows of a matrix of ``columns``; 0 outside of it."""
    column = first + tl.arange(0, SLICE)
    return tl.load(
        pointer + row[:, None] * columns + column[None, :],
        mask=inside[:, None] & (column < columns)[None, :],
        other=0.0,
    )


@triton.jit
def _load_mean(
    m_ptr: tl.tensor, scale_ptr: tl.tensor, here: tl.tensor, inside: tl.tensor,
    pairs: tl.tensor, in_pairs: tl.tensor, in_row: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """A tile of the first moment in fp32; ``pairs`` are the places of 4-bit codes."""
    if m_ptr.dtype.element_ty == tl.uint8:
        scale = tl.load(scale_ptr, mask=in_row, other=0.0)[:, None]
        held = tl.load(m_ptr + pairs, mask=in_pairs, other=0).to(tl.int32)
        code = tl.interleave(held & 15, held >> 4)
        code = tl.where(code > 7, code - 16, code)
        size = tl.abs(code)
        mean = tl.zeros(code.shape, tl.float32)
        for i in tl.static_range(1, 8):
            mean = tl.where(size == i, _LEVELS_4[i], mean)
        mean = tl.where(code < 0, -mean, mean) * scale
    elif m_ptr.dtype.element_ty == tl.int8:
        code = tl.load(m_ptr + here, mask=inside, other=0).to(tl.int32)
        scale = tl.load(scale_ptr, mask=in_row, other=0.0)[:, None]
        mean = (code * tl.abs(code)).to(tl.float32) * _INVERSE_SQUARE * scale
    else:
        mean = tl.load(m_ptr + here, mask=inside, other=0).to(tl.float32)
    return mean


@triton.jit
def _keep_scale(
    scale_ptr: tl.tensor, inside: tl.tensor, in_row: tl.tensor, mean: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Write the scale of each row's group; what to compare with, infinity where all reads as 0."""
    # Without their sign, floats are in the order of their bits, infinity and NaN last.
    bits = tl.where(inside, mean.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    most = tl.max(bits, axis=1)
    finite = most < 0x7F800000
    largest = most.to(tl.float32, bitcast=True)
    largest = tl.where(largest < _SMALLEST_SCALE, 0.0, largest)
    tl.store(scale_ptr, tl.where(finite, largest, float("nan")), mask=in_row)
    return tl.where(finite & (largest > 0), largest, float("inf"))[:, None], finite[:, None]


@triton.jit
def _keep_mean(
    m_ptr: tl.tensor, scale_ptr: tl.tensor, here: tl.tensor, inside: tl.tensor,
    pairs: tl.tensor, in_pairs: tl.tensor, in_row: tl.tensor,
    mean: tl.tensor, index: tl.tensor, salt: tl.tensor,
) -> None:  # fmt: skip
    """Write a tile of the first moment: at random to bf16 and 4-bit codes, else to nearest."""
    if m_ptr.dtype.element_ty == tl.bfloat16:
        bits = mean.to(tl.uint32, bitcast=True)
        noise = random_bits(index, salt)
        special = (bits & 0x7F800000) == 0x7F800000
        bits = tl.where(special, bits, bits + noise) >> 16
        tl.store(m_ptr + here, bits.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
    elif m_ptr.dtype.element_ty == tl.int8:
        divisor, finite = _keep_scale(scale_ptr, inside, in_row, mean)
        root = tl.sqrt_rn(tl.div_rn(tl.abs(mean), divisor + tl.zeros_like(mean)))
        # The sum has no bits for fractions: rounds to nearest, halves to even.
        code = (_LEVELS * root + 12582912.0) - 12582912.0
        code = tl.where(finite, tl.where(mean < 0, -code, code), 0.0)
        tl.store(m_ptr + here, code.to(tl.int8), mask=inside)
    elif m_ptr.dtype.element_ty == tl.uint8:
        most, finite = _keep_scale(scale_ptr, inside, in_row, mean)
        size = tl.abs(mean)
        code = tl.zeros(mean.shape, tl.int32)
        below = tl.zeros(mean.shape, tl.float32)
        gap = most * _GAPS_4[0] + below
        for i in tl.static_range(1, 8):
            level = most * _LEVELS_4[i]
            reached = size >= level
            code += reached.to(tl.int32)
            below = tl.where(reached, level, below)
            gap = tl.where(reached, most * _GAPS_4[i], gap)
        chance = random_bits(index, salt).to(tl.int32).to(tl.float32) * 2.0**-16
        code += (chance * gap < size - below).to(tl.int32)
        code = tl.where(inside & finite, tl.where(mean < 0, -code, code), 0) & 15
        even, odd = tl.split(tl.reshape(code, (mean.shape[0], mean.shape[1] // 2, 2)))
        tl.store(m_ptr + pairs, (even | odd << 4).to(tl.uint8), mask=in_pairs)
    else:
        tl.store(m_ptr + here, mean.to(m_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _update(
    w_ptr: tl.tensor, rest_ptr: tl.tensor, m_ptr: tl.tensor, scale_ptr: tl.tensor,
    here: tl.tensor, inside: tl.tensor, pairs: tl.tensor, in_pairs: tl.tensor,
    in_row: tl.tensor, index: tl.tensor, g: tl.tensor, denominator: tl.tensor, largest: tl.tensor,
    beta1: tl.tensor, gain: tl.tensor, of_mean: tl.tensor, of_new: tl.tensor, decay: tl.tensor,
    rate: tl.tensor, salt: tl.tensor, weight_salt: tl.tensor, OF_GRADIENTS: tl.constexpr,
    AT_RANDOM: tl.constexpr,
) -> None:  # fmt: skip
    """First moment and weights of a tile; the clip is in ``denominator`` and ``largest``.

    Outside of the piece quotients may be 0 / 0; they are not stored.
    """
    step = g
    if m_ptr is None or not OF_GRADIENTS:
        step /= denominator
    if m_ptr is not None:
        mean = _load_mean(m_ptr, scale_ptr, here, inside, pairs, in_pairs, in_row)
        mean = beta1 * mean + gain * step
        _keep_mean(m_ptr, scale_ptr, here, inside, pairs, in_pairs, in_row, mean, index, salt)
        step = of_mean * mean + of_new * step
        if OF_GRADIENTS:
            step /= denominator
            step = tl.clamp(step, -largest, largest, propagate_nan=tl.PropagateNan.ALL)
    weight = decay * load_weights(w_ptr, rest_ptr, here, inside) + rate * step
    keep_weights(w_ptr, rest_ptr, here, inside, weight, index, weight_salt, AT_RANDOM)


@triton.jit
def _clip_of(field: tl.tensor, index: tl.tensor) -> tl.tensor:
    """What updates are divided by: 1 where a field names no clips."""
    address = tl.load(field)
    pointer = address.to(tl.pointer_type(tl.float32)) + index
    return tl.load(pointer, mask=address != 0, other=1.0)


@triton.jit(do_not_specialize=["salt", "weight_salt"])
def pass_kernel(
    pieces_ptr: tl.tensor, places_ptr: tl.tensor, owners_ptr: tl.tensor, root_beta2: tl.tensor,
    rest2: tl.tensor, correction: tl.tensor, eps: tl.tensor, largest: tl.tensor, beta1: tl.tensor,
    gain: tl.tensor, of_mean: tl.tensor, of_new: tl.tensor, decay: tl.tensor, rate: tl.tensor,
    salt: tl.tensor, weight_salt: tl.tensor, G: tl.constexpr, W: tl.constexpr, M: tl.constexpr,
    REST: tl.constexpr, AT_RANDOM: tl.constexpr, OF_GRADIENTS: tl.constexpr,
    WRITE: tl.constexpr, ALIGNED: tl.constexpr, OFFSET: tl.constexpr,
    RANK: tl.constexpr, SKETCH: tl.constexpr, TESTS: tl.constexpr, SLICE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, SPAN: tl.constexpr, TF32: tl.constexpr,
) -> None:  # fmt: skip
    """``ROWS`` rows of a piece of a block over a walk of ``SPAN`` blocks of columns.

    The sketch and the row energies of the walk stay in registers; the projection of each tile is a
    partial result of its rows. ``G``, ``W``, ``M`` and ``REST`` are dtypes of gradients, weights,
    first moments and compensations (None: there are none), ``RANK``, ``SKETCH`` and ``TESTS`` the
    columns of factors, x and z in slices of ``SLICE``, 0 where there is none.
    """
    unit = tl.program_id(0).to(tl.int64)
    piece = pieces_ptr + tl.load(owners_ptr + unit) * PIECE
    unit -= tl.load(piece)
    rows, cols, blocks = tl.load(piece + 1), tl.load(piece + 2), tl.load(piece + 3)
    all_rows, all_cols = tl.load(piece + 4), tl.load(piece + 5)  # of the whole block
    k, width, tests = tl.load(piece + 7), tl.load(piece + 8), tl.load(piece + 9)
    walks = tl.cdiv(cols, COLS * SPAN)
    units = tl.cdiv(rows, ROWS) * walks
    block = unit // units
    unit %= units
    chunk = unit // walks
    walk = unit % walks
    # Rows before this program's, which it counts from 0 on.
    above = chunk * ROWS

    place = places_ptr + (tl.load(piece + 10) + block) * PLACE
    g_ptr = pointer(place, G, ALIGNED) + above * cols
    q_ptr = floats(piece + 11, (block * all_rows + above) * k)
    u_ptr = floats(piece + 12, block * all_cols * k)
    x_ptr = floats(piece + 13, block * all_cols * width)
    z_ptr = floats(piece + 14, (block * all_rows + above) * tests)
    energies_ptr = floats(piece + 15, block * all_cols)
    row_floor_ptr = floats(piece + 16, block * all_rows + above)
    col_floor_ptr = floats(piece + 17, block * all_cols)
    p_ptr = floats(piece + 20, (chunk * blocks + block) * tests * all_cols)
    if WRITE:
        # D * clip = sqrt(V) * correction + eps of these. The host never knows the clip.
        clip = _clip_of(piece + 18, block)
        correction *= clip
        eps *= clip
        largest /= clip

    groups = tl.cdiv(cols, GROUP)
    if WRITE:
        w_ptr = pointer(place + 1, W, ALIGNED) + above * cols
        m_ptr = None
        if M is not None:
            if M == tl.uint8:
                m_ptr = pointer(place + 2, M, ALIGNED) + above * ((cols + 1) // 2)
            else:
                m_ptr = pointer(place + 2, M, ALIGNED) + above * cols
        rest_ptr = None
        if REST is not None:
            rest_ptr = pointer(place + 5, REST, False) + above * cols
        index = tl.load(place + 4) + above * cols

    # All that is left fits 32 bits, unless rows are so long that the host says otherwise.
    rows, cols, all_cols = (rows - above).to(OFFSET), cols.to(OFFSET), all_cols.to(OFFSET)
    k, width, tests = k.to(OFFSET), width.to(OFFSET), tests.to(OFFSET)
    if ALIGNED:
        cols = tl.multiple_of(cols, 16)
        all_cols = tl.multiple_of(all_cols, 16)
    # Without a floor there are none of its rows and columns.
    floored = tl.load(piece + 16) != 0
    floor_rows, floor_cols = tl.where(floored, rows, 0), tl.where(floored, cols, 0)
    row = tl.arange(0, ROWS).to(OFFSET)
    in_row = row < rows
    row_floor = tl.load(row_floor_ptr + row, mask=row < floor_rows, other=0.0) * root_beta2
    # Of a tile of codes each warp has columns of its own in products: it has so few rows that warps
    # would else compute the same, from registers that hold the whole tile.
    CHUNKS: tl.constexpr = COLS // 16 if COLS >= GROUP else 1
    sketched = ()
    for _i in tl.static_range(SKETCH):
        if CHUNKS > 1:
            sketched += (tl.zeros((CHUNKS, ROWS, SLICE), tl.float32),)  # type: ignore[assignment]
        else:
            sketched += (tl.zeros((ROWS, SLICE), tl.float32),)  # type: ignore[assignment]
    # Whole tiles where registers hold them: adding up in the loop takes shuffles between threads.
    row_energies = tl.zeros((ROWS, COLS) if CHUNKS == 1 else (ROWS,), tl.float32)
    squares = tl.zeros((ROWS, COLS), tl.float32)
    first = (walk * SPAN).to(OFFSET)
    for tile in range(first, tl.minimum(first + SPAN, tl.cdiv(cols, COLS))):
        col = tile * COLS + tl.arange(0, COLS)
        in_col = col < cols
        inside = in_row[:, None] & in_col[None, :]
        here = row[:, None] * cols + col[None, :]
        g = tl.load(g_ptr + here, mask=inside, other=0.0).to(tl.float32)
        root = tl.zeros((ROWS, COLS), tl.float32)
        for i in range(RANK):
            q = slice_of(q_ptr, row, in_row, i * SLICE, k, SLICE) * root_beta2
            u = slice_of(u_ptr, col, in_col, i * SLICE, k, SLICE)
            if CHUNKS > 1:
                q = tl.broadcast_to(q[None, :, :], (CHUNKS, ROWS, SLICE))
                u = tl.permute(tl.reshape(u, (CHUNKS, COLS // CHUNKS, SLICE)), (0, 2, 1))
                part = tl.zeros((CHUNKS, ROWS, COLS // CHUNKS), tl.float32)
                part = tl.permute(product(q, u, part, TF32), (1, 0, 2))
                root += tl.reshape(part, (ROWS, COLS))
            else:
                root = product(q, tl.trans(u), root, TF32)
        col_floor = tl.load(col_floor_ptr + col, mask=col < floor_cols, other=0.0)
        least = row_floor[:, None] * col_floor[None, :]
        root = tl.maximum(root, least, propagate_nan=tl.PropagateNan.ALL)
        v = root * root + (rest2 * g) * g
        energies = v * tl.load(energies_ptr + col, mask=in_col, other=0.0)[None, :]
        row_energies += energies if CHUNKS == 1 else tl.sum(energies, axis=1)
        root = tl.sqrt(v)
        sums = ()
        for i in tl.static_range(SKETCH):
            x = slice_of(x_ptr, col, in_col, i * SLICE, width, SLICE)
            if CHUNKS > 1:
                own = tl.permute(tl.reshape(root, (ROWS, CHUNKS, COLS // CHUNKS)), (1, 0, 2))
                x = tl.reshape(x, (CHUNKS, COLS // CHUNKS, SLICE))
                sums += (product(own, x, sketched[i], TF32),)  # type: ignore[assignment]
            else:
                sums += (product(root, x, sketched[i], TF32),)  # type: ignore[assignment]
        sketched = sums
        for i in range(TESTS):
            z = slice_of(z_ptr, row, in_row, i * SLICE, tests, SLICE)
            none = tl.zeros((SLICE, COLS), tl.float32)
            test = i * SLICE + tl.arange(0, SLICE)
            tl.store(
                p_ptr + test[:, None] * all_cols + col[None, :],
                product(tl.trans(z), root, none, TF32),
                mask=(test < tests)[:, None] & in_col[None, :],
            )
        denominator = root * correction + eps
        if WRITE:
            scale_ptr = None
            if M is not None:
                scale_ptr = floats(place + 3, (above + row) * groups + tile * COLS // GROUP)
            pair = tile * (COLS // 2) + tl.arange(0, COLS // 2)
            in_pairs = in_row[:, None] & (pair < (cols + 1) // 2)[None, :]
            pairs = row[:, None] * ((cols + 1) // 2) + pair[None, :]
            _update(
                w_ptr, rest_ptr, m_ptr, scale_ptr, here, inside, pairs, in_pairs, in_row,
                index + here, g,
                denominator, largest, beta1, gain, of_mean, of_new, decay, rate, salt,
                weight_salt, OF_GRADIENTS, AT_RANDOM,
            )  # fmt: skip
        else:
            # Where the gradient is 0 this may be 0 / 0: eps may be 0.
            x = tl.where(g == 0.0, 0.0, g / denominator)
            squares += x * x
    # Read again rather than kept: the loop has no register to spare.
    at = (walk * tl.load(piece + 3) + block) * tl.load(piece + 6) + above
    y_ptr = floats(piece + 19, at * tl.load(piece + 8))
    row_energies_ptr = floats(piece + 21, at)
    for i in tl.static_range(SKETCH):
        wide = i * SLICE + tl.arange(0, SLICE)
        tl.store(
            y_ptr + row[:, None] * width + wide[None, :],
            sketched[i] if CHUNKS == 1 else tl.sum(sketched[i], axis=0),
            mask=in_row[:, None] & (wide < width)[None, :],
        )
    row_energies = row_energies if CHUNKS > 1 else tl.sum(row_energies, axis=1)
    tl.store(row_energies_ptr + row, row_energies, mask=in_row)
    if not WRITE:
        tl.store(floats(piece + 22, unit * blocks + block), tl.sum(squares))


@triton.jit(do_not_specialize=["salt", "weight_salt"])
def run_kernel(
    runs_ptr: tl.tensor, owners_ptr: tl.tensor, beta2: tl.tensor, rest2: tl.tensor,
    correction: tl.tensor, eps: tl.tensor, largest: tl.tensor, beta1: tl.tensor, gain: tl.tensor,
    of_mean: tl.tensor, of_new: tl.tensor, decay: tl.tensor, rate: tl.tensor, salt: tl.tensor,
    weight_salt: tl.tensor, G: tl.constexpr, W: tl.constexpr, M: tl.constexpr,
    REST: tl.constexpr, AT_RANDOM: tl.constexpr, OF_GRADIENTS: tl.constexpr,
    WRITE: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """``ROWS`` groups of elements of a run."""
    unit = tl.program_id(0).to(tl.int64)
    run = runs_ptr + tl.load(owners_ptr + unit) * RUN
    unit -= tl.load(run)
    numel = tl.load(run + 1)
    row = unit * ROWS + tl.arange(0, ROWS)
    here = row[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = here < numel
    g = tl.load(pointer(run + 2, G, False) + here, mask=inside, other=0.0).to(tl.float32)
    v_ptr = floats(run + 4, 0)
    v = beta2 * tl.load(v_ptr + here, mask=inside, other=0.0) + (rest2 * g) * g
    if WRITE:
        clip = _clip_of(run + 8, 0)
        correction *= clip
        eps *= clip
        largest /= clip
    denominator = tl.sqrt(v) * correction + eps
    if WRITE:
        tl.store(v_ptr + here, v, mask=inside)
        m_ptr = None
        scale_ptr = None
        if M is not None:
            m_ptr = pointer(run + 5, M, False)
            scale_ptr = floats(run + 6, row)
        rest_ptr = None
        if REST is not None:
            rest_ptr = pointer(run + 10, REST, False)
        pairs = row[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
        in_pairs = pairs < (numel + 1) // 2
        _update(
            pointer(run + 3, W, False), rest_ptr, m_ptr, scale_ptr, here, inside, pairs, in_pairs,
            row * GROUP < numel, tl.load(run + 7) + here, g, denominator, largest, beta1, gain,
            of_mean, of_new, decay, rate, salt, weight_salt, OF_GRADIENTS, AT_RANDOM,
        )  # fmt: skip
    else:
        x = tl.where(g == 0.0, 0.0, g / denominator)
        tl.store(floats(run + 9, unit), tl.sum(x * x))


@triton.jit
def sum_kernel(
    sums_ptr: tl.tensor, owners_ptr: tl.tensor, KIND: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:  # fmt: skip
    """Add the sum of partial results, (count, numel) in ``KIND``, to ``COLS`` numbers, in order.

    They are added up in fp64. The numbers are in fp32 or fp64, and lie in parts of ``inner``, each
    ``outer`` behind the one before.
    """
    unit = tl.program_id(0).to(tl.int64)
    entry = sums_ptr + tl.load(owners_ptr + unit) * SUM
    unit -= tl.load(entry)
    count, numel = tl.load(entry + 1), tl.load(entry + 2)
    inner, outer = tl.load(entry + 3), tl.load(entry + 4)
    from_ptr = pointer(entry + 5, KIND, False)
    index = unit * COLS + tl.arange(0, COLS)
    inside = index < numel
    total = tl.zeros((ROWS, COLS), tl.float64)
    for first in range(0, count, ROWS):
        part = first + tl.arange(0, ROWS).to(tl.int64)
        total += tl.load(
            from_ptr + part[:, None] * numel + index[None, :],
            mask=(part < count)[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float64)
    place = index // inner * outer + index % inner
    found = tl.sum(total, axis=0)
    if tl.load(entry + 7) != 0:
        wide_ptr = pointer(entry + 6, tl.float64, False) + place
        tl.store(wide_ptr, tl.load(wide_ptr, mask=inside) + found, mask=inside)
    else:
        to_ptr = floats(entry + 6, place)
        tl.store(to_ptr, (tl.load(to_ptr, mask=inside) + found).to(tl.float32), mask=inside)
