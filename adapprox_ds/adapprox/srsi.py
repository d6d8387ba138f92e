# SPDX-License-Identifier: Apache-2.0
"""Streamlined randomized subspace iteration (Algorithm 1) and its error ratio (equation 11)."""

from __future__ import annotations

import torch
from torch import Tensor


def srsi(a: Tensor, rank: int, sketch: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Algorithm 1 (S-RSI), literally: cold start, ``iterations`` power iterations, Householder QR.

    Costs 4 m n (k + p) floating point operations an iteration.

    Args:
        a: target matrix A, (m, n).
        rank: k, the columns to keep.
        sketch: the Gaussian U, (n, k + p).
        iterations: l >= 1.

    Returns:
        Q (m, k) with orthonormal columns and U = A^T Q (n, k): A is close to Q U^T. They own their
        storage: a view, as contiguous() makes of one column, would keep all k + p alive.
    """
    u = sketch
    for _ in range(iterations):
        # Q does not depend on U's scale; A U grows or shrinks with A's square and leaves fp32.
        q, _ = torch.linalg.qr(a @ unit_scale(u))
        u = a.T @ q
    return owned(q[:, :rank]), owned(u[:, :rank])


def owned(columns: Tensor) -> Tensor:
    """A contiguous copy, whatever it is a view of."""
    return columns.clone(memory_format=torch.contiguous_format)


def unit_scale(a: Tensor) -> Tensor:
    """``a`` divided by its largest absolute value; zeros stay zeros."""
    return a / a.abs().amax().clamp(min=torch.finfo(a.dtype).tiny)


def error_ratio(a: Tensor, q: Tensor, u: Tensor) -> Tensor:
    """xi = ||A - Q U^T||_F / ||A||_F (equation 11), 0 for A = 0; a 0-dim tensor on A's device.

    The residual is formed, not derived from ||A||^2 - ||U||^2, which cancels in fp32 near the
    paper's threshold of 1e-3; norms accumulate in fp64, where squares of squares do not underflow.
    """
    return error_ratios(a, q, u)[-1]


def error_ratios(a: Tensor, q: Tensor, u: Tensor) -> Tensor:
    """xi of the first 1, 2, ... k columns, (k,), fp64; the last is :func:`error_ratio`.

    Args:
        a: A, (m, n).
        q: (m, k), orthonormal columns.
        u: A^T Q, (n, k); so what a column holds is the square of its norm, and is at right angles
            to the residual of all.
    """
    residual = torch.addmm(a, q, u.T, alpha=-1)
    norm = torch.linalg.vector_norm(a, dtype=torch.float64)
    error = torch.linalg.vector_norm(residual, dtype=torch.float64)
    held = torch.linalg.vector_norm(u, dim=0, dtype=torch.float64).square()
    beyond = held.flip(0).cumsum(0).flip(0) - held
    ratios = (error.square() + beyond).sqrt() / norm
    return torch.where(norm > 0, ratios, torch.zeros_like(ratios))
