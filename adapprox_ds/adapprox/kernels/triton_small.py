# SPDX-License-Identifier: Apache-2.0
"""The small algebra of a step in Triton: a few launches for all stacks, however many blocks.

The functions are those of adapprox/small.py for stacks whose factors and sketches have at most
:data:`LIMIT` columns. What programs share is summed from partial results, in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from adapprox_ds.adapprox.kernels import triton_small_kernels as kernels
from adapprox_ds.adapprox.kernels.interface import Found, Past, Sketches, Solved
from adapprox_ds.adapprox.kernels.triton_tables import Table, add_up, send, up, zeros_of

#: The most columns that fit the kernels' tiles.
LIMIT = 32
#: Rows, or columns of ``p``, of a tile, and tiles of a program whose sums are kept.
_ROWS, _SPAN = 32, 8
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


def size_of(*columns: int) -> int:
    """The side of the tiles that hold small matrices of so many columns."""
    return 16 if max(columns) <= 16 else LIMIT


def grams(factors: Sequence[Tensor], first: Sequence[int], size: int) -> list[Tensor]:
    """A^T A of each stack's (B, r, k) from the first row that counts on: (B, k, k), fp64."""
    table, sums = Table(), Table()
    like, shapes = factors[0], [(len(a), a.shape[2], a.shape[2]) for a in factors]
    totals = zeros_of(like, torch.float64, shapes)
    chunks = [up(a.shape[1] - skip, _ROWS * _SPAN) for a, skip in zip(factors, first, strict=True)]
    parts = _parts(like, [c * x.numel() for c, x in zip(chunks, totals, strict=True)])
    for a, skip, count, part, total in zip(factors, first, chunks, parts, totals, strict=True):
        blocks, rows, k = a.shape
        at = a.data_ptr() + 4 * skip * k
        table.add(count * blocks, blocks, rows - skip, k, at, rows * k, part.data_ptr())
        sums.add_sum(part.data_ptr(), total, count, total.numel())
    sent = send(like.device, *table.tensors, *sums.tensors)
    with torch.cuda.device_of(like):
        if table.programs:
            kernels.gram_kernel[(table.programs,)](*sent[:2], SIZE=size, ROWS=_ROWS, SPAN=_SPAN)
        add_up(sums, sent[2:4], tl.float64)
    return totals


def sketches(stacks: Sequence[Past], size: int) -> list[Sketches]:
    """Weights, floor and sketches of stacks; ``floor`` is that of all."""
    qs, us = ([of.contiguous() for of in x] for x in ([p.q for p in stacks], [p.u for p in stacks]))
    of_u = grams(us, [0] * len(us), size)
    like, made, held = qs[0], [], []
    keys: list[int] = []
    weights, columns = Table(), Table()
    for past, q, u, gram_u in zip(stacks, qs, us, of_u, strict=True):
        (blocks, rows, k), cols = q.shape, u.shape[1]
        new, floor = q.new_empty, past.floor > 0
        x = Sketches(
            x=new(blocks, cols, past.width),
            z=new(blocks, rows, past.tests),
            row_squares=new(blocks, rows),
            col_squares=new(blocks, cols),
            row_scale=new(blocks, 1, dtype=torch.float64),
            floor_rows=new(blocks, rows) if floor else None,
            floor_cols=new(blocks, cols) if floor else None,
        )
        made.append(x)
        count = up(cols, _ROWS * _SPAN)
        norms, gram_q = new(count, blocks, k), past.gram_q.contiguous()
        held += [norms, gram_q, gram_u]
        grams_at = gram_q.data_ptr(), gram_u.data_ptr()
        # The sums of squares are made of U, and read for both.
        for side, a, local, of_all, squares, *more in (
            (1, u, cols, cols, x.col_squares, x.floor_cols, norms, None),
            (0, q, rows, past.rows, x.row_squares, x.floor_rows, None, x.row_scale),
        ):
            weights.add(
                up(local, _ROWS * _SPAN) * blocks,
                *(blocks, local, k, side, of_all, a.data_ptr(), *grams_at, squares.data_ptr()),
                *(0 if of is None else of.data_ptr() for of in more),
            )
        for side, a, local, of_all, squares, to, first in (
            (1, u, cols, cols, x.col_squares, x.x, 0),
            (0, q, rows, past.rows, x.row_squares, x.z, past.first),
        ):
            columns.add(
                up(local, _ROWS) * blocks,
                *(blocks, local, k, side, of_all, to.shape[2], a.data_ptr(), squares.data_ptr()),
                *(len(keys), norms.data_ptr(), first, count, to.data_ptr()),
            )
            keys += past.keys[0] if side else past.keys[1]
    sent = send(like.device, *weights.tensors, *columns.tensors, more=keys)
    with torch.cuda.device_of(like):
        kernels.weight_kernel[(weights.programs,)](
            *sent[:2], float(stacks[0].floor),
            SIZE=size, ROWS=_ROWS, SPAN=_SPAN,
        )  # fmt: skip
        kernels.sketch_kernel[(columns.programs,)](*sent[2:5], SIZE=size, ROWS=_ROWS)
    del held  # what addresses in tables point to
    return made


def products(stacks: Sequence[Found], size: int) -> list[tuple[Tensor, Tensor]]:
    """G, H and ||T||_F^2 end to end, and S, of stacks; see algebra.py."""
    like, held = stacks[0].y, []
    shapes, of_stacks = [], []
    for x in stacks:
        (blocks, rows, width), (_, tests, cols) = x.y.shape, x.p.shape
        shapes += [(blocks, width * (width + tests) + 1), (blocks, tests, tests)]
        of_stacks.append((blocks, rows, width, tests, cols))
    totals = zeros_of(like, torch.float64, shapes)
    spans = [(up(x[1], _ROWS * _SPAN), up(x[4], _ROWS * _SPAN)) for x in of_stacks]
    counts = [count for of in spans for count in of]
    parts = _parts(like, [n * x.numel() for n, x in zip(counts, totals, strict=True)])
    of_rows, of_cols, sums = Table(), Table(), Table()
    for i, (x, (blocks, rows, width, tests, cols)) in enumerate(
        zip(stacks, of_stacks, strict=True)
    ):
        given = [
            of.contiguous() for of in (x.y, x.z, x.energies, x.shares, x.row_scale, x.row_squares)
        ]
        p = x.p if x.p.stride(2) == 1 else x.p.contiguous()
        squares = x.col_squares if x.col_squares.stride(1) == 1 else x.col_squares.contiguous()
        held += [*given, p, squares]
        of_rows.add(
            spans[i][0] * blocks,
            *(blocks, rows, x.first, width, tests),
            *(of.data_ptr() for of in (*given, parts[2 * i])),
        )
        of_cols.add(
            spans[i][1] * blocks,
            *(blocks, cols, tests, p.data_ptr(), *p.stride()[:2]),
            *(squares.data_ptr(), squares.stride(0), parts[2 * i + 1].data_ptr()),
        )
    for count, part, total in zip(counts, parts, totals, strict=True):
        sums.add_sum(part.data_ptr(), total, count, total.numel())
    sent = send(like.device, *of_rows.tensors, *of_cols.tensors, *sums.tensors)
    constants = {"SIZE": size, "SPAN": _SPAN, "num_warps": size // 4}
    with torch.cuda.device_of(like):
        if of_rows.programs:
            kernels.row_product_kernel[(of_rows.programs,)](*sent[:2], ROWS=_ROWS, **constants)
        if of_cols.programs:
            kernels.column_product_kernel[(of_cols.programs,)](*sent[2:4], COLS=_ROWS, **constants)
        add_up(sums, sent[4:6], tl.float64)
    return list(zip(totals[::2], totals[1::2], strict=True))


def refactor(stacks: Sequence[Solved], size: int) -> list[Tensor]:
    """Write the new factors of stacks; give each one's error ratios, (B, 1), fp64."""
    like, held, errors = stacks[0].y, [], []
    solved, made = Table(), Table()
    places: list[int] = []
    for x in stacks:
        (blocks, rows, width), (_, tests, cols) = x.y.shape, x.p.shape
        new, k = x.y.new_empty, x.rank
        sums = x.sums if x.sums.stride(1) == 1 else x.sums.contiguous()
        s, y = x.s.contiguous(), x.y.contiguous()
        of_y, of_p = new(blocks, width, k), new(blocks, tests, k)
        errors.append(new(blocks, 1, dtype=torch.float64))
        held += [sums, s, y, of_y, of_p]
        solved.add(
            blocks,
            *(width, tests, k, sums.data_ptr(), sums.stride(0), s.data_ptr()),
            *(of.data_ptr() for of in (of_y, of_p, errors[-1])),
        )
        for a, strides, count, inner, of, to, first in (
            (y, y.stride(), rows, width, of_y, x.q, x.first[0]),
            (
                x.p,
                (x.p.stride(0), x.p.stride(2), x.p.stride(1)),
                cols,
                tests,
                of_p,
                x.u,
                x.first[1],
            ),
        ):
            made.add(
                up(count, _ROWS) * blocks,
                *(blocks, count, inner, k, a.data_ptr(), *strides),
                *(of.data_ptr(), len(places), first),
            )
            places += [t.data_ptr() for t in to]
    sent = send(like.device, *solved.tensors, *made.tensors, more=places)
    kind = _TYPES[stacks[0].q[0].dtype]
    # 32 bits with a sign, for any salt to be of one type.
    salt = (stacks[0].salt ^ 1 << 31) - (1 << 31)
    with torch.cuda.device_of(like):
        kernels.solve_kernel[(solved.programs,)](*sent[:2], SIZE=size, num_warps=size // 4)
        kernels.factor_kernel[(made.programs,)](
            *sent[2:5], salt, KIND=kind, SIZE=size, ROWS=_ROWS, TF32=torch.version.hip is None
        )
    del held  # what addresses in tables point to
    return errors


def _parts(like: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Room for partial results, in fp64."""
    return list(like.new_empty(sum(sizes), dtype=torch.float64).split(list(sizes)))
