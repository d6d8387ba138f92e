# SPDX-License-Identifier: Apache-2.0
"""The two passes in plain torch: row tiles that stay in cache, on any device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from adapprox_ds.kernels.interface import FirstPass, SecondPass, StepScalars

#: Elements of a tile. On a CPU large enough for torch's threads to share each operation and small
#: enough for their caches (2^19 was the best of 2^16 to 2^21 on 2 cores, and better than threads
#: that run whole tiles); elsewhere launches are the cost and a tile may take 16 MB.
_CPU_TILE, _DEVICE_TILE = 1 << 19, 1 << 22


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

    col_sums = torch.zeros(cols, dtype=q.dtype, device=g.device)
    square = torch.zeros((), dtype=q.dtype, device=g.device)
    for a, b, gt, v in _moments(g, q, u, floor, s):
        torch.sum(v, dim=1, out=row_sums[a:b])
        col_sums += v.sum(dim=0)
        v.sqrt_()
        torch.mm(v, sketch, out=out[a:b])
        x = torch.div(gt, torch.add(eps, v, alpha=s.correction, out=v), out=v).view(-1)
        square += torch.dot(x, x)
    return FirstPass(out, row_sums, col_sums, square)


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

    projection = torch.zeros(width, cols, dtype=q.dtype, device=g.device)
    col_sums = torch.zeros(cols, dtype=q.dtype, device=g.device)
    for a, b, gt, v in _moments(g, q, u, floor, s):
        col_sums.addmv_(v.T, row_weights[a:b])
        v.sqrt_()
        projection.addmm_(basis[a:b].T, v)
        apply_update(w[a:b], None if m is None else m[a:b], gt, v.mul_(scale).add_(shift), s)
    return SecondPass(projection, col_sums)


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
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Row tiles: (begin, end, G, V); V may be overwritten by the caller."""
    rows, cols = g.shape
    height = max(1, _tile(g) // cols)
    buffer = torch.empty(min(height, rows), cols, dtype=q.dtype, device=g.device)
    # (sqrt(beta_2) S)^2 = beta_2 S^2
    ut = (u.T * s.beta2**0.5).contiguous()
    if floor is not None:
        floor = floor * s.beta2**0.25
    for a in range(0, rows, height):
        b = min(a + height, rows)
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
