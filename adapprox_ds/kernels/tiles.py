# SPDX-License-Identifier: Apache-2.0
"""The two passes in plain torch: row tiles that stay in cache, on any device.

Arithmetic is in the dtype of the factors, of the denominator where there are none.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from adapprox_ds.kernels.interface import FirstPass, Means, SecondPass, StepScalars
from adapprox_ds.kernels.means import keep_rows, load_rows

#: Elements of a tile. On a CPU large enough for torch's threads to share each operation and small
#: enough for their caches (2^19 was the best of 2^16 to 2^21 on 2 cores, and better than threads
#: that run whole tiles); elsewhere launches are the cost and a tile may take 16 MB.
_CPU_TILE, _DEVICE_TILE = 1 << 19, 1 << 22


def first_pass(
    g: list[Tensor],
    q: Tensor,
    u: Tensor,
    sketch: Tensor,
    floor: Tensor | None,
    s: StepScalars,
) -> FirstPass:
    """Reduce over V and X; writes nothing else.

    Args:
        g: B gradients, (m, n).
        q: (B, m, k) of the kept roots S = [Q U^T]_+.
        u: (B, n, k).
        sketch: (B, n, w).
        floor: (B, 2, max(m, n)) or None: S is at least floor[0, i] * floor[1, j].
        s: the step's numbers.
    """
    (rows, cols), blocks = g[0].shape, len(g)
    out = q.new_empty(blocks, rows, sketch.shape[2])
    row_sums = q.new_empty(blocks, rows)
    col_sums, squares = q.new_zeros(blocks, cols), q.new_zeros(blocks)
    for i in range(blocks):
        for a, b, gt, v in _moments(g[i], q[i], u[i], None if floor is None else floor[i], s):
            torch.sum(v, dim=1, out=row_sums[i, a:b])
            col_sums[i] += v.sum(dim=0)
            v.sqrt_()
            torch.mm(v, sketch[i], out=out[i, a:b])
            if s.clips:
                x = torch.div(gt, _denominator(v, s), out=v).view(-1)
                squares[i] += torch.dot(x, x)
    return FirstPass(out, row_sums, col_sums, squares)


def second_pass(
    w: list[Tensor],
    m: Means | None,
    g: list[Tensor],
    q: Tensor,
    u: Tensor,
    floor: Tensor | None,
    basis: Tensor,
    row_weights: Tensor,
    clip: Tensor,
    s: StepScalars,
) -> SecondPass:
    """Update the weights ``w`` and the first moments ``m`` in place and reduce.

    Args:
        w: B weights, (m, n).
        m: B first moments, (m, n), or None.
        g: B gradients, (m, n).
        q: (B, m, k) of the kept roots.
        u: (B, n, k).
        floor: as in :func:`first_pass`.
        basis: (B, m, width).
        row_weights: (B, m).
        clip: (B,), what updates are divided by; not read where ``s.clips`` is false.
        s: the step's numbers.
    """
    cols, blocks, width = g[0].shape[1], len(g), basis.shape[2]
    projection, col_sums = q.new_zeros(blocks, width, cols), q.new_zeros(blocks, cols)
    for i in range(blocks):
        for a, b, gt, v in _moments(g[i], q[i], u[i], None if floor is None else floor[i], s):
            col_sums[i].addmv_(v.T, row_weights[i, a:b])
            v.sqrt_()
            projection[i].addmm_(basis[i, a:b].T, v)
            mt = None if m is None else load_rows(m[i], a, b, q.dtype)
            apply_update(w[i][a:b], mt, gt, _denominator(v, s), clip[i] if s.clips else None, s)
            if m is not None and mt is not None:
                keep_rows(m[i], a, mt, s.salt)
    return SecondPass(projection, col_sums)


def agreement(
    m: Means,
    g: list[Tensor],
    q: Tensor,
    u: Tensor,
    floor: Tensor | None,
    s: StepScalars,
) -> Tensor:
    """Of X and [M / D], M being the first moment before the step, the sums of X Y, X^2 and Y^2.

    Args:
        m: B first moments, (m, n).
        g: B gradients, (m, n).
        q: (B, m, k) of the kept roots.
        u: (B, n, k).
        floor: as in :func:`first_pass`.
        s: the step's numbers.

    Returns:
        (B, 3).
    """
    sums = q.new_zeros(len(g), 3)
    for i in range(len(g)):
        for a, b, gt, v in _moments(g[i], q[i], u[i], None if floor is None else floor[i], s):
            denominator = _denominator(v.sqrt_(), s)
            mean = load_rows(m[i], a, b, q.dtype)
            sums[i] += torch.stack([x.sum() for x in agreement_terms(gt, mean, denominator, s)])
    return sums


def agreement_terms(
    g: Tensor, m: Tensor, denominator: Tensor, s: StepScalars
) -> tuple[Tensor, Tensor, Tensor]:
    """X Y, X^2 and Y^2 of :func:`agreement`, element by element."""
    x = (g / denominator).mul_(s.sign)
    y = (m / denominator).clamp_(-s.largest, s.largest)
    return x * y, x.square(), y.square()


def apply_update(
    w: Tensor,
    m: Tensor | None,
    g: Tensor,
    denominator: Tensor,
    clip: Tensor | None,
    s: StepScalars,
) -> None:
    """Update weights and first moment in place; weights of another dtype are rounded once.

    Args:
        w: weights.
        m: first moment, in the denominator's dtype, or None.
        g: gradient, of the same shape.
        denominator: D, of the same shape; may be overwritten.
        clip: 0-dim or of the same shape; None where nothing is clipped.
        s: the step's numbers.
    """
    dtype, rate = denominator.dtype, s.rate(m is not None)
    g = g.to(dtype)
    # The weights themselves, or a copy in the dtype of the computation.
    weight = w.to(dtype).mul_(1.0 - s.lr * s.weight_decay)
    if m is not None and s.of_gradients:
        m.mul_(s.beta1).add_(g, alpha=s.gain)
        ahead = torch.mul(m, s.beta1).add_(g, alpha=s.gain) if s.nesterov else m
        x = torch.div(ahead, denominator, out=denominator).clamp_(-s.largest, s.largest)
        weight.add_(x if clip is None else x.div_(clip), alpha=rate)
    else:
        if clip is not None:
            denominator.mul_(clip)
        if m is None:
            weight.addcdiv_(g, denominator, value=rate)
        else:
            of_mean, of_update = s.ahead
            m.mul_(s.beta1).addcdiv_(g, denominator, value=s.gain)
            weight.add_(m, alpha=rate * of_mean)
            if s.nesterov:
                weight.addcdiv_(g, denominator, value=rate * of_update)
    if weight is not w:
        w.copy_(weight)


def _denominator(root: Tensor, s: StepScalars) -> Tensor:
    """D of sqrt(V), in its place, in one operation."""
    return torch.add(root.new_full((), s.eps), root, alpha=s.correction, out=root)


def _moments(
    g: Tensor, q: Tensor, u: Tensor, floor: Tensor | None, s: StepScalars
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Row tiles of one block: (begin, end, G, V); V may be overwritten by the caller."""
    rows, cols = g.shape
    height = max(1, tile_elements(g.device) // cols)
    buffer = q.new_empty(min(height, rows), cols)
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


def tile_elements(device: torch.device) -> int:
    """Elements of a tile on a device."""
    return _CPU_TILE if device.type == "cpu" else _DEVICE_TILE
