# SPDX-License-Identifier: Apache-2.0
"""What runs on the device; launched by :mod:`adapprox_ds.kernels.triton_passes`.

All arithmetic is in fp32. Both kernels mask what lies outside of the matrix to 0, so that it adds
nothing to any sum; where the tiles fit exactly (``WHOLE_ROWS``, ``WHOLE_COLS``) the compiler drops
the masks.

Of the weights, first moments and gradients of a stack the kernels get each first tensor, and in
``places_ptr`` where the others lie. Whether those allow vectors of 16 bytes is not for the compiler
to conclude from the first: the host looks at all of them (``ALIGNED``).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _split(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """``x`` as a sum of two numbers of TF32's precision, the first rounded to nearest."""
    bits = x.to(tl.int32, bitcast=True)
    high = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def _product(a: tl.tensor, b: tl.tensor, total: tl.tensor, TF32: tl.constexpr) -> tl.tensor:
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
def _place(pointer: tl.tensor, place: tl.tensor, ALIGNED: tl.constexpr) -> tl.tensor:
    """The tensor that lies as many elements behind ``pointer`` as ``place`` says."""
    offset = tl.load(place)
    if ALIGNED:
        offset = tl.multiple_of(offset, 128 // pointer.dtype.element_ty.primitive_bitwidth)
    return pointer + offset


@triton.jit
def _factor(
    pointer: tl.tensor,
    index: tl.tensor,
    inside: tl.tensor,
    stride: tl.tensor,
    column: tl.tensor,
    columns: tl.tensor,
    column_stride: tl.tensor,
) -> tl.tensor:
    """Rows ``index`` of a matrix of few columns, (index, column); 0 outside of it."""
    return tl.load(
        pointer + index[:, None] * stride + column[None, :] * column_stride,
        mask=inside[:, None] & (column < columns)[None, :],
        other=0.0,
    )


@triton.jit
def _moment(
    left: tl.tensor,
    right: tl.tensor,
    left_floor: tl.tensor,
    right_floor: tl.tensor,
    g: tl.tensor,
    rest2: tl.tensor,
    TF32: tl.constexpr,
) -> tl.tensor:
    """V of one tile, of factors and floor that one side of has been scaled by sqrt(beta_2)."""
    root = _product(left, tl.trans(right), tl.zeros_like(g), TF32)
    least = left_floor[:, None] * right_floor[None, :]
    root = tl.maximum(root, least, propagate_nan=tl.PropagateNan.ALL)
    return root * root + (rest2 * g) * g


@triton.jit(do_not_specialize=["first_matrix", "first_block", "span"])
def first_kernel(
    g_ptr: tl.tensor,
    places_ptr: tl.tensor,
    q_ptr: tl.tensor,
    u_ptr: tl.tensor,
    sketch_ptr: tl.tensor,
    floor_ptr: tl.tensor,
    by_row_ptr: tl.tensor,
    by_col_ptr: tl.tensor,
    squares_ptr: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    w: tl.tensor,
    first_matrix: tl.tensor,
    first_block: tl.tensor,
    span: tl.tensor,
    by_col_step: tl.tensor,
    q_step: tl.tensor,
    q_row: tl.tensor,
    q_col: tl.tensor,
    u_step: tl.tensor,
    u_row: tl.tensor,
    u_col: tl.tensor,
    sketch_step: tl.tensor,
    sketch_row: tl.tensor,
    sketch_col: tl.tensor,
    floor_step: tl.tensor,
    floor_row: tl.tensor,
    floor_col: tl.tensor,
    root_beta2: tl.tensor,
    rest2: tl.tensor,
    correction: tl.tensor,
    eps: tl.tensor,
    ALIGNED: tl.constexpr,
    K: tl.constexpr,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    WHOLE_COLS: tl.constexpr,
    TF32: tl.constexpr,
) -> None:
    """One block of rows over ``span`` blocks of columns; program (block, group, matrix).

    Places are (B, 1), of the gradient. Writes by_row (B, groups, w + 1, m): sketch and row sums;
    by_col (matrices, blocks, n) of this launch: column sums; and squares (B, groups, row blocks),
    unless that is None and X need not be known.
    """
    # int64: a matrix may have more than 2^31 elements.
    block = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    by_col_ptr += tl.program_id(2).to(tl.int64) * by_col_step
    matrix = first_matrix + tl.program_id(2).to(tl.int64)
    g_ptr = _place(g_ptr, places_ptr + matrix, ALIGNED)
    q_ptr += matrix * q_step
    u_ptr += matrix * u_step
    sketch_ptr += matrix * sketch_step
    rank = tl.arange(0, K)
    wide = tl.arange(0, W)
    row = (first_block + block) * ROWS + tl.arange(0, ROWS)
    in_row = (row < m) | WHOLE_ROWS
    q = _factor(q_ptr, row, in_row, q_row, rank, k, q_col) * root_beta2
    row_floor = tl.zeros((ROWS,), tl.float32)
    col_floor = tl.zeros((COLS,), tl.float32)
    if floor_ptr is not None:
        floor_ptr += matrix * floor_step
        row_floor = tl.load(floor_ptr + row * floor_col, mask=in_row, other=0.0) * root_beta2
    sketched = tl.zeros((ROWS, W), tl.float32)
    # Whole tiles: adding them up inside of the loop would take shuffles between threads.
    row_sums = tl.zeros((ROWS, COLS), tl.float32)
    squares = tl.zeros((ROWS, COLS), tl.float32)
    for index in range(tl.minimum(span, tl.cdiv(n, COLS) - group * span)):
        col = (group * span + index) * COLS + tl.arange(0, COLS)
        in_col = (col < n) | WHOLE_COLS
        inside = in_row[:, None] & in_col[None, :]
        here = row[:, None] * n + col[None, :]
        g = tl.load(g_ptr + here, mask=inside, other=0.0).to(tl.float32)
        u = _factor(u_ptr, col, in_col, u_row, rank, k, u_col)
        sketch = _factor(sketch_ptr, col, in_col, sketch_row, wide, w, sketch_col)
        if floor_ptr is not None:
            col_floor = tl.load(floor_ptr + floor_row + col * floor_col, mask=in_col, other=0.0)
        v = _moment(q, u, row_floor, col_floor, g, rest2, TF32)
        row_sums += v
        tl.store(by_col_ptr + block * n + col, tl.sum(v, axis=0), mask=in_col)
        v = tl.sqrt(v)
        sketched = _product(v, sketch, sketched, TF32)
        if squares_ptr is not None:
            x = g / (v * correction + eps)
            if not (WHOLE_ROWS and WHOLE_COLS):
                # Outside of the matrix this is 0 / eps, and eps may be 0.
                x = tl.where(inside, x, 0.0)
            squares += x * x
    part = matrix * tl.num_programs(1) + group
    out = part * (w + 1)
    tl.store(
        by_row_ptr + (out + wide[None, :]) * m + row[:, None],
        sketched,
        mask=in_row[:, None] & (wide < w)[None, :],
    )
    tl.store(by_row_ptr + (out + w) * m + row, tl.sum(row_sums, axis=1), mask=in_row)
    if squares_ptr is not None:
        tl.store(squares_ptr + part * tl.cdiv(m, ROWS) + first_block + block, tl.sum(squares))


@triton.jit(do_not_specialize=["span"])
def second_kernel(
    w_ptr: tl.tensor,
    m_ptr: tl.tensor,
    g_ptr: tl.tensor,
    places_ptr: tl.tensor,
    q_ptr: tl.tensor,
    u_ptr: tl.tensor,
    floor_ptr: tl.tensor,
    basis_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    clip_ptr: tl.tensor,
    by_col_ptr: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    w: tl.tensor,
    span: tl.tensor,
    q_step: tl.tensor,
    q_row: tl.tensor,
    q_col: tl.tensor,
    u_step: tl.tensor,
    u_row: tl.tensor,
    u_col: tl.tensor,
    basis_step: tl.tensor,
    basis_row: tl.tensor,
    basis_col: tl.tensor,
    weights_step: tl.tensor,
    weights_row: tl.tensor,
    clip_step: tl.tensor,
    floor_step: tl.tensor,
    floor_row: tl.tensor,
    floor_col: tl.tensor,
    root_beta2: tl.tensor,
    rest2: tl.tensor,
    correction: tl.tensor,
    eps: tl.tensor,
    beta1: tl.tensor,
    gain: tl.tensor,
    of_mean: tl.tensor,
    of_new: tl.tensor,
    largest: tl.tensor,
    rate: tl.tensor,
    decay: tl.tensor,
    OF_GRADIENTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    K: tl.constexpr,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    WHOLE_COLS: tl.constexpr,
    TF32: tl.constexpr,
) -> None:
    """One block of columns over ``span`` blocks of rows; program (block, group, matrix).

    Places are (B, 3), of weights, first moment and gradient. Updates weights and first moment in
    place and writes by_col (B, groups, w + 1, n): projection and weighted column sums. Tiles are
    transposed, (COLS, ROWS): what is summed over, here rows, is then the inner dimension of the
    second product too, as in the other kernel. rate has the sign of the step and, where there is a
    first moment, its correction in it.
    """
    # int64: a matrix may have more than 2^31 elements.
    block = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    matrix = tl.program_id(2).to(tl.int64)
    w_ptr = _place(w_ptr, places_ptr + matrix * 3, ALIGNED)
    if m_ptr is not None:
        m_ptr = _place(m_ptr, places_ptr + matrix * 3 + 1, ALIGNED)
    g_ptr = _place(g_ptr, places_ptr + matrix * 3 + 2, ALIGNED)
    q_ptr += matrix * q_step
    u_ptr += matrix * u_step
    basis_ptr += matrix * basis_step
    weights_ptr += matrix * weights_step
    rank = tl.arange(0, K)
    wide = tl.arange(0, W)
    col = block * COLS + tl.arange(0, COLS)
    in_col = (col < n) | WHOLE_COLS
    u = _factor(u_ptr, col, in_col, u_row, rank, k, u_col) * root_beta2
    row_floor = tl.zeros((ROWS,), tl.float32)
    col_floor = tl.zeros((COLS,), tl.float32)
    if floor_ptr is not None:
        floor_ptr += matrix * floor_step
        col_floor = tl.load(floor_ptr + floor_row + col * floor_col, mask=in_col, other=0.0)
        col_floor *= root_beta2
    if clip_ptr is not None:
        # D * clip = sqrt(V) * correction + eps of these. The host never knows the clip.
        clip = tl.load(clip_ptr + matrix * clip_step).to(tl.float32)
        correction *= clip
        eps *= clip
        largest /= clip
    projected = tl.zeros((COLS, W), tl.float32)
    col_sums = tl.zeros((COLS, ROWS), tl.float32)
    for index in range(tl.minimum(span, tl.cdiv(m, ROWS) - group * span)):
        row = (group * span + index) * ROWS + tl.arange(0, ROWS)
        in_row = (row < m) | WHOLE_ROWS
        inside = in_col[:, None] & in_row[None, :]
        here = row[None, :] * n + col[:, None]
        g = tl.load(g_ptr + here, mask=inside, other=0.0).to(tl.float32)
        q = _factor(q_ptr, row, in_row, q_row, rank, k, q_col)
        basis = _factor(basis_ptr, row, in_row, basis_row, wide, w, basis_col)
        weights = tl.load(weights_ptr + row * weights_row, mask=in_row, other=0.0)
        if floor_ptr is not None:
            row_floor = tl.load(floor_ptr + row * floor_col, mask=in_row, other=0.0)
        v = _moment(u, q, col_floor, row_floor, g, rest2, TF32)
        col_sums += v * weights[None, :]
        v = tl.sqrt(v)
        projected = _product(v, basis, projected, TF32)
        # Outside of the matrix quotients may be 0 / 0; they are not stored.
        denominator = v * correction + eps
        step = g
        if m_ptr is None or not OF_GRADIENTS:
            step /= denominator
        if m_ptr is not None:
            moment = tl.load(m_ptr + here, mask=inside, other=0.0).to(tl.float32)
            moment = beta1 * moment + gain * step
            tl.store(m_ptr + here, moment.to(m_ptr.dtype.element_ty), mask=inside)
            step = of_mean * moment + of_new * step
            if OF_GRADIENTS:
                step /= denominator
                step = tl.clamp(step, -largest, largest, propagate_nan=tl.PropagateNan.ALL)
        weight = tl.load(w_ptr + here, mask=inside, other=0.0).to(tl.float32)
        weight = decay * weight + rate * step
        tl.store(w_ptr + here, weight.to(w_ptr.dtype.element_ty), mask=inside)
    out = (matrix * tl.num_programs(1) + group) * (w + 1)
    tl.store(
        by_col_ptr + (out + wide[None, :]) * n + col[:, None],
        projected,
        mask=in_col[:, None] & (wide < w)[None, :],
    )
    tl.store(by_col_ptr + (out + w) * n + col, tl.sum(col_sums, axis=1), mask=in_col)
