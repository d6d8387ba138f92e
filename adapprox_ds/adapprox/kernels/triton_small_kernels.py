# SPDX-License-Identifier: Apache-2.0
"""The small algebra of a step on the device; launched by :mod:`...kernels.triton_small`.

The formulas are those of adapprox/algebra.py, in fp64 where they are there. As in triton_kernels.py
a launch takes blocks of many shapes, programs read sizes and addresses from a table of int64, and
what several programs contribute to is written as partial results that are added up in order.

``SIZE`` is a power of two, at least the number of columns of the factors and of both sketches: each
small matrix is one tile of (SIZE, SIZE), zero outside of what it holds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adapprox_ds.adapprox.kernels.triton_kernels import floats, pointer, product, slice_of
from adapprox_ds.core.kernels.triton_weights import random_bits

#: Fields of a row of each kernel's table.
GRAM, WEIGHTS, SKETCH, ROWS_OF, COLS_OF, SOLVE, FACTOR = (
    tl.constexpr(x) for x in (7, 13, 14, 13, 10, 10, 12)
)
#: algebra.py's constants.
_LEAST_MEAN, _LEAST_ENERGY, _LIFT = tl.constexpr(1e-2), tl.constexpr(1e-4), tl.constexpr(1e-12)
_TINY, _TINIEST = tl.constexpr(2.0**-126), tl.constexpr(2.0**-1022)
#: sketch.py's: a Weyl sequence, and the multipliers of SplitMix64's finaliser.
_WEYL, _FIRST, _SECOND = (
    tl.constexpr(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
#: The distance of the 2^16 points of numbers whose deviation is 1.
_POINT = tl.constexpr(3.0**0.5 * 2.0**-15)


@triton.jit
def _entry(
    table_ptr: tl.tensor, owners_ptr: tl.tensor, FIELDS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """A program's row of the table, and its number among the row's programs."""
    unit = tl.program_id(0).to(tl.int64)
    entry = table_ptr + tl.load(owners_ptr + unit) * FIELDS
    return entry, unit - tl.load(entry)


@triton.jit
def _wide(
    field: tl.tensor, step: tl.tensor, row: tl.tensor, rows: tl.tensor, columns: tl.tensor,
    SIZE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The fp64 matrix, (rows, columns), ``step`` numbers behind the address that a field holds."""
    column = tl.arange(0, SIZE)
    return tl.load(
        pointer(field, tl.float64, False) + step + row[:, None] * columns + column[None, :],
        mask=(row < rows)[:, None] & (column < columns)[None, :],
        other=0.0,
    )


@triton.jit
def _keep(
    to: tl.tensor, values: tl.tensor, rows: tl.tensor, columns: tl.tensor, SIZE: tl.constexpr
) -> None:
    """Write the (rows, columns) that a tile holds."""
    i = tl.arange(0, SIZE)
    inside = (i < rows)[:, None] & (i < columns)[None, :]
    tl.store(to + i[:, None] * columns + i[None, :], values, mask=inside)


@triton.jit
def _dot(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """``a b`` in fp64."""
    return tl.dot(a, b, out_dtype=tl.float64)


@triton.jit
def _inverse_root(gram: tl.tensor, eye: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """algebra.py's: R^-1 of gram = R^T R; by elimination of gram beside the unit matrix."""
    left = gram
    right = eye
    i = tl.arange(0, SIZE)
    for j in range(SIZE):
        # What is left of gram is symmetric: its row j is the column by which rows below change.
        pivot = (i == j)[:, None]
        of_left = tl.sum(tl.where(pivot, left, 0.0), axis=0)
        of_right = tl.sum(tl.where(pivot, right, 0.0), axis=0)
        column = tl.sum(tl.where((i == j)[None, :], left, 0.0), axis=1)
        scale = 1.0 / tl.sqrt(tl.sum(tl.where(i == j, of_left, 0.0), axis=0))
        factor = tl.where(i > j, column * scale, 0.0)[:, None]
        left -= factor * (of_left * scale)[None, :]
        right = tl.where(pivot, right * scale, right - factor * (of_right * scale)[None, :])
    return tl.trans(right)


@triton.jit
def gram_kernel(
    table_ptr: tl.tensor, owners_ptr: tl.tensor, SIZE: tl.constexpr, ROWS: tl.constexpr,
    SPAN: tl.constexpr,
) -> None:  # fmt: skip
    """A^T A of ``SPAN`` times ``ROWS`` rows of a block's factor; a partial result."""
    entry, unit = _entry(table_ptr, owners_ptr, GRAM)
    blocks, rows, columns = tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    block, chunk = unit % blocks, unit // blocks
    a_ptr = floats(entry + 4, block * tl.load(entry + 5))
    total = tl.zeros((SIZE, SIZE), tl.float64)
    for i in range(SPAN):
        row = (chunk * SPAN + i) * ROWS + tl.arange(0, ROWS)
        a = slice_of(a_ptr, row, row < rows, 0, columns, SIZE).to(tl.float64)
        total += _dot(tl.trans(a), a)
    to = pointer(entry + 6, tl.float64, False) + unit * columns * columns
    _keep(to, total, columns, columns, SIZE)


@triton.jit
def weight_kernel(
    table_ptr: tl.tensor, owners_ptr: tl.tensor, floor: tl.tensor,
    SIZE: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
) -> None:  # fmt: skip
    """Squared weights and the floor of rows of a factor, U (``of_u``) or Q.

    Of U's rows also the squares of D_c U, summed up; of Q's what ``Sketches.row_scale`` is.
    """
    entry, unit = _entry(table_ptr, owners_ptr, WEIGHTS)
    blocks, rows, k = tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    of_u, count = tl.load(entry + 4) != 0, tl.load(entry + 5)
    block, chunk = unit % blocks, unit // blocks
    a_ptr = floats(entry + 6, block * rows * k)
    i = tl.arange(0, SIZE)
    gram_q = _wide(entry + 7, block * k * k, i, k, k, SIZE)
    gram_u = _wide(entry + 8, block * k * k, i, k, k, SIZE)
    square = tl.sum(tl.sum(tl.where(i[:, None] == i[None, :], gram_u, 0.0), axis=1), axis=0)
    square = tl.maximum(square, _TINY)
    scale = tl.maximum(tl.sqrt(square), _TINY).to(tl.float32)
    energy = tl.sum(tl.sum(gram_q * gram_u, axis=1), axis=0)
    total = tl.maximum((energy / square).to(tl.float32), _TINY)
    form = tl.where(of_u, gram_q, gram_u / square).to(tl.float32)
    # Without a floor there are none of its rows.
    floored = tl.where(tl.load(entry + 10) != 0, rows, 0)
    norms = tl.zeros((SIZE,), tl.float32)
    for step in range(SPAN):
        row = (chunk * SPAN + step) * ROWS + tl.arange(0, ROWS)
        inside = row < rows
        a = slice_of(a_ptr, row, inside, 0, k, SIZE)
        unit_a = a / tl.where(of_u, scale, 1.0)
        none = tl.zeros((ROWS, SIZE), tl.float32)
        energies = tl.sum(unit_a * product(unit_a, form, none, False), axis=1)
        energies = tl.maximum(energies, 0.0, propagate_nan=tl.PropagateNan.ALL)
        squares = tl.full((ROWS,), 1.0, tl.float32)
        mean = energies / total * count.to(tl.float32)
        mean = tl.maximum(mean, _LEAST_MEAN, propagate_nan=tl.PropagateNan.ALL)
        squares = tl.where(total > _TINY, 1.0 / mean, squares)
        tl.store(floats(entry + 9, block * rows) + row, squares, mask=inside)
        of_rows = tl.sqrt(energies / total * floor)
        lowest = tl.where(of_u, tl.sqrt(energies) * scale, of_rows)
        tl.store(floats(entry + 10, block * rows) + row, lowest, mask=row < floored)
        norms += tl.sum(a * a * squares[:, None], axis=0)
    tl.store(floats(entry + 11, unit * k) + i, norms, mask=i < tl.where(of_u, k, 0))
    mean_row = energy / count.to(tl.float64)
    of_row = tl.where(mean_row > _TINY, 1.0 / mean_row, 0.0)
    to = pointer(entry + 12, tl.float64, False) + block
    if chunk == 0 and tl.load(entry + 12) != 0:
        tl.store(to, of_row)


@triton.jit
def _fresh(key: tl.tensor, place: tl.tensor, column: tl.tensor) -> tl.tensor:
    """sketch.py's uniform numbers of deviation 1: a hash has four of 16 bits."""
    x = key.to(tl.uint64) + (place + 1).to(tl.uint64) * _WEYL
    x = (x ^ (x >> 30)) * _FIRST
    x = (x ^ (x >> 27)) * _SECOND
    x ^= x >> 31
    bits = (x >> (column % 4 * 16).to(tl.uint64)).to(tl.uint16).to(tl.int16, bitcast=True)
    return (bits.to(tl.float32) + 0.5) * _POINT


@triton.jit
def sketch_kernel(
    table_ptr: tl.tensor, owners_ptr: tl.tensor, keys_ptr: tl.tensor, SIZE: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """``ROWS`` rows of a sketch with its weights applied: D_c X (``of_u``) or D_r Z."""
    entry, unit = _entry(table_ptr, owners_ptr, SKETCH)
    blocks, rows, k = tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    of_u, count, width = tl.load(entry + 4) != 0, tl.load(entry + 5), tl.load(entry + 6)
    block, chunk = unit % blocks, unit // blocks
    column = tl.arange(0, SIZE)
    norms = tl.zeros((SIZE,), tl.float32)
    for i in range(tl.load(entry + 12)):
        part = floats(entry + 10, (i * blocks + block) * k)
        norms += tl.load(part + column, mask=column < k, other=0.0)
    row = chunk * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    a = slice_of(floats(entry + 7, block * rows * k), row, inside, 0, k, SIZE)
    square = tl.load(floats(entry + 8, block * rows) + row, mask=inside, other=0.0)[:, None]
    key = tl.load(keys_ptr + tl.load(entry + 9) + block)
    quads = tl.cdiv(width, 4)
    place = (tl.load(entry + 11) + row)[:, None] * quads + (column // 4)[None, :]
    fresh = _fresh(key, place, column[None, :]) / tl.sqrt(count.to(tl.float32)) * tl.sqrt(square)
    # Columns of D_r Q have about unit norm; the exact one would take a sum over processes.
    length = tl.where(of_u, tl.sqrt(norms), 1.0)
    warm = a * square / tl.where(norms > 0, length, 1.0)[None, :]
    held = (norms > 0) & (column < k)
    tl.store(
        floats(entry + 13, block * rows * width) + row[:, None] * width + column[None, :],
        tl.where(held[None, :], warm, fresh),
        mask=inside[:, None] & (column < width)[None, :],
    )


@triton.jit
def row_product_kernel(
    table_ptr: tl.tensor, owners_ptr: tl.tensor, SIZE: tl.constexpr,
    ROWS: tl.constexpr, SPAN: tl.constexpr,
) -> None:  # fmt: skip
    """G, H and ||T||_F^2 of ``SPAN`` times ``ROWS`` rows of a block; a partial result."""
    entry, unit = _entry(table_ptr, owners_ptr, ROWS_OF)
    blocks, rows, first = tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    width, tests = tl.load(entry + 4), tl.load(entry + 5)
    block, chunk = unit % blocks, unit // blocks
    y_ptr = floats(entry + 6, block * rows * width)
    z_ptr = floats(entry + 7, block * rows * tests)
    energies_ptr = pointer(entry + 8, tl.float64, False) + block * rows
    shares_ptr = pointer(entry + 9, tl.float64, False) + block * rows
    known = tl.load(pointer(entry + 10, tl.float64, False) + block) > 0
    squares_ptr = floats(entry + 11, block * rows)
    g = tl.zeros((SIZE, SIZE), tl.float64)
    h = tl.zeros((SIZE, SIZE), tl.float64)
    total = tl.zeros((ROWS,), tl.float64)
    for i in range(SPAN):
        row = (chunk * SPAN + i) * ROWS + tl.arange(0, ROWS)
        inside = row < rows
        squares = tl.load(squares_ptr + row, mask=inside, other=0.0).to(tl.float64)
        shares = tl.load(shares_ptr + row, mask=inside, other=1.0)
        squares = tl.where(known, 1.0 / _at_least(shares, _LEAST_MEAN), squares)
        total += squares * tl.load(energies_ptr + row, mask=inside, other=0.0)
        inside &= row >= first
        y = slice_of(y_ptr, row, inside, 0, width, SIZE).to(tl.float64)
        z = slice_of(z_ptr, row, inside, 0, tests, SIZE).to(tl.float64)
        g += _dot(tl.trans(y), y * squares[:, None])
        h += _dot(tl.trans(z), y)
    to = pointer(entry + 12, tl.float64, False) + unit * (width * (width + tests) + 1)
    _keep(to, g, width, width, SIZE)
    _keep(to + width * width, h, tests, width, SIZE)
    tl.store(to + width * (width + tests), tl.sum(total, axis=0))


@triton.jit
def column_product_kernel(
    table_ptr: tl.tensor, owners_ptr: tl.tensor, SIZE: tl.constexpr, COLS: tl.constexpr,
    SPAN: tl.constexpr,
) -> None:  # fmt: skip
    """S of ``SPAN`` times ``COLS`` columns of a block; a partial result."""
    entry, unit = _entry(table_ptr, owners_ptr, COLS_OF)
    blocks, cols, tests = tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    block, chunk = unit % blocks, unit // blocks
    p_ptr = floats(entry + 4, block * tl.load(entry + 5))
    stride = tl.load(entry + 6)
    squares_ptr = floats(entry + 7, block * tl.load(entry + 8))
    s = tl.zeros((SIZE, SIZE), tl.float64)
    test = tl.arange(0, SIZE)
    for i in range(SPAN):
        col = (chunk * SPAN + i) * COLS + tl.arange(0, COLS)
        inside = (test < tests)[:, None] & (col < cols)[None, :]
        p = tl.load(p_ptr + test[:, None] * stride + col[None, :], mask=inside, other=0.0)
        p = p.to(tl.float64)
        squares = tl.load(squares_ptr + col, mask=col < cols, other=0.0).to(tl.float64)
        s += _dot(p * squares[None, :], tl.trans(p))
    to = pointer(entry + 9, tl.float64, False) + unit * tests * tests
    _keep(to, s, tests, tests, SIZE)


@triton.jit
def solve_kernel(table_ptr: tl.tensor, owners_ptr: tl.tensor, SIZE: tl.constexpr) -> None:
    """algebra.py's ``solve`` of a block, and its ``estimated_ratios``."""
    entry, block = _entry(table_ptr, owners_ptr, SOLVE)
    width, tests, rank = tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    at = block * tl.load(entry + 5)
    i = tl.arange(0, SIZE)
    eye = tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(tl.float64)
    beyond_width = tl.where((i >= width)[:, None], eye, 0.0)
    beyond_rank = tl.where((i >= rank)[:, None], eye, 0.0)
    g = _wide(entry + 4, at, i, width, width, SIZE)
    h = _wide(entry + 4, at + width * width, i, tests, width, SIZE)
    s = _wide(entry + 6, block * tests * tests, i, tests, tests, SIZE)
    total = tl.load(pointer(entry + 4, tl.float64, False) + at + width * (width + tests))

    of_rows = _unit(tl.sum(g * eye, axis=1))[:, None]
    scaled = g * of_rows * _unit(tl.sum(g * eye, axis=0))[None, :] + _LIFT * eye
    basis = of_rows * _inverse_root(scaled, eye, SIZE)
    core = _dot(h, basis)
    square = _dot(tl.trans(core), core)
    lift = _at_least(_sum(square * eye) / width.to(tl.float64) * _LIFT, _TINIEST)
    root = _inverse_root(square + lift * eye + beyond_width, eye, SIZE)
    inverse = _dot(root, _dot(tl.trans(root), tl.trans(core)))
    projected = _dot(_dot(inverse, s), tl.trans(inverse))

    shifted = projected / _at_least(_sum(projected * eye), _TINIEST) + _LEAST_ENERGY * eye
    best = tl.where((i < rank)[None, :], shifted, 0.0)
    best = _dot(best, _inverse_root(_dot(tl.trans(best), best) + beyond_rank, eye, SIZE))
    energy = tl.sum(best * _dot(projected, best), axis=0)
    of_tests = _dot(tl.trans(inverse), best)

    missed = _at_least(_sum(s * eye) - _sum(square * projected), 0.0)
    spare = tl.maximum(tests - width, 1).to(tl.float64)
    noise = tl.sum(of_tests * of_tests, axis=0) * (missed / spare)
    own = _at_least(1.0 - noise / _at_least(energy, _TINIEST), 0.0)
    length = own * (1.5 - 0.5 * own)
    taken = energy * length * (2.0 * own - length)
    _keep(floats(entry + 7, block * width * rank), _dot(basis, best), width, rank, SIZE)
    of_p = of_tests * length[None, :]
    _keep(floats(entry + 8, block * tests * rank), of_p, tests, rank, SIZE)
    errors = pointer(entry + 9, tl.float64, False)
    tl.store(errors + block, _missed(tl.sum(taken, axis=0), total))


@triton.jit
def _sum(x: tl.tensor) -> tl.tensor:
    """Of a whole tile."""
    return tl.sum(tl.sum(x, axis=1), axis=0)


@triton.jit
def _at_least(x: tl.tensor, least: tl.constexpr) -> tl.tensor:
    """``x``, or ``least`` where it is less; NaN stays."""
    return tl.where(x < least, least, x)


@triton.jit
def _unit(square: tl.tensor) -> tl.tensor:
    """What makes a column of that squared norm a unit column; 0 of a column that is 0."""
    return tl.where(square > _TINIEST, 1.0 / tl.sqrt(_at_least(square, _TINIEST)), 0.0)


@triton.jit
def _missed(held: tl.tensor, total: tl.tensor) -> tl.tensor:
    """The error ratio of factors that hold that much of an energy."""
    known = total > 0
    missed = tl.sqrt(_at_least(1.0 - held / tl.where(known, total, 1.0), 0.0))
    return tl.where(known | (total != total), missed, 0.0)


@triton.jit(do_not_specialize=["salt"])
def factor_kernel(
    table_ptr: tl.tensor, owners_ptr: tl.tensor, places_ptr: tl.tensor, salt: tl.tensor,
    KIND: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, TF32: tl.constexpr,
) -> None:  # fmt: skip
    """``ROWS`` rows of a new factor, A times its combinations; to bf16 they are rounded at random.

    A is y, or the transpose of p.
    """
    entry, unit = _entry(table_ptr, owners_ptr, FACTOR)
    blocks, rows = tl.load(entry + 1), tl.load(entry + 2)
    inner, rank = tl.load(entry + 3), tl.load(entry + 4)
    block, chunk = unit % blocks, unit // blocks
    row = chunk * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, SIZE)
    a_ptr = floats(entry + 5, block * tl.load(entry + 6))
    at = row[:, None] * tl.load(entry + 7) + i[None, :] * tl.load(entry + 8)
    a = tl.load(a_ptr + at, mask=(row < rows)[:, None] & (i < inner)[None, :], other=0.0)
    b = slice_of(floats(entry + 9, block * inner * rank), i, i < inner, 0, rank, SIZE)
    new = product(a, b, tl.zeros((ROWS, SIZE), tl.float32), TF32)
    to = pointer(places_ptr + tl.load(entry + 10) + block, KIND, False)
    to += row[:, None] * rank + i[None, :]
    inside = (row < rows)[:, None] & (i < rank)[None, :]
    if KIND == tl.bfloat16:
        bits = new.to(tl.uint32, bitcast=True)
        index = (tl.load(entry + 11) + row)[:, None] * rank + i[None, :]
        special = (bits & 0x7F800000) == 0x7F800000
        bits = tl.where(special, bits, bits + random_bits(index, salt)) >> 16
        tl.store(to, bits.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        tl.store(to, new, mask=inside)
