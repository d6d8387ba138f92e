# SPDX-License-Identifier: Apache-2.0
"""The two passes in plain torch: row tiles that stay in cache, on any device.

On the CPU rows are shared among threads that each run whole tiles: an operation on one tile is too
short to be split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

from adapprox_ds.kernels.interface import FirstPass, SecondPass, StepScalars

#: Elements of a tile. On a CPU two fp32 tiles fit a core's second-level cache; elsewhere launches
#: are the cost and the tiles of one call may take 32 MB.
_CPU_TILE, _DEVICE_TILE = 1 << 16, 1 << 22


def first_pass(
    g: Tensor, q: Tensor, u: Tensor, sketch: Tensor, floor: Tensor | None, s: StepScalars
) -> FirstPass:
    """Reduce over V and X; writes nothing else.

    Args:
        g: gradient, (m, n).
        q: (m, k) of the kept root S = [Q U^T]_+.
        u: (n, k).
        sketch: (n, w).
        floor: (2, max(m, n)) or None: S is at least floor[0, i] * floor[1, j].
        s: the step's numbers.
    """
    rows, cols = g.shape
    out = torch.empty(rows, sketch.shape[1], dtype=q.dtype, device=g.device)
    row_sums = torch.empty(rows, dtype=q.dtype, device=g.device)
    eps = torch.full((), s.eps, dtype=q.dtype, device=g.device)

    def part(first: int, last: int) -> tuple[Tensor, Tensor]:
        col_sums = torch.zeros(cols, dtype=q.dtype, device=g.device)
        square = torch.zeros((), dtype=q.dtype, device=g.device)
        for a, b, gt, v in _moments(g, q, u, floor, s, first, last):
            torch.sum(v, dim=1, out=row_sums[a:b])
            col_sums += v.sum(dim=0)
            v.sqrt_()
            torch.mm(v, sketch, out=out[a:b])
            x = torch.div(gt, torch.add(eps, v, alpha=s.correction, out=v), out=v).view(-1)
            square += torch.dot(x, x)
        return col_sums, square

    sums, squares = zip(*_shared(part, g), strict=True)
    return FirstPass(out, row_sums, sum(sums[1:], sums[0]), sum(squares[1:], squares[0]))


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
    """Update the weights ``w`` and the first moment ``m`` (both (m, n), in place) and reduce.

    Args:
        w: weights.
        m: first moment, or None.
        g: gradient, (m, n).
        q: (m, k) of the kept root.
        u: (n, k).
        floor: as in :func:`first_pass`.
        basis: (m, width).
        row_weights: (m,).
        clip: 0-dim, at least 1; the update is divided by it.
        s: the step's numbers.
    """
    cols, width = g.shape[1], basis.shape[1]
    # X / clip = G / (sqrt(V) * scale + shift): one multiply-add a tile, and no host sync.
    scale, shift = clip * s.correction, clip * s.eps

    def part(first: int, last: int) -> tuple[Tensor, Tensor]:
        projection = torch.zeros(width, cols, dtype=q.dtype, device=g.device)
        col_sums = torch.zeros(cols, dtype=q.dtype, device=g.device)
        for a, b, gt, v in _moments(g, q, u, floor, s, first, last):
            col_sums.addmv_(v.T, row_weights[a:b])
            v.sqrt_()
            projection.addmm_(basis[a:b].T, v)
            apply_update(w[a:b], None if m is None else m[a:b], gt, v.mul_(scale).add_(shift), s)
        return projection, col_sums

    projections, sums = zip(*_shared(part, g), strict=True)
    return SecondPass(sum(projections[1:], projections[0]), sum(sums[1:], sums[0]))


def apply_update(
    w: Tensor, m: Tensor | None, g: Tensor, denominator: Tensor, s: StepScalars
) -> None:
    """M <- beta_1 M + (1 - beta_1) G / denominator; W <- W - lr (M + decay W), in place.

    Computes in ``denominator``'s dtype and rounds once where w or m have another.
    """
    lr = -s.lr if not s.ascend else s.lr
    decay = 1.0 - s.lr * s.weight_decay
    if m is None:
        step = torch.div(g, denominator)
    elif m.dtype == denominator.dtype:
        step = m.mul_(s.beta1).addcdiv_(g, denominator, value=1.0 - s.beta1)
    else:
        step = m.to(g.dtype).mul_(s.beta1).addcdiv_(g, denominator, value=1.0 - s.beta1)
        m.copy_(step)
    if w.dtype == step.dtype:
        w.mul_(decay).add_(step, alpha=lr)
    else:
        w.copy_(w.to(step.dtype).mul_(decay).add_(step, alpha=lr))


def _moments(
    g: Tensor,
    q: Tensor,
    u: Tensor,
    floor: Tensor | None,
    s: StepScalars,
    first: int,
    last: int,
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Row tiles of [first, last): (begin, end, G, V); V may be overwritten by the caller."""
    cols = g.shape[1]
    height = max(1, _tile(g) // cols)
    buffer = torch.empty(min(height, last - first), cols, dtype=q.dtype, device=g.device)
    # (sqrt(beta_2) S)^2 = beta_2 S^2
    ut = (u.T * s.beta2**0.5).contiguous()
    if floor is not None:
        floor = floor * s.beta2**0.25
    for a in range(first, last, height):
        b = min(a + height, last)
        v, gt = buffer[: b - a], g[a:b].to(q.dtype)
        torch.mm(q[a:b], ut, out=v)
        if floor is None:
            v.relu_()
        else:
            torch.maximum(v, torch.outer(floor[0, a:b], floor[1, :cols]), out=v)
        v.square_().addcmul_(gt, gt, value=1.0 - s.beta2)
        yield a, b, gt, v


def _tile(g: Tensor) -> int:
    return _CPU_TILE if g.device.type == "cpu" else _DEVICE_TILE


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    # Each worker runs its operations by itself.
    return ThreadPoolExecutor(threads, "adapprox", initializer=torch.set_num_threads, initargs=(1,))


def _shared(
    part: Callable[[int, int], tuple[Tensor, Tensor]], g: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """``part(first, last)`` of row ranges that cover the block, on the CPU one a thread."""
    threads = torch.get_num_threads() if g.device.type == "cpu" else 1
    threads = min(threads, -(-g.numel() // _CPU_TILE))
    if threads == 1:
        return [part(0, g.shape[0])]
    cuts = [g.shape[0] * i // threads for i in range(threads + 1)]
    return list(_pool(threads).map(part, cuts[:-1], cuts[1:]))
