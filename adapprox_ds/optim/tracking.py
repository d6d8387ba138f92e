# SPDX-License-Identifier: Apache-2.0
"""The tracking step: the root of the second moment in factors, refreshed in two passes.

Where Algorithm 3 forms V, runs five power iterations from a cold start and makes several products
of full size, this step

* keeps factors of sqrt(V): the update is G / sqrt(V), so that is where accuracy is wanted;
* starts S-RSI from the last factors plus a few fresh columns, so that one iteration is enough,
  and chooses the best k columns by Rayleigh-Ritz;
* balances: rows and columns are weighted by one over their root mean square, so that small
  entries, which make large updates, are approximated as well as large ones;
* touches each element twice: a pass that reduces and a pass that updates, both in tiles;
* takes blocks of one shape and rank as a stack, and never waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from adapprox_ds import kernels
from adapprox_ds.kernels import tiles
from adapprox_ds.kernels.interface import StepScalars
from adapprox_ds.lowrank.factors import replace_factors
from adapprox_ds.lowrank.rank import rank_in_use
from adapprox_ds.lowrank.rounding import round_factors, rounding_salt
from adapprox_ds.lowrank.sketch import gaussian_sketches, sketch_key, sketch_width
from adapprox_ds.lowrank.subspace import dominant, orthonormal, tracking_sketch
from adapprox_ds.optim.balance import balancing_weights, factor_sums, floor_vectors
from adapprox_ds.optim.dense import DenseRuns
from adapprox_ds.optim.fragment import Fragment
from adapprox_ds.optim.guidance import gain
from adapprox_ds.optim.hyperparameters import Hyperparameters
from adapprox_ds.optim.nonfinite import GradientCheck

#: Bytes of sketches, bases and projections that are held at once.
_WAVE_BYTES = 24 << 20


def step_scalars(h: Hyperparameters, t: int) -> StepScalars:
    """The numbers of step ``t`` (1 at the first)."""
    first_correction, correction = h.corrections(t)
    return StepScalars(
        beta1=h.betas[0],
        beta2=h.betas[1],
        correction=correction,
        first_correction=first_correction,
        eps=h.eps,
        lr=h.learning_rate,
        weight_decay=h.weight_decay,
        ascend=h.maximize,
        of_gradients=h.momentum == "gradient",
        nesterov=h.nesterov,
        clips=h.clips or h.guided,
        largest=h.largest_quotient(t),
        salt=rounding_salt(t),
    )


def update(
    fragments: Iterable[Fragment], t: int, h: Hyperparameters, check: GradientCheck | None = None
) -> None:
    """One step for fragments whose factors have one device and dtype.

    Args:
        fragments: weights, moments and factors are updated, error ratios left in ``errors``.
        t: the step, 1 at the first.
        h: the settings of all.
        check: asked before anything is written.

    Raises:
        NonfiniteGradientError: the check says no.
    """
    s = step_scalars(h, t)
    for wave in _waves(sorted(fragments, key=_stack_key), h):
        stacks = [_Stack(list(parts), t, h) for key, parts in groupby(wave, _stack_key) if key]
        # Read before the check is asked, so that a device has work while its answer travels.
        measured = [stack.first_pass(s) for stack in stacks]
        if check is not None:
            check.require()
        dense = DenseRuns(wave)
        squares = dense.measure(s)
        for new, own in zip(measured, _parts(squares, stacks), strict=True):
            own += new
        clip = clip_factors(squares, [f.numel for f in wave], h)
        if h.guided:
            agreement = dense.agreement(s)
            for stack, own in zip(stacks, _parts(agreement, stacks), strict=True):
                own += stack.agreement(s)
            clip /= gain(agreement)
        dense.update(clip, s)
        for stack, own in zip(stacks, _parts(clip, stacks), strict=True):
            stack.second_pass(own, s)
        _truncate(stacks)


def _stack_key(f: Fragment) -> tuple:
    """Fragments with equal keys form a stack; those without a block have an empty one and lead."""
    if f.block is None:
        return ()
    (factors,) = f.factors
    mean = f.mean_matrix
    kinds = [str(x.dtype) for x in (f.w, f.g, factors.q, mean) if isinstance(x, Tensor)]
    return (f.block.rows, f.block.cols, factors.q.shape[1], rank_in_use(factors.rank), *kinds)


def _waves(fragments: list[Fragment], h: Hyperparameters) -> Iterator[list[Fragment]]:
    """Runs of fragments whose transient memory is bounded."""
    wave: list[Fragment] = []
    held = 0
    for f in fragments:
        size = sum(v.nbytes for v in f.dense)
        if f.block is not None:
            width = rank_in_use(f.factors[0].rank) + h.oversampling
            size += 2 * (f.block.rows + f.block.cols) * width * f.dtype.itemsize
        if wave and held + size > _WAVE_BYTES:
            yield wave
            wave, held = [], 0
        wave.append(f)
        held += size
    if wave:
        yield wave


def _parts(values: Tensor, stacks: list[_Stack]) -> list[Tensor]:
    """Views of what belongs to each stack; fragments without a block come first."""
    sizes = [len(stack.fragments) for stack in stacks]
    return list(values.split([len(values) - sum(sizes), *sizes]))[1:]


def clip_factors(squares: Tensor, counts: Sequence[int], h: Hyperparameters) -> Tensor:
    """max(1, RMS(X) / d) of each unit of the clip (Algorithm 3, line 9).

    Args:
        squares: the sum of X^2 of each.
        counts: elements of each.
        h: the settings.
    """
    if not h.clips:
        return torch.ones_like(squares)
    most = [n * h.clip_limit**2 for n in counts]
    limits = torch.tensor(most, dtype=squares.dtype, device="cpu")
    if squares.device.type != "cpu":
        limits = limits.pin_memory().to(squares.device, non_blocking=True)
    return (squares / limits).sqrt_().clamp_(min=1.0)


class _Stack:
    """The two passes over B blocks of one shape, and the small algebra around them."""

    def __init__(self, fragments: list[Fragment], t: int, h: Hyperparameters) -> None:
        self.h, self.fragments, self.salt = h, fragments, rounding_salt(~t)
        blocks = [f.layout.blocks[0] for f in fragments]
        self.factors = [f.factors[0] for f in fragments]
        self.rank = rank_in_use(self.factors[0].rank)
        self.w = [f.matrix(f.w) for f in fragments]
        self.m: Any = [f.mean_matrix for f in fragments if f.m is not None] or None
        self.g = [f.matrix(f.g) for f in fragments]
        self.q = torch.stack([f.q for f in self.factors]).to(fragments[0].dtype)
        self.u = torch.stack([f.u for f in self.factors]).to(fragments[0].dtype)
        rows, cols = blocks[0].rows, blocks[0].cols
        keys = [sketch_key(h.seed, b.name, b.first_row, t) for b in blocks]
        size = (cols, sketch_width(self.rank, h.oversampling, rows, cols))
        row_sums, col_sums, scale = factor_sums(self.q, self.u)
        self.sketch = tracking_sketch(
            self.u,
            gaussian_sketches(keys, size, self.u),
            balancing_weights(col_sums, bool(h.balanced)),
        )
        self.floor = floor_vectors(row_sums, col_sums, scale, h.floor) if h.floor else None

    def first_pass(self, s: StepScalars) -> Tensor:
        """Sketch the root; returns the sum of squares of each block's X."""
        reduced = kernels.first_pass(self.g, self.q, self.u, self.sketch, self.floor, s)
        self.row_weights = balancing_weights(reduced.row_sums, bool(self.h.balanced))
        self.col_weights = balancing_weights(reduced.col_sums, bool(self.h.balanced))
        self.basis = orthonormal(reduced.sketch * self.row_weights[..., None])
        del self.sketch
        return reduced.update_square

    def agreement(self, s: StepScalars) -> Tensor:
        """How far updates agree with the first moment; see :func:`tiles.agreement`."""
        return tiles.agreement(self.m, self.g, self.q, self.u, self.floor, s)

    def second_pass(self, clip: Tensor, s: StepScalars) -> None:
        """Update weights and first moment, and project.

        With D_r and D_c the weights, the balanced root is T = D_r S D_c; basis spans the rows of
        interest of T, and the projection basis^T T comes from the pass as (D_r basis)^T S.
        """
        reduced = kernels.second_pass(
            self.w,
            self.m,
            self.g,
            self.q,
            self.u,
            self.floor,
            self.basis * self.row_weights[..., None],
            self.row_weights.square(),
            clip,
            s,
        )
        self.projection = reduced.projection * self.col_weights[:, None]
        self.total = torch.linalg.vecdot(
            reduced.weighted_col_sums.double(), self.col_weights.double().square()
        )
        # Scaled before it is squared: entries may be small.
        self.scale = self.projection.abs().amax((-2, -1), keepdim=True)
        unit = self.projection / self.scale.clamp(min=torch.finfo(self.scale.dtype).tiny)
        self.gram = unit.double() @ unit.double().mT

    def replace(self, best: Tensor, energy: Tensor) -> None:
        """Keep the subspace ``best``, (B, w, k), of the basis; columns hold ``energy``, (B, k)."""
        best = best.to(self.basis.dtype)
        q = (self.basis @ best) / self.row_weights[..., None]
        u = (self.projection.mT @ best) / self.col_weights[..., None]
        expands = self.h.rank_policy == "expand"
        held = energy.cumsum(-1) if expands else energy.sum(-1, keepdim=True)
        held = held * self.scale.double().square()[..., 0]
        total = self.total[:, None]
        missed = (1.0 - held / total).clamp_(min=0).sqrt()
        errors = torch.where(total > 0, missed, torch.zeros_like(missed))
        q, u = round_factors(q, u, self.factors[0].q.dtype, self.salt)
        replace_factors(self.factors, q, u)
        for fragment, error in zip(self.fragments, errors, strict=True):
            fragment.errors = [error]


def _truncate(stacks: list[_Stack]) -> None:
    """Choose each block's best k columns; stacks of one rank and width together."""

    def sizes(stack: _Stack) -> tuple[int, int]:
        return stack.rank, stack.gram.shape[-1]

    for (rank, _), group in groupby(sorted(stacks, key=sizes), sizes):
        alike = list(group)
        best, energy = dominant(torch.cat([stack.gram for stack in alike]), rank)
        counts = [len(stack.fragments) for stack in alike]
        for stack, e, held in zip(alike, best.split(counts), energy.split(counts), strict=True):
            stack.replace(e, held)
