# SPDX-License-Identifier: Apache-2.0
"""The two passes in Triton: V, its root and X live in registers and nowhere else.

A program of the first pass owns a block of one matrix's rows and walks over columns, so that the
sketch and the row sums stay in registers; one of the second owns a block of columns and walks over
rows, so that the projection does. Where the stack makes too few programs, several share a walk.
What programs share is summed from partial results, never by atomics: a step repeats bit by bit.
Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """How launches cut a stack of (m, n) matrices.

    Attributes:
        matrices: number of matrices that a launch takes, at most.
        owned: number of blocks that a launch takes of each, at most, on the side whose blocks
            programs own.
        blocks: number of blocks on that side.
        groups: number of programs that share a walk along the other side.
        span: blocks of the other side that each of them visits, at most.
        constants: compile-time arguments of the kernel, and how to compile it.
    """

    matrices: int
    owned: int
    blocks: int
    groups: int
    span: int
    constants: dict[str, int]

    @classmethod
    def of(cls, stack: int, m: int, n: int, k: int, w: int, *, rows_owned: bool) -> _Cut:
        """The cut for factors of rank ``k`` and a sketch or basis of ``w`` columns."""
        # tl.dot takes powers of two, at least 16.
        rank, width = (max(16, triton.next_power_of_2(size)) for size in (k, w))
        # Four warps feed a Hopper tensor core 64 deep: that is what a program owns. How far it
        # steps is bounded by registers (see README.md), and from below, where it steps along
        # rows, by whole cache lines.
        step = 32 if rows_owned and rank + width <= 32 else 16
        rows, cols = (64, step) if rows_owned else (step, 64)
        row_blocks, col_blocks = -(-m // rows), -(-n // cols)
        blocks, walked = (row_blocks, col_blocks) if rows_owned else (col_blocks, row_blocks)
        owned, matrices = blocks, stack
        if rows_owned:
            owned = min(blocks, max(1, _PARTIALS // n))
            matrices = min(stack, max(1, _PARTIALS // (owned * n)))
        span = -(-walked // -(-_PROGRAMS // (owned * matrices)))
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
        return cls(matrices, owned, blocks, -(-walked // span), span, constants)


def first_pass(
    g: list[Tensor],
    q: Tensor,
    u: Tensor,
    sketch: Tensor,
    floor: Tensor | None,
    s: StepScalars,
) -> FirstPass:
    """Reduce over V and X; as :func:`adapprox_ds.kernels.tiles.first_pass`.

    Args:
        g: B gradients, (m, n), contiguous, of one dtype: fp32, bf16 or fp16.
        q: (B, m, k), fp32, of any strides like all that follow.
        u: (B, n, k).
        sketch: (B, n, w).
        floor: (B, 2, max(m, n)) or None.
        s: the step's numbers.
    """
    stack, (rows, cols), k, w = len(g), g[0].shape, q.shape[2], sketch.shape[2]
    places, aligned = _places(g)
    cut = _Cut.of(stack, rows, cols, k, w, rows_owned=True)
    # The last row of each group's partial is its row sums.
    by_row = q.new_empty(stack, cut.groups, w + 1, rows)
    squares = q.new_empty(stack, cut.groups, cut.blocks) if s.clips else None
    by_col = q.new_empty(cut.matrices, cut.owned, cols)
    col_sums = q.new_zeros(stack, cols)
    with torch.cuda.device_of(g[0]):
        for matrix in range(0, stack, cut.matrices):
            matrices = min(cut.matrices, stack - matrix)
            for block in range(0, cut.blocks, cut.owned):
                blocks = min(cut.owned, cut.blocks - block)
                first_kernel[(blocks, cut.groups, matrices)](
                    g[0], places, q, u, sketch, floor, by_row, by_col, squares,
                    rows, cols, k, w, matrix, block, cut.span, by_col.stride(0),
                    *q.stride(), *u.stride(), *sketch.stride(), *_strides(floor), *_scalars(s),
                    ALIGNED=aligned, **cut.constants,
                )  # fmt: skip
                col_sums[matrix : matrix + matrices] += by_col[:matrices, :blocks].sum(dim=1)
    sums = _total(by_row)
    square = q.new_zeros(stack) if squares is None else squares.sum(dim=(1, 2))
    return FirstPass(sums[:, :w].mT, sums[:, w], col_sums, square)


def second_pass(
    w: list[Tensor],
    m: list[Tensor] | None,
    g: list[Tensor],
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
        w: B weights, (m, n), contiguous, of one dtype: fp32, bf16 or fp16; so the next two.
        m: B first moments, or None.
        g: B gradients.
        q: (B, m, k), fp32, of any strides like all that follow.
        u: (B, n, k).
        floor: as in :func:`first_pass`.
        basis: (B, m, width).
        row_weights: (B, m).
        clip: (B,), at least 1; not read where nothing is clipped.
        s: the step's numbers.
    """
    stack, (rows, cols), k, width = len(g), g[0].shape, q.shape[2], basis.shape[2]
    places, aligned = _places(w, m, g)
    cut = _Cut.of(stack, rows, cols, k, width, rows_owned=False)
    # The last row of each group's partial is its weighted column sums.
    by_col = q.new_empty(stack, cut.groups, width + 1, cols)
    with torch.cuda.device_of(g[0]):
        second_kernel[(cut.owned, cut.groups, stack)](
            w[0], _first(m), g[0], places, q, u, floor, basis, row_weights,
            clip if s.clips else None, by_col, rows, cols, k, width, cut.span,
            *q.stride(), *u.stride(), *basis.stride(), *row_weights.stride(), *clip.stride(),
            *_strides(floor), *_scalars(s),
            float(s.beta1), float(s.gain), *map(float, s.ahead), float(s.largest),
            float(s.rate(m is not None)), float(1.0 - s.lr * s.weight_decay),
            OF_GRADIENTS=s.of_gradients, ALIGNED=aligned, **cut.constants,
        )  # fmt: skip
    sums = _total(by_col)
    return SecondPass(sums[:, :width], sums[:, width])


def _places(first: list[Tensor], *others: list[Tensor] | None) -> tuple[Tensor, bool]:
    """Where the tensors of lists lie, and whether all of them at multiples of 16 bytes.

    Returns:
        Distance of each from its list's first, in elements, (B, lists) int64 on their device.

    Raises:
        ValueError: one is not contiguous: kernels address them by their shape alone.
    """
    rows: list[Sequence[int]] = []
    aligned = True
    for tensors in (first, *others):
        if tensors is None:
            rows.append([0] * len(first))
            continue
        if not all(tensor.is_contiguous() for tensor in tensors):
            raise ValueError("weights, first moments and gradients must be contiguous")
        at = [tensor.data_ptr() for tensor in tensors]
        aligned = aligned and all(address % 16 == 0 for address in at)
        rows.append([(address - at[0]) // tensors[0].element_size() for address in at])
    device = first[0].device
    # From pinned memory, so that the host does not wait for the device to come to this copy.
    pinned = device.type == "cuda"
    columns = list(zip(*rows, strict=True))
    places = torch.tensor(columns, dtype=torch.int64, device="cpu", pin_memory=pinned)
    return places.to(device, non_blocking=True), aligned


def _first(tensors: list[Tensor] | None) -> Tensor | None:
    return None if tensors is None else tensors[0]


def _total(partial: Tensor) -> Tensor:
    """The sum over the second dimension; where that is 1, a view."""
    return partial[:, 0] if partial.shape[1] == 1 else partial.sum(dim=1)


def _strides(floor: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if floor is None else floor.stride()


def _scalars(s: StepScalars) -> tuple[float, float, float, float]:
    # Floats: an integer would be compiled into the kernel.
    return float(s.beta2**0.5), float(1.0 - s.beta2), float(s.correction), float(s.eps)
