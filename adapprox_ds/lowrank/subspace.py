# SPDX-License-Identifier: Apache-2.0
"""The small algebra of a tracking step, for stacks of blocks, without waiting for the device.

LAPACK-style decompositions report failure to the host, which waits for the device; what is used
here cannot fail and is made of products and Cholesky factors alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: What is added to unit columns so that no set of them is dependent: sine waves of this norm. Well
#: above fp32's rounding, so that it lifts them; what it turns the basis by is below what is kept.
_LIFT = 1e-6
#: Orthogonal iterations on the projected matrix. Few are enough: columns start from last step's
#: directions, and where the choice is hard, energies are nearly equal.
_TURNS = 4
#: Eigenvalues below this part of the trace count as equal.
_LEAST_ENERGY = 1e-7


def orthonormal(a: Tensor) -> Tensor:
    """An orthonormal basis of the columns, (B, m, w), w <= m; fp32 or fp64.

    Householder QR where nobody waits, and for fp64, for which no wider sums exist.
    """
    if a.device.type == "cpu" or a.dtype == torch.float64:
        return torch.linalg.qr(a)[0]
    return cholesky_qr(a)


def cholesky_qr(a: Tensor) -> Tensor:
    """An orthonormal basis of the columns: Cholesky-QR, twice.

    Gram matrices are accumulated in fp64, which holds the squared condition of columns in fp32.
    Dependent columns (all of them, at a zero gradient) are lifted by orthogonal waves, so the
    result is orthonormal to 1e-5 whatever ``a`` is, and spans what ``a`` spans.

    Args:
        a: (B, m, w), w <= m; fp32.

    Returns:
        (B, m, w).
    """
    rows, width = a.shape[-2:]
    tiny = torch.finfo(a.dtype).tiny
    # Scaled before it is squared: gradients may be small.
    a = a / a.abs().amax(dim=-2, keepdim=True).clamp_(min=tiny)
    a = a / torch.linalg.vector_norm(a, dim=-2, keepdim=True).clamp_(min=tiny)
    a = a + _LIFT * _waves(rows, width, a)
    for _ in range(2):
        wide = a.double()
        a = (wide @ _inverse_root(wide.mT @ wide)).to(a.dtype)
    return a


class SharedBasis:
    """:func:`cholesky_qr` of matrices whose rows lie on several ranks: sums in between are yours.

    Call :meth:`moments`, sum the result over the ranks, give it to :meth:`turn`, sum what that
    returns, and give it to :meth:`finish`.

    Args:
        a: rows of the matrices that this rank has, (B, r, w); rows that others have too are the
            same there.
        index: their numbers in the matrix, (r,).
        own: those that this rank counts; each row of the matrix is counted by one rank.
        rows: of the whole matrix, at least w.
    """

    def __init__(self, a: Tensor, index: Tensor, own: slice, rows: int) -> None:
        self.a, self.own, self.dtype = a.double(), own, a.dtype
        self.waves = _waves(rows, a.shape[-1], self.a, index)

    def moments(self) -> Tensor:
        """This rank's part of A^T A and of A^T waves, (B, 2, w, w), fp64."""
        a = self.a[:, self.own]
        return torch.stack([a.mT @ a, a.mT @ self.waves[self.own]], dim=1)

    def turn(self, moments: Tensor) -> Tensor:
        """The first pass, of the columns scaled to one and lifted.

        Returns:
            this rank's part of the new Gram matrices, (B, w, w), fp64.
        """
        gram, cross = moments.unbind(1)
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        unit = diagonal.clamp(min=torch.finfo(gram.dtype).tiny).rsqrt()[:, None]
        cross = _LIFT * unit.mT * cross
        gram = unit.mT * gram * unit + cross + cross.mT
        # Of the waves themselves, over all rows.
        squares = gram.new_ones(gram.shape[-1])
        squares[0] = 2.0
        gram += torch.diag(_LIFT**2 * squares)
        self.a = (self.a * unit + _LIFT * self.waves) @ _inverse_root(gram)
        own = self.a[:, self.own]
        return own.mT @ own

    def finish(self, gram: Tensor) -> Tensor:
        """The second pass; returns this rank's rows of the bases, (B, r, w)."""
        return (self.a @ _inverse_root(gram)).to(self.dtype)


def _waves(rows: int, width: int, like: Tensor, some: Tensor | None = None) -> Tensor:
    """The first columns of the orthonormal cosine transform, but for a factor: (rows, width).

    ``some``: only of the rows with these indices.
    """
    index = torch.arange(rows, device=like.device) if some is None else some
    phase = index.float().add_(0.5)
    frequency = torch.arange(width, dtype=torch.float32, device=like.device)
    waves = torch.outer(phase, frequency.mul_(math.pi / rows)).cos_()
    return waves.mul_((2.0 / rows) ** 0.5).to(like.dtype)


def _inverse_root(gram: Tensor) -> Tensor:
    """R^-1 of gram = R^T R, upper triangular: (N, w, w), fp64."""
    lower = torch.linalg.cholesky_ex(gram, check_errors=False)[0]
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False).mT


def dominant(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The directions that hold most energy, by orthogonal iteration: Rayleigh-Ritz.

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
    scale = trace.clamp(min=torch.finfo(gram.dtype).tiny)[:, None, None]
    shifted = gram / scale + _LEAST_ENERGY * eye
    found = eye[:, :rank].expand(len(gram), width, rank)
    for _ in range(_TURNS):
        found = shifted @ found
        found = found @ _inverse_root(found.mT @ found)
    return found, (found * (gram @ found)).sum(-2)


def tracking_sketch(u: Tensor, fresh: Tensor, col_weights: Tensor) -> Tensor:
    """The warm start: the last right factor, then fresh Gaussian columns.

    With D = diag(col_weights) the balanced matrix A D has the row space D u; multiplying A itself
    by D (D u) is multiplying A D by D u.

    Args:
        u: (B, n, k') of the last factorisation, zero before the first.
        fresh: (B, n, k + p) standard normal.
        col_weights: (B, n).

    Returns:
        (B, n, k + p): as many columns of the last factor as fit, the rest fresh. Columns that hold
        nothing (all, at first) are fresh too, decided without a look at the values on the host.
    """
    kept = u[..., : fresh.shape[-1]] * col_weights[..., None]
    norms = torch.linalg.vector_norm(kept, dim=-2, keepdim=True)
    sketch = fresh.clone()
    start = fresh[..., : kept.shape[-1]]
    sketch[..., : kept.shape[-1]] = torch.where(norms > 0, kept / norms, start)
    return sketch * col_weights[..., None]
