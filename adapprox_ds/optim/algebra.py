# SPDX-License-Identifier: Apache-2.0
"""The small algebra of a step: pure functions of stacks of matrices, none of which waits.

Notation of docs/how-it-works.md. R is the root of the second moment, (m, n), D_r and D_c diagonal
weights of its rows and columns, T = D_r R D_c the balanced root. One pass over R's elements gives

    y = R D_c X     so Y = T X = D_r y              (1)
    p = Z^T D_r R   so Z^T T = p D_c                (2)

for a sketch X and a test sketch Z. With B an orthonormal basis of Y, T is close to B P, where P is
the least-squares solution of (Z^T B) P = Z^T T (generalised Nystrom). Of P the k columns that hold
most are kept. All that is of the matrix's size was done in the pass; what is here works on m + n
rows of few columns, and on the Gram matrices

    G = Y^T Y = y^T D_r^2 y     H = Z^T Y = (D_r Z)^T y     S = Z^T T T^T Z = p D_c^2 p^T    (3)

in fp64, which holds the squared condition of columns in fp32. Decompositions that report failure to
the host would wait for the device: here are products and Cholesky factors alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adapprox_ds.kernels.interface import Sketches
from adapprox_ds.lowrank.sketch import uniform_sketches

#: Rows and columns weigh as if their mean square were at least this part of the matrix's. Weights
#: are of the last factors: without it a row whose gradients begin now would outweigh all others.
_LEAST_MEAN = 1e-2
#: What is added to the squares of unit columns so that no set of them is dependent. Columns are
#: made in fp32: what lies in a direction of less than the root of it is rounding.
_LIFT = 1e-12
#: Eigenvalues below this part of the trace count as equal.
_LEAST_ENERGY = 1e-4
_TINY = torch.finfo(torch.float64).tiny


class Balance(NamedTuple):
    """What the factors themselves say of the root's rows and columns.

    Attributes:
        row_sums: of (Q U^T / scale)^2, (B, m).
        col_sums: of the same, (B, n).
        total: the sum of all, (B, 1).
        scale: (B, 1); numbers are small where gradients are, and squares smaller.
    """

    row_sums: Tensor
    col_sums: Tensor
    total: Tensor
    scale: Tensor

    def weights(self, rows: int, balanced: bool) -> tuple[Tensor, Tensor]:
        """D_r (B, m) and D_c (B, n): one over each root mean square, relative to that of all.

        Args:
            rows: of the whole matrix, of which some may lie elsewhere.
            balanced: otherwise all weigh 1, as where nothing is known.
        """
        if not balanced:
            return torch.ones_like(self.row_sums), torch.ones_like(self.col_sums)
        # A factor that the least weight has divided would be too short a test column next.
        known = self.total > torch.finfo(self.total.dtype).tiny

        def weights(sums: Tensor, count: int) -> Tensor:
            return squared_weights(torch.where(known, sums / self.total * count, 1.0)).sqrt_()

        return weights(self.row_sums, rows), weights(self.col_sums, self.col_sums.shape[1])

    def floor(self, part: float) -> tuple[Tensor, Tensor]:
        """Vectors (B, m) and (B, n) whose outer product is sqrt(part r c^T / mean)."""
        of_rows = (self.row_sums / self.total).mul_(part).sqrt_()
        return of_rows, self.col_sums.sqrt().mul_(self.scale)


def squared_weights(means: Tensor) -> Tensor:
    """Squares of D_r or D_c, from mean squares relative to that of the matrix."""
    return means.clamp(min=_LEAST_MEAN).reciprocal_()


def gram(a: Tensor) -> Tensor:
    """A^T A of (B, r, c) in fp64, (B, c, c)."""
    a = a.double()
    return a.mT @ a


def sketches(
    q: Tensor,
    u: Tensor,
    grams: tuple[Tensor, Tensor],
    keys: tuple[list[int], list[int]],
    sizes: tuple[int, int, int, int],
    floor: float,
    balanced: bool,
) -> Sketches:
    """Weights, floor and sketches of a stack, from its last factors.

    Args:
        q: (B, r, k), all rows of Q or some.
        u: (B, n, k).
        grams: Q^T Q of all rows and U^T U, (B, k, k), fp64.
        keys: of the blocks' sketches and test sketches.
        sizes: columns of the sketch and of the test sketch, the index in the whole matrix of the
            first row of ``q``, and the rows of that.
        floor: see :meth:`Balance.floor`; 0 for none.
        balanced: see :meth:`Balance.weights`.
    """
    width, tests, first, rows = sizes
    held = balance(q, u, *grams)
    of_rows, of_cols = held.weights(rows, balanced)
    norms = torch.linalg.vector_norm(u * of_cols[..., None], dim=1, keepdim=True)
    fresh_x = uniform_sketches(keys[0], 0, u.shape[1], width, u.shape[1] ** -0.5, q)
    fresh_z = uniform_sketches(keys[1], first, q.shape[1], tests, rows**-0.5, q)
    return Sketches(
        warm(u, fresh_x, of_cols, norms),
        # Columns of D_r Q have about unit norm, which takes no sum over ranks to know.
        warm(q, fresh_z, of_rows, (norms > 0).to(q.dtype)),
        *(of_rows, of_cols),
        *(held.floor(floor) if floor else (None, None)),
    )


def balance(q: Tensor, u: Tensor, gram_q: Tensor, gram_u: Tensor) -> Balance:
    """Row and column sums of (Q U^T)^2, from the factors alone.

    Args:
        q: (B, r, k), all rows of Q or some.
        u: (B, n, k).
        gram_q: Q^T Q of all rows, (B, k, k), fp64.
        gram_u: U^T U, alike.
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
    """A weighted sketch, D X or D Z: last step's directions, then fresh columns.

    Args:
        kept: the last factor, (B, r, k'); its columns are weighted and divided by ``norms``.
        fresh: (B, r, w), columns of about unit norm; overwritten by the result.
        weights: D, (B, r).
        norms: (B, 1, k'), 0 where a column holds nothing: it is fresh then.

    Returns:
        (B, r, w): as many kept columns as fit, then fresh ones, decided without the host.
    """
    count = min(kept.shape[2], fresh.shape[2])
    kept, norms = kept[..., :count], norms[..., :count]
    sketch = fresh.mul_(weights[..., None])
    unit = (kept * weights.square()[..., None]).div_(norms)
    start = sketch[..., :count]
    start.copy_(torch.where(norms > 0, unit, start))
    return sketch


def unit_basis(g: Tensor) -> Tensor:
    """What makes columns with Gram matrix ``g`` orthonormal.

    Args:
        g: (N, w, w), fp64.

    Returns:
        F (N, w, w) such that Y F is orthonormal but for directions that hold nothing, which it
        gives a smaller norm.
    """
    diagonal = g.diagonal(dim1=-2, dim2=-1)
    unit = torch.where(diagonal > _TINY, diagonal.clamp(min=_TINY).rsqrt(), 0.0)
    eye = torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)
    scaled = g * unit[..., None] * unit[..., None, :] + _LIFT * eye
    return unit[..., None] * _inverse_root(scaled)


def solve(g: Tensor, h: Tensor, s: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The factors' columns in terms of the sketches: Q = y of_y, U = p^T of_p.

    Args:
        g: G of equation 3, (N, w, w), fp64.
        h: H, (N, t, w).
        s: S, (N, t, t).
        rank: k <= w.

    Returns:
        of_y (N, w, k) and of_p (N, t, k), in the order of the energy that columns hold; and of T's
        energy how much each takes away, estimated, (N, k). All fp64.
    """
    basis = unit_basis(g)
    core = h @ basis  # Z^T B
    square = core.mT @ core
    scale = square.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    eye = torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)
    root = _inverse_root(square + (scale * _LIFT).clamp(min=_TINY) * eye)
    inverse = root @ (root.mT @ core.mT)  # (Z^T B)^+
    projected = inverse @ s @ inverse.mT
    best, energy = dominant(projected, rank)
    # What test columns hold of the rest of T reaches P through the inverse. Least squares miss as
    # much of it as there are more of them than directions.
    missed = s.diagonal(dim1=-2, dim2=-1).sum(-1) - (square * projected).sum((-2, -1))
    spread = (inverse.mT @ best).square().sum(-2)
    spare = max(h.shape[1] - h.shape[2], 1)
    noise = spread * (missed.clamp(min=0) / spare)[:, None]
    # The rest of a column's energy is T's. Columns are shortened to about that energy, the root of
    # its share, so that V is not overstated where a sketch saw little, as of rows whose gradients
    # begin now. Smooth where nothing is T's, which the root is not.
    own = (1.0 - noise / energy.clamp(min=_TINY)).clamp_(min=0)
    length = own * (1.5 - 0.5 * own)
    taken = energy * length * (2.0 * own - length)
    return basis @ best, inverse.mT @ (best * length[:, None]), taken


def dominant(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The directions that hold most energy, by one orthogonal iteration: Rayleigh-Ritz.

    One is enough, and better for the update than four: columns start from last step's directions,
    where the choice is hard energies are nearly equal, and what lasts over steps wins in the end.

    Args:
        gram: (N, w, w), fp64, positive semi-definite: of projections, whose columns start out
            roughly in the order of their energy.
        rank: k <= w.

    Returns:
        E (N, w, k), orthonormal, columns in the order of their energy; and the energy of each, the
        diagonal of E^T gram E, (N, k). All fp64.
    """
    width = gram.shape[-1]
    eye = torch.eye(width, dtype=gram.dtype, device=gram.device)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    shifted = gram / trace.clamp(min=_TINY)[:, None, None] + _LEAST_ENERGY * eye
    found = shifted[..., :rank]
    found = found @ _inverse_root(found.mT @ found)
    return found, (found * (gram @ found)).sum(-2)


def error_ratios(energy: Tensor, total: Tensor, every: bool) -> Tensor:
    """xi of a factorisation, from what its columns take away: an estimate that needs no other pass.

    Args:
        energy: that columns take away, (B, k), fp64.
        total: ||T||_F^2, (B, 1), fp64.
        every: of the first 1, 2, ... columns, (B, k); else of all, (B, 1).
    """
    held = energy.cumsum(-1) if every else energy.sum(-1, keepdim=True)
    missed = (1.0 - held / total).clamp_(min=0).sqrt_()
    return torch.where(total > 0, missed, torch.zeros_like(missed))


def _inverse_root(gram: Tensor) -> Tensor:
    """R^-1 of gram = R^T R, upper triangular: (N, w, w), fp64."""
    lower = torch.linalg.cholesky_ex(gram, check_errors=False)[0]
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False).mT
