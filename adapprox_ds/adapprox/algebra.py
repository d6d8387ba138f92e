# SPDX-License-Identifier: Apache-2.0
"""The small matrices of a step: pure functions of stacks of them, none of which waits for a device.

The notation is that of docs/how-it-works.md. R is the root of the second moment, (m, n); D_r and
D_c are diagonal weights of its rows and columns; T = D_r R D_c is the balanced root. One pass over
R's elements gives

    y = R D_c X     so Y = T X = D_r y              (1)
    p = Z^T D_r R   so Z^T T = p D_c                (2)

for a sketch X and a test sketch Z. With B an orthonormal basis of Y, T is close to B P, where P is
the least-squares solution of (Z^T B) P = Z^T T (the generalised Nystrom method). The new factors
are the k directions of B P that hold the most energy, which is the sum of squares. The work that
grows with m n was done in the pass. The functions here work on matrices of m or n rows and few
columns, and on the Gram matrices

    G = Y^T Y = y^T D_r^2 y     H = Z^T Y = (D_r Z)^T y     S = Z^T T T^T Z = p D_c^2 p^T    (3)

in fp64, since a Gram matrix squares the condition number of columns that are in fp32.
Decompositions that report a failure to the host would wait for the device, so only products and
Cholesky factors are used.

B counts the matrices of a stack in the shapes below, and N those of several stacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from adapprox_ds.adapprox.kernels.interface import Found, Past, Sketches, Solved
from adapprox_ds.adapprox.sketch import uniform_sketches
from adapprox_ds.core.rounding import round_factor

#: The weight of a row or column is computed as if its mean square were at least this fraction of
#: the matrix's. Weights come from the last factors: without the bound a row whose gradients begin
#: in this step would outweigh all others.
_LEAST_MEAN = 1e-2
#: This is added to the diagonal of a Gram matrix of unit columns, so that it has a Cholesky factor
#: even where columns depend on each other. The columns are computed in fp32, so a direction in
#: which they are shorter than the root of this is made of rounding errors.
_LIFT = 1e-12
#: Eigenvalues below this fraction of the trace count as equal.
_LEAST_ENERGY = 1e-4
_TINY = torch.finfo(torch.float64).tiny


class Balance(NamedTuple):
    """Row and column sums of the squares of Q U^T, from which weights and floor are made.

    Attributes:
        row_sums: the sums over each row of (Q U^T / scale)^2, (B, m).
        col_sums: the sums over each column of (Q U^T / scale)^2, (B, n).
        total: the sum over all elements, (B, 1).
        scale: what Q U^T is divided by, (B, 1). Second moments are small where gradients are, and
            their squares would leave fp32.
    """

    row_sums: Tensor
    col_sums: Tensor
    total: Tensor
    scale: Tensor

    def squared_weights(self, rows: int) -> tuple[Tensor, Tensor]:
        """Compute D_r^2, (B, m), and D_c^2, (B, n).

        A weight is the root mean square of all elements, divided by that of the row or column.

        Args:
            rows: the number of rows of the whole matrix, of which some may lie on other processes.
        """
        # Where the factors are zero all weights are 1: the largest weight there would make the new
        # factors so small that they would be too short as the next step's test columns.
        known = self.total > torch.finfo(self.total.dtype).tiny

        def squares(sums: Tensor, count: int) -> Tensor:
            return squared_weights(torch.where(known, sums / self.total * count, 1.0))

        return squares(self.row_sums, rows), squares(self.col_sums, self.col_sums.shape[1])

    def floor(self, part: float) -> tuple[Tensor, Tensor]:
        """Compute the floor under Q U^T as two vectors, (B, m) and (B, n), of its outer product.

        The outer product is sqrt(part r c^T / mean), where r and c are the row and column means of
        (Q U^T)^2.
        """
        of_rows = (self.row_sums / self.total).mul_(part).sqrt_()
        return of_rows, self.col_sums.sqrt().mul_(self.scale)


def squared_weights(means: Tensor) -> Tensor:
    """Squares of D_r or D_c, from the mean squares of rows or columns.

    Args:
        means: the mean square of each, divided by that of the matrix; of any shape.
    """
    return means.clamp(min=_LEAST_MEAN).reciprocal_()


def gram(a: Tensor) -> Tensor:
    """The Gram matrices A^T A in fp64, (B, c, c), of (B, r, c) in any dtype."""
    a = a.double()
    return a.mT @ a


def row_scale(gram_q: Tensor, gram_u: Tensor, rows: int) -> Tensor:
    """The number of rows over the sum of (Q U^T)^2, (B, 1), fp64; 0 where the factors are zero.

    Args:
        gram_q: Q^T Q over all rows of the matrix, (B, k, k), fp64.
        gram_u: U^T U, (B, k, k), fp64.
        rows: the number of rows of the matrix.
    """
    mean = torch.linalg.vecdot(gram_q.flatten(1), gram_u.flatten(1))[:, None] / rows
    return torch.where(mean > torch.finfo(torch.float32).tiny, mean.reciprocal(), 0.0)


def sketches(x: Past, gram_u: Tensor) -> Sketches:
    """Compute the weights, the floor and the sketches of a stack from its last factors.

    Args:
        x: the factors, and what else they are made of.
        gram_u: U^T U, (B, k, k), fp64.
    """
    q, u = x.q, x.u
    held = balance(q, u, x.gram_q, gram_u)
    row_squares, col_squares = held.squared_weights(x.rows)
    of_rows, of_cols = row_squares.sqrt(), col_squares.sqrt()
    norms = torch.linalg.vector_norm(u * of_cols[..., None], dim=1, keepdim=True)
    cols = u.shape[1]
    fresh_x = uniform_sketches(x.keys[0], 0, cols, x.width, cols**-0.5, q)
    fresh_z = uniform_sketches(x.keys[1], x.first, q.shape[1], x.tests, x.rows**-0.5, q)
    return Sketches(
        warm(u, fresh_x, of_cols, norms),
        # Columns of D_r Q have about unit norm; the exact one would take a sum over processes.
        warm(q, fresh_z, of_rows, (norms > 0).to(q.dtype)),
        *(row_squares, col_squares, row_scale(x.gram_q, gram_u, x.rows)),
        *(held.floor(x.floor) if x.floor else (None, None)),
    )


def row_squares(x: Found) -> Tensor:
    """D_r^2, (B, m), fp64, from what the pass found, instead of from the last factors.

    A row whose gradients begin in this step then counts as much as the others do.
    """
    return torch.where(x.row_scale > 0, squared_weights(x.shares), x.row_squares)


def products(x: Found) -> tuple[Tensor, Tensor]:
    """Compute G, H, ||T||_F^2 and S of equation 3 for the rows and columns at hand.

    Returns:
        G, H and ||T||_F^2 end to end, (B, w^2 + t w + 1), and S, (B, t, t), fp64.
    """
    squares = row_squares(x)
    total = torch.linalg.vecdot(x.energies, squares)[:, None]
    y, z, p = x.y[:, x.first :].double(), x.z[:, x.first :].double(), x.p.double()
    g, h = y.mT @ (y * squares[:, x.first :, None]), z.mT @ y
    s = p * x.col_squares.double()[:, None] @ p.mT
    return torch.cat([g.flatten(1), h.flatten(1), total], dim=1), s


def refactor(stacks: Sequence[Solved]) -> list[Tensor]:
    """Write the new factors of stacks; those whose sketches have one size are solved together.

    Args:
        stacks: what they are made of, and where they go.

    Returns:
        Each stack's :func:`estimated_ratios`.
    """
    found: dict[int, Tensor] = {}
    order = sorted(range(len(stacks)), key=lambda i: stacks[i].sizes)
    for (rank, width, tests), group in groupby(order, lambda i: stacks[i].sizes):
        places = list(group)
        alike = [stacks[i] for i in places]
        sizes_of = [width**2, width * tests, 1]
        of_all = torch.cat([x.sums[:, : sum(sizes_of)] for x in alike])
        g, h, total = of_all.split_with_sizes(sizes_of, dim=1)
        s = torch.cat([x.s for x in alike])
        of_y, of_p, energy = solve(
            g.reshape(-1, width, width), h.reshape(-1, tests, width), s, rank
        )
        errors = estimated_ratios(energy, total)
        parts = (values.split([len(x.y) for x in alike]) for values in (of_y, of_p, errors))
        for i, x, of_q, of_u, error in zip(places, alike, *parts, strict=True):
            found[i] = error
            for to, made, first in zip(
                (x.q, x.u),
                (x.y @ of_q.to(x.y.dtype), x.p.mT @ of_u.to(x.p.dtype)),
                x.first,
                strict=True,
            ):
                new = round_factor(made, to[0].dtype, first, x.salt)
                torch._foreach_copy_(to, list(new.unbind()))
    return [found[i] for i in range(len(stacks))]


def balance(q: Tensor, u: Tensor, gram_q: Tensor, gram_u: Tensor) -> Balance:
    """Compute row and column sums of (Q U^T)^2 without forming Q U^T.

    Args:
        q: the local rows of Q, (B, r, k).
        u: all rows of U, (B, n, k).
        gram_q: Q^T Q over all rows of the matrix, (B, k, k), fp64.
        gram_u: U^T U, (B, k, k), fp64.
    """
    dtype = q.dtype
    tiny = torch.finfo(dtype).tiny
    square = gram_u.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None].clamp_(min=tiny)
    scale = square.sqrt().clamp_(min=tiny)
    unit = u / scale.to(dtype)
    row_sums = torch.linalg.vecdot(q, q @ (gram_u / square).to(dtype)).clamp_(min=0)
    col_sums = torch.linalg.vecdot(unit, unit @ gram_q.to(dtype)).clamp_(min=0)
    total = col_sums.sum(-1, keepdim=True).clamp_(min=tiny)
    return Balance(row_sums, col_sums, total, scale[..., 0].to(dtype))


def warm(kept: Tensor, fresh: Tensor, weights: Tensor, norms: Tensor) -> Tensor:
    """Build a weighted sketch, D X or D Z: the last step's directions, then random columns.

    Args:
        kept: the last factor, (B, r, k). The sketch's first columns are D times it, divided by
            ``norms``.
        fresh: random columns of about unit norm, (B, r, w); overwritten by the result.
        weights: D, (B, r).
        norms: the norm of each column of D times ``kept``, (B, 1, k); 0 for a column that is zero,
            in whose place the random column stays. This is decided on the device.

    Returns:
        D times the sketch, (B, r, w): as many of the kept columns as fit, then the random ones.
    """
    count = min(kept.shape[2], fresh.shape[2])
    kept, norms = kept[..., :count], norms[..., :count]
    sketch = fresh.mul_(weights[..., None])
    unit = (kept * weights.square()[..., None]).div_(norms)
    start = sketch[..., :count]
    start.copy_(torch.where(norms > 0, unit, start))
    return sketch


def unit_basis(g: Tensor) -> Tensor:
    """Compute what turns columns Y into an orthonormal basis, from their Gram matrix alone.

    Args:
        g: Y^T Y, (N, w, w), fp64.

    Returns:
        F (N, w, w), fp64, such that Y F has orthonormal columns; those that belong to directions in
        which Y is zero up to rounding are shorter.
    """
    diagonal = g.diagonal(dim1=-2, dim2=-1)
    unit = torch.where(diagonal > _TINY, diagonal.clamp(min=_TINY).rsqrt(), 0.0)
    eye = torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)
    scaled = g * unit[..., None] * unit[..., None, :] + _LIFT * eye
    inverse = torch.linalg.solve_triangular(_cholesky(scaled), eye.expand_as(scaled), upper=False)
    return unit[..., None] * inverse.mT


def solve(g: Tensor, h: Tensor, s: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the new factors as combinations of the sketches' columns: Q = y of_y, U = p^T of_p.

    Args:
        g: G of equation 3, (N, w, w), fp64.
        h: H of equation 3, (N, t, w), fp64.
        s: S of equation 3, (N, t, t), fp64.
        rank: the rank k of the new factors, at most w.

    Returns:
        of_y (N, w, k) and of_p (N, t, k), whose columns are in the order of the energy that they
        hold; and an estimate of how much of T's energy each column accounts for, (N, k). All fp64.
    """
    basis = unit_basis(g)
    core = h @ basis  # Z^T B
    square = core.mT @ core
    scale = square.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    eye = torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)
    lifted = square + (scale * _LIFT).clamp(min=_TINY) * eye
    inverse = torch.cholesky_solve(core.mT, _cholesky(lifted))  # (Z^T B)^+
    projected = inverse @ s @ inverse.mT
    best, energy = dominant(projected, rank)
    # P also contains noise: the part of T outside the basis B reaches it through the test columns
    # and the inverse. The residual of the least squares has that part's energy in the t - w
    # directions by which the test columns outnumber those of B, and so tells it for one direction.
    missed = s.diagonal(dim1=-2, dim2=-1).sum(-1) - (square * projected).sum((-2, -1))
    spread = (inverse.mT @ best).square().sum(-2)
    spare = max(h.shape[1] - h.shape[2], 1)
    noise = spread * (missed.clamp(min=0) / spare)[:, None]
    # The fraction ``own`` of a column's energy is T's own. A column is multiplied by about the root
    # of that fraction, so that V is not overstated where a sketch saw little, as of rows whose
    # gradients begin in this step. The polynomial that stands for the root is smooth at 0.
    own = (1.0 - noise / energy.clamp(min=_TINY)).clamp_(min=0)
    length = own * (1.5 - 0.5 * own)
    taken = energy * length * (2.0 * own - length)
    return basis @ best, inverse.mT @ (best * length[:, None]), taken


def dominant(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Find the k directions that hold the most energy, by one orthogonal iteration.

    One iteration was better for the update than four. The columns start from the last step's
    directions, energies are nearly equal where the choice is hard, and a direction that lasts over
    several steps prevails.

    Args:
        gram: P P^T, (N, w, w), fp64, positive semi-definite; its first columns belong to the
            last step's directions, roughly in the order of their energy.
        rank: the number of directions k, at most w.

    Returns:
        E (N, w, k), with orthonormal columns in about the order of their energy; and the energy of
        each, the diagonal of E^T gram E, (N, k). All fp64.
    """
    width = gram.shape[-1]
    eye = torch.eye(width, dtype=gram.dtype, device=gram.device)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    shifted = gram / trace.clamp(min=_TINY)[:, None, None] + _LEAST_ENERGY * eye
    found = shifted[..., :rank]
    lower = _cholesky(found.mT @ found)
    found = torch.linalg.solve_triangular(lower, found.mT, upper=False).mT
    return found, (found * (gram @ found)).sum(-2)


def estimated_ratios(energy: Tensor, total: Tensor) -> Tensor:
    """Estimate the error ratios xi of factorisations from their columns' energy, without a pass.

    Args:
        energy: the energy of T that each column accounts for, (B, k), fp64.
        total: ||T||_F^2, (B, 1), fp64.

    Returns:
        The ratios, (B, 1), fp64; 0 where T is zero.
    """
    missed = (1.0 - energy.sum(-1, keepdim=True) / total).clamp_(min=0).sqrt_()
    return torch.where(total > 0, missed, torch.zeros_like(missed))


def _cholesky(gram: Tensor) -> Tensor:
    """The lower Cholesky factors of positive definite matrices, (N, w, w), fp64."""
    return torch.linalg.cholesky_ex(gram, check_errors=False)[0]


def guidance(sums: Tensor) -> Tensor:
    """What ``guidance="cosine"`` multiplies updates by, (F,): 1 / max(1 - cos(X, Y), 1/2).

    X is the update that this step's gradient alone would make, and Y that of the first moment from
    before the step. So it is 1/2 where they are opposite, 1 where they are orthogonal or nothing is
    known, as at the first step, and 2 where they are parallel. The paper's first version (arXiv
    2403.14958v1) offers guidance by the cosine, and its public summary gives no formula.

    Args:
        sums: of X Y, X^2 and Y^2, (F, 3).
    """
    xy, xx, yy = sums.unbind(-1)
    norms = xx.sqrt() * yy.sqrt()
    cosine = torch.where(norms > 0, xy / norms, torch.zeros_like(norms))
    return 1.0 / (1.0 - cosine).clamp(min=0.5)
