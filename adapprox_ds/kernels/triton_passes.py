# SPDX-License-Identifier: Apache-2.0
"""The two passes in Triton: V, its root and X live in registers and nowhere else.

A program of the first pass owns a block of rows and walks over columns, so that the sketch and the
row sums stay in registers; one of the second owns a block of columns and walks over rows, so that
the projection does. Where that alone makes too few programs, several share the walk. What programs
share is summed from partial results, never by atomics: a step repeats bit by bit. Nothing here
waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from adapprox_ds.kernels.interface import FirstPass, SecondPass, StepScalars
from adapprox_ds.kernels.triton_kernels import first_kernel, second_kernel

#: Programs that fill a large GPU. A constant, so that results do not depend on the device's size.
_PROGRAMS = 512
#: Elements of the first pass's partial column sums; more row blocks than fit take more launches.
_PARTIALS = 1 << 22


@dataclass(frozen=True, slots=True)
class _Cut:
    """How a launch cuts an (m, n) matrix.

    Attributes:
        owned: number of blocks on the side whose blocks programs own.
        groups: number of programs that share a walk along the other side.
        span: blocks of the other side that each of them visits, at most.
        constants: compile-time arguments of the kernel, and how to compile it.
    """

    owned: int
    groups: int
    span: int
    constants: dict[str, int]

    @classmethod
    def of(cls, m: int, n: int, k: int, w: int, *, rows_owned: bool) -> _Cut:
        """The cut for factors of rank ``k`` and a sketch or basis of ``w`` columns."""
        # tl.dot takes powers of two, at least 16.
        rank, width = (max(16, triton.next_power_of_2(size)) for size in (k, w))
        # Four warps feed a Hopper tensor core 64 deep: that is what a program owns. How far it
        # steps is bounded by registers (see README.md), and from below, where it steps along
        # rows, by whole cache lines.
        step = 32 if rows_owned and rank + width <= 32 else 16
        rows, cols = (64, step) if rows_owned else (step, 64)
        row_blocks, col_blocks = -(-m // rows), -(-n // cols)
        owned, walked = (row_blocks, col_blocks) if rows_owned else (col_blocks, row_blocks)
        span = -(-walked // -(-_PROGRAMS // owned))
        constants = {
            "K": rank,
            "W": width,
            "ROWS": rows,
            "COLS": cols,
            "WHOLE_ROWS": m % rows == 0,
            "WHOLE_COLS": n % cols == 0,
            # AMD's matrix cores take fp32 as it is.
            "TF32": torch.version.hip is None,
            "num_warps": 4,
            # Of tiles loaded ahead: as many as fit the shared memory of small GPUs too (99 KB).
            "num_stages": 3 if rank + width <= 96 else 2 if rank + width <= 192 else 1,
        }
        return cls(owned, -(-walked // span), span, constants)


def first_pass(
    g: Tensor, q: Tensor, u: Tensor, sketch: Tensor, floor: Tensor | None, s: StepScalars
) -> FirstPass:
    """Reduce over V and X; as :func:`adapprox_ds.kernels.tiles.first_pass`.

    Args:
        g: gradient, (m, n), contiguous, fp32, bf16 or fp16.
        q: (m, k), fp32, of any strides like all that follow.
        u: (n, k).
        sketch: (n, w).
        floor: (2, max(m, n)) or None.
        s: the step's numbers.
    """
    (m, n), k, w = g.shape, q.shape[1], sketch.shape[1]
    _check(g)
    cut = _Cut.of(m, n, k, w, rows_owned=True)
    # The last row of each group's partial is its row sums.
    by_row = q.new_empty(cut.groups, w + 1, m)
    squares = q.new_empty(cut.groups, cut.owned)
    height = min(cut.owned, max(1, _PARTIALS // n))
    by_col = q.new_empty(height, n)
    col_sums: Tensor | None = None
    with torch.cuda.device_of(g):
        for first in range(0, cut.owned, height):
            here = min(height, cut.owned - first)
            first_kernel[(here, cut.groups)](
                g, q, u, sketch, floor, by_row, by_col, squares,
                m, n, k, w, first, cut.owned, cut.span,
                *q.stride(), *u.stride(), *sketch.stride(), *_strides(floor), *_scalars(s),
                **cut.constants,
            )  # fmt: skip
            part = by_col[:here].sum(dim=0)
            col_sums = part if col_sums is None else col_sums.add_(part)
    assert col_sums is not None
    sums = _total(by_row)
    return FirstPass(sums[:w].T, sums[w], col_sums, squares.sum())


def second_pass(
    w: Tensor,
    m: Tensor | None,
    g: Tensor,
    q: Tensor,
    u: Tensor,
    floor: Tensor | None,
    basis: Tensor,
    row_weights: Tensor,
    clip: Tensor,
    s: StepScalars,
) -> SecondPass:
    """Update ``w`` and ``m`` and reduce; as :func:`adapprox_ds.kernels.tiles.second_pass`.

    Args:
        w: weights, (m, n), contiguous, fp32, bf16 or fp16 like the next two.
        m: first moment, or None.
        g: gradient.
        q: (m, k), fp32, of any strides like the next three.
        u: (n, k).
        floor: as in :func:`first_pass`.
        basis: (m, width).
        row_weights: (m,), fp32, contiguous.
        clip: 0-dim, at least 1; the update is divided by it.
        s: the step's numbers.
    """
    (rows, cols), k, width = g.shape, q.shape[1], basis.shape[1]
    _check(w, g, row_weights, *([] if m is None else [m]))
    cut = _Cut.of(rows, cols, k, width, rows_owned=False)
    # The last row of each group's partial is its weighted column sums.
    by_col = q.new_empty(cut.groups, width + 1, cols)
    with torch.cuda.device_of(g):
        second_kernel[(cut.owned, cut.groups)](
            w, m, g, q, u, floor, basis, row_weights, clip, by_col,
            rows, cols, k, width, cut.span,
            *q.stride(), *u.stride(), *basis.stride(), *_strides(floor), *_scalars(s),
            float(s.beta1), float(1.0 - s.beta1),
            float(s.lr if s.ascend else -s.lr), float(1.0 - s.lr * s.weight_decay),
            **cut.constants,
        )  # fmt: skip
    sums = _total(by_col)
    return SecondPass(sums[:width], sums[width])


def _total(partial: Tensor) -> Tensor:
    """The sum over the first dimension; where that is 1, a view."""
    return partial[0] if partial.shape[0] == 1 else partial.sum(dim=0)


def _check(*tensors: Tensor) -> None:
    """The kernels address these by their shapes alone."""
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("weights, first moment, gradient and row weights must be contiguous")


def _strides(floor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if floor is None else (floor.stride(0), floor.stride(1))


def _scalars(s: StepScalars) -> tuple[float, float, float, float]:
    # Floats: an integer would be compiled into the kernel.
    return float(s.beta2**0.5), float(1.0 - s.beta2), float(s.correction), float(s.eps)
