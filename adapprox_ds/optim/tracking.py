# SPDX-License-Identifier: Apache-2.0
"""The tracking step: the root of the second moment in factors, refreshed in two passes.

Where Algorithm 3 forms V, runs five power iterations from a cold start and makes several products
of full size, this step

* keeps factors of sqrt(V): the update is G / sqrt(V), so that is where accuracy is wanted;
* starts S-RSI from the last factors plus a few fresh columns, so that one iteration is enough,
  and chooses the best k columns by Rayleigh-Ritz;
* balances: rows and columns are weighted by one over their root mean square, so that small
  entries, which make large updates, are approximated as well as large ones;
* touches each element twice: a pass that reduces and a pass that updates, both in tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adapprox_ds import kernels
from adapprox_ds.kernels.interface import StepScalars
from adapprox_ds.kernels.tiles import apply_update
from adapprox_ds.lowrank.factors import FactoredBlock
from adapprox_ds.lowrank.rank import rank_in_use
from adapprox_ds.lowrank.srsi import (
    gaussian_sketch,
    rayleigh_ritz,
    sketch_width,
    tracking_sketch,
    unit_scale,
)
from adapprox_ds.optim.hyperparameters import Hyperparameters
from adapprox_ds.zero.layout import FragmentLayout, MatrixBlock

#: Rows and columns weigh as if their mean square were at least this part of the block's.
_LEAST_MEAN = 1e-6


def step_scalars(h: Hyperparameters, t: int) -> StepScalars:
    """The numbers of step ``t`` (1 at the first)."""
    beta1, beta2 = h.betas
    return StepScalars(
        beta1=beta1,
        beta2=beta2,
        correction=(1.0 - beta2**t) ** -0.5 if h.bias_correction else 1.0,
        eps=h.eps,
        lr=h.learning_rate,
        weight_decay=h.weight_decay,
        ascend=h.maximize,
    )


def update_fragment(
    part: FragmentLayout,
    w: Tensor,
    m: Tensor | None,
    g: Tensor,
    dense: list[Tensor],
    factors: list[FactoredBlock],
    t: int,
    h: Hyperparameters,
) -> list[Tensor]:
    """One step for one fragment.

    Args:
        part: the fragment and its pieces.
        w: its weights, (numel,), updated in place.
        m: its first moment, (numel,), updated in place; None for beta_1 = 0.
        g: its gradient, (numel,).
        dense: second moments of its dense runs, updated in place.
        factors: factors of its blocks, replaced.
        t: the step, 1 at the first.
        h: the group's settings.

    Returns:
        The error ratio of each block, 0-dim.
    """
    s = step_scalars(h, t)
    start = part.fragment.offset
    runs = [slice(r.offset - start, r.offset - start + r.numel) for r in part.runs]
    blocks = [_Block(b, f, start, t, h) for b, f in zip(part.blocks, factors, strict=True)]

    square = torch.zeros((), dtype=_dtype(dense, factors), device=g.device)
    for here, v in zip(runs, dense, strict=True):
        gr = g[here].to(v.dtype)
        v.mul_(s.beta2).addcmul_(gr, gr, value=1.0 - s.beta2)
        x = gr / _denominator(v, s)
        square += torch.dot(x, x)
    for block in blocks:
        square += block.first_pass(g, s)

    rms = (square / part.fragment.numel).sqrt()
    clip = (rms / h.clip_threshold).clamp_(min=1.0)

    for here, v in zip(runs, dense, strict=True):
        mr = None if m is None else m[here]
        apply_update(w[here], mr, g[here].to(v.dtype), _denominator(v, s).mul_(clip), s)
    return [block.second_pass(w, m, g, clip, s) for block in blocks]


def _denominator(v: Tensor, s: StepScalars) -> Tensor:
    return v.sqrt().mul_(s.correction).add_(s.eps)


def _dtype(dense: list[Tensor], factors: list[FactoredBlock]) -> torch.dtype:
    return dense[0].dtype if dense else factors[0].q.dtype


class _Block:
    """The two passes over one block and the small algebra between and after them."""

    def __init__(
        self, block: MatrixBlock, factors: FactoredBlock, start: int, t: int, h: Hyperparameters
    ) -> None:
        self.h, self.block, self.factors = h, block, factors
        self.span = slice(block.offset - start, block.offset - start + block.numel)
        self.rank = rank_in_use(factors.rank)
        size = (block.cols, sketch_width(self.rank, h.oversampling, block.rows, block.cols))
        fresh = gaussian_sketch(h.seed, block.name, block.first_row, t, size, factors.q)
        row_sums, col_sums, scale = _sums(factors)
        self.sketch = tracking_sketch(factors.u, fresh, _weights(col_sums, bool(h.balanced)))
        self.floor = _floor(row_sums, col_sums, scale, h.floor) if h.floor > 0 else None

    def _view(self, flat: Tensor) -> Tensor:
        return flat[self.span].view(self.block.rows, self.block.cols)

    def first_pass(self, g: Tensor, s: StepScalars) -> Tensor:
        """Sketch the root; returns the sum of squares of the block's update."""
        f = self.factors
        reduced = kernels.first_pass(self._view(g), f.q, f.u, self.sketch, self.floor, s)
        self.row_weights = _weights(reduced.row_sums, bool(self.h.balanced))
        self.col_weights = _weights(reduced.col_sums, bool(self.h.balanced))
        sketched = unit_scale(reduced.sketch * self.row_weights[:, None])
        self.basis = torch.linalg.qr(sketched)[0]
        return reduced.update_square

    def second_pass(
        self, w: Tensor, m: Tensor | None, g: Tensor, clip: Tensor, s: StepScalars
    ) -> Tensor:
        """Update weights and first moment, replace the factors; returns the error ratio.

        With D_r and D_c the weights, the balanced root is T = D_r S D_c; basis spans the rows of
        interest of T, and the projection basis^T T comes from the pass as (D_r basis)^T S.
        """
        f = self.factors
        reduced = kernels.second_pass(
            self._view(w),
            None if m is None else self._view(m),
            self._view(g),
            f.q,
            f.u,
            self.floor,
            self.basis * self.row_weights[:, None],
            self.row_weights.square(),
            clip,
            s,
        )
        projection = reduced.projection * self.col_weights
        q, u, part = rayleigh_ritz(self.basis, projection, self.rank)
        held = part * projection.double().square().sum()
        total = torch.dot(reduced.weighted_col_sums.double(), self.col_weights.double().square())
        f.q, f.u = q / self.row_weights[:, None], u / self.col_weights[:, None]
        missed = (1.0 - held / total).clamp_(min=0).sqrt()
        return torch.where(total > 0, missed, torch.zeros_like(missed))


def _sums(f: FactoredBlock) -> tuple[Tensor, Tensor, Tensor]:
    """Row and column sums of (Q U^T / scale)^2 and that scale, from the factors alone."""
    scale = f.u.abs().amax().clamp(min=torch.finfo(f.u.dtype).tiny)
    u = f.u / scale
    row_sums = (f.q * (f.q @ (u.T @ u))).sum(dim=1).clamp_(min=0)
    col_sums = (u * (u @ (f.q.T @ f.q))).sum(dim=1).clamp_(min=0)
    return row_sums, col_sums, scale


def _floor(row_sums: Tensor, col_sums: Tensor, scale: Tensor, part: float) -> Tensor:
    """Two vectors, padded to one length: their outer product is sqrt(part * r c^T / mean)."""
    total = row_sums.sum().clamp_(min=torch.finfo(row_sums.dtype).tiny)
    vectors = row_sums.new_zeros(2, max(row_sums.numel(), col_sums.numel()))
    vectors[0, : row_sums.numel()] = (part * row_sums / total).sqrt()
    vectors[1, : col_sums.numel()] = col_sums.sqrt() * scale
    return vectors


def _weights(sums: Tensor, balanced: bool) -> Tensor:
    """The root mean square of all over that of each row or column; 1 where all is zero.

    Relative, so that no weight leaves the range of fp32 with the gradients' scale.
    """
    if not balanced:
        return torch.ones_like(sums)
    mean = sums.mean()
    weights = (mean / sums.clamp(min=mean * _LEAST_MEAN)).clamp(max=1.0 / _LEAST_MEAN).sqrt()
    return torch.where(mean > 0, weights, torch.ones_like(sums))
