# SPDX-License-Identifier: Apache-2.0
"""Streamlined randomized subspace iteration (Algorithm 1) and its error ratio (equation 11)."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def gaussian_sketch(
    seed: int, name: str, first_row: int, step: int, size: tuple[int, int], like: Tensor
) -> Tensor:
    """The Gaussian matrix that S-RSI starts from, the same wherever and whenever it is asked for.

    The generator is seeded by what the block is and when, so the model's own random stream is
    untouched, a resumed run draws what the unbroken one drew, and the order of ranks is free.

    Args:
        seed: the optimizer's seed.
        name: the parameter's name.
        first_row: first row of the block in the parameter's 2-D view.
        step: the step count, 1 at the first step.
        size: (cols, k + p).
        like: tensor whose dtype and device the result takes.

    Returns:
        A tensor of the given size, iid standard normal, drawn in fp32 whatever the dtype.
    """
    key = f"{seed}\0{name}\0{first_row}\0{step}".encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    generator = torch.Generator(device=like.device)
    generator.manual_seed(int.from_bytes(digest, "little") >> 1)
    sketch = torch.randn(size, generator=generator, dtype=torch.float32, device=like.device)
    return sketch.to(like.dtype)


def sketch_width(rank: int, oversampling: int, rows: int, cols: int) -> int:
    """k + p, never more than the matrix has dimensions."""
    return min(rank + oversampling, rows, cols)


def srsi(a: Tensor, rank: int, sketch: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Algorithm 1 (S-RSI), literally: cold start, ``iterations`` power iterations, Householder QR.

    Costs 4 m n (k + p) floating point operations an iteration.

    Args:
        a: target matrix A, (m, n).
        rank: k, the columns to keep.
        sketch: the Gaussian U, (n, k + p).
        iterations: l >= 1.

    Returns:
        Q (m, k) with orthonormal columns and U = A^T Q (n, k): A is close to Q U^T.
    """
    u = sketch
    for _ in range(iterations):
        # Q does not depend on U's scale; A U grows or shrinks with A's square and leaves fp32.
        q, _ = torch.linalg.qr(a @ unit_scale(u))
        u = a.T @ q
    return q[:, :rank].contiguous(), u[:, :rank].contiguous()


def unit_scale(a: Tensor) -> Tensor:
    """``a`` divided by its largest absolute value; zeros stay zeros."""
    return a / a.abs().amax().clamp(min=torch.finfo(a.dtype).tiny)


def error_ratio(a: Tensor, q: Tensor, u: Tensor) -> Tensor:
    """xi = ||A - Q U^T||_F / ||A||_F (equation 11), 0 for A = 0; a 0-dim tensor on A's device.

    The residual is formed, not derived from ||A||^2 - ||U||^2, which cancels in fp32 near the
    paper's threshold of 1e-3; norms accumulate in fp64, where squares of squares do not underflow.
    """
    residual = torch.addmm(a, q, u.T, alpha=-1)
    norm = torch.linalg.vector_norm(a, dtype=torch.float64)
    error = torch.linalg.vector_norm(residual, dtype=torch.float64)
    return torch.where(norm > 0, error / norm, torch.zeros_like(norm))


def rayleigh_ritz(basis: Tensor, projection: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best ``rank`` of the subspace: what plain truncation of QR's columns throws away.

    For A close to basis basis^T A, the eigenvectors W of the Gram matrix of projection = basis^T A
    turn both so that columns come in the order of the energy of A that they hold.

    Args:
        basis: (m, w), orthonormal columns.
        projection: basis^T A, (w, n).
        rank: k <= w.

    Returns:
        Q (m, k), U (n, k), and ||Q U^T||_F^2 / ||projection||_F^2 as a 0-dim fp64 tensor.
    """
    unit = unit_scale(projection)
    energies, vectors = torch.linalg.eigh(unit @ unit.T)
    best = vectors[:, -rank:].flip(1)
    part = energies[-rank:].clamp(min=0).double().sum() / unit.double().square().sum()
    return basis @ best, projection.T @ best, part


def tracking_sketch(u: Tensor, fresh: Tensor, col_weights: Tensor) -> Tensor:
    """The warm start: the last right factor, then fresh Gaussian columns.

    With D = diag(col_weights) the balanced matrix A D has the row space D u; multiplying A itself
    by D (D u) is multiplying A D by D u.

    Args:
        u: (n, k') of the last factorisation, zero before the first.
        fresh: (n, k + p) standard normal.
        col_weights: (n,).

    Returns:
        (n, k + p): as many columns of the last factor as fit, the rest fresh. Columns that hold
        nothing (all, at first) are fresh too, decided without a look at the values on the host.
    """
    kept = u[:, : fresh.shape[1]] * col_weights[:, None]
    norms = torch.linalg.vector_norm(kept, dim=0)
    sketch = fresh.clone()
    start = fresh[:, : kept.shape[1]]
    sketch[:, : kept.shape[1]] = torch.where(norms > 0, kept / norms, start)
    return sketch * col_weights[:, None]
