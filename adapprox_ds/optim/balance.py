# SPDX-License-Identifier: Apache-2.0
"""Row and column sums of factors, and what is made of them: weights that balance, and the floor."""

from __future__ import annotations

import torch
from torch import Tensor

#: Rows and columns weigh as if their mean square were at least this part of the block's.
_LEAST_MEAN = 1e-6


def factor_sums(q: Tensor, u: Tensor, gram: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Row and column sums of (Q U^T / scale)^2 and that scale, from the factors alone.

    Args:
        q: (B, m, k), or some rows of it.
        u: (B, n, k).
        gram: Q^T Q of all rows, (B, k, k), where ``q`` is not all.

    Returns:
        (B, m), (B, n) and (B, 1, 1).
    """
    scale = u.abs().amax((-2, -1), keepdim=True).clamp_(min=torch.finfo(u.dtype).tiny)
    u = u / scale
    gram = q.mT @ q if gram is None else gram
    row_sums = (q * (q @ (u.mT @ u))).sum(-1).clamp_(min=0)
    col_sums = (u * (u @ gram)).sum(-1).clamp_(min=0)
    return row_sums, col_sums, scale


def floor_vectors(row_sums: Tensor, col_sums: Tensor, scale: Tensor, part: float) -> Tensor:
    """Two vectors, padded to one length: their outer product is sqrt(part * r c^T / mean).

    (B, 2, max(m, n)).
    """
    # The same as the rows' sum, of which some may lie elsewhere.
    total = col_sums.sum(-1, keepdim=True).clamp_(min=torch.finfo(row_sums.dtype).tiny)
    count, rows, cols = len(row_sums), row_sums.shape[-1], col_sums.shape[-1]
    vectors = row_sums.new_zeros(count, 2, max(rows, cols))
    vectors[:, 0, :rows] = (part * row_sums / total).sqrt()
    vectors[:, 1, :cols] = col_sums.sqrt() * scale[..., 0]
    return vectors


def balancing_weights(sums: Tensor, balanced: bool, mean: Tensor | None = None) -> Tensor:
    """The root mean square of all over that of each row or column; 1 where all is zero.

    Relative, so that no weight leaves the range of fp32 with the gradients' scale.

    Args:
        sums: of squares, (B, length).
        balanced: otherwise all weigh 1.
        mean: of all sums, (B, 1), where ``sums`` are not all.
    """
    if not balanced:
        return torch.ones_like(sums)
    mean = sums.mean(-1, keepdim=True) if mean is None else mean
    weights = (mean / sums.clamp(min=mean * _LEAST_MEAN)).clamp(max=1.0 / _LEAST_MEAN).sqrt()
    return torch.where(mean > 0, weights, torch.ones_like(sums))
