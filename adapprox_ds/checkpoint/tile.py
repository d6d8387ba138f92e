# SPDX-License-Identifier: Apache-2.0
"""Factors a block anew, of whatever its second moment was saved as, without making it dense."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from adapprox_ds.lowrank.factors import FactorStore
from adapprox_ds.lowrank.srsi import owned

#: Of the randomised factorisation of a dense tile: it errs by far less than the truncation does.
_OVERSAMPLING, _ITERATIONS = 10, 4
#: Tiles up to this many rows or columns are factored by an exact SVD.
_EXACT_SIZE = 256
#: Elements of a tile that are in memory at a time.
_STRIP = 1 << 20


@dataclass(frozen=True, slots=True)
class Tile:
    """A block as a matrix that is never whole in memory: some rows of it are at a time.

    Attributes:
        whole: the parameter's second moment, in the flattened parameter's indices.
        begin: where the block begins there.
        rows: of the block.
        cols: of the block.
        domain: what shall be factored, one of ``lowrank.factors.DOMAINS``.
    """

    whole: FactorStore
    begin: int
    rows: int
    cols: int
    domain: str

    @property
    def dtype(self) -> torch.dtype:
        """What its rows are computed in."""
        return torch.promote_types(self.whole.dense.dtype, torch.float32)

    def strips(self) -> Iterator[tuple[slice, Tensor]]:
        """Consecutive rows, and which they are; new tensors."""
        step = max(1, _STRIP // self.cols)
        for lo in range(0, self.rows, step):
            hi = min(lo + step, self.rows)
            ends = self.begin + lo * self.cols, self.begin + hi * self.cols
            values = self.whole.read(*ends, self.dtype).view(hi - lo, self.cols)
            yield slice(lo, hi), values.sqrt_() if self.domain == "std" else values

    def __matmul__(self, u: Tensor) -> Tensor:
        """Its product with (cols, k)."""
        return torch.cat([values @ u for _, values in self.strips()])

    def transposed_times(self, q: Tensor) -> Tensor:
        """The transpose of the matrix times (rows, k)."""
        product = q.new_zeros(self.cols, q.shape[1])
        for rows, values in self.strips():
            product.addmm_(values.T, q[rows])
        return product


def factor_tile(a: Tile, rank: int) -> tuple[Tensor, Tensor]:
    """The dominant singular directions of a matrix (m, n), by energy; draws on no shared state.

    Returns:
        Q (m, k) with orthonormal columns and U (n, k), k = min(rank, m, n).
    """
    if min(a.rows, a.cols) <= _EXACT_SIZE and a.rows * a.cols <= _STRIP:
        values = torch.cat([values for _, values in a.strips()])
        left, values, right = torch.linalg.svd(values, full_matrices=False)
    else:
        width = min(rank + _OVERSAMPLING, a.rows, a.cols)
        generator = torch.Generator("cpu").manual_seed(0)
        size = (a.cols, width)
        u = torch.randn(*size, generator=generator, dtype=a.dtype, device="cpu")
        for _ in range(_ITERATIONS):
            q, _ = torch.linalg.qr(a @ u)
            u, _ = torch.linalg.qr(a.transposed_times(q))
        basis, _ = torch.linalg.qr(a @ u)
        small = a.transposed_times(basis).T
        small, values, right = torch.linalg.svd(small, full_matrices=False)
        left = basis @ small
    return owned(left[:, :rank]), owned(right[:rank].T * values[:rank])
