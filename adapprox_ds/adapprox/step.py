# SPDX-License-Identifier: Apache-2.0
"""The default step of Adapprox: it follows the factors of the second moment's root in one pass.

The paper's Algorithm 3 forms V, runs five power iterations from a cold start and makes several
products of the matrix's full size. This step instead (docs/how-it-works.md has its equations)

1. computes weights of the rows and of the columns, D_r and D_c, from the last factors, so that
   small entries, which make large updates, are approximated as well as large ones;
2. builds a sketch X = [D_c U | fresh columns] and a test sketch Z = [D_r Q | fresh columns];
3. makes one pass that touches each element once. The pass forms V, updates the weights and the
   first moment, and computes R X and Z^T R of the root R = sqrt(V). It is the root that has to be
   accurate, as the update is G / R;
4. computes D_r again, from the row sums of V that the pass found, finds the new factors by the
   generalised Nystrom method and keeps the best k columns (algebra.py);
5. lets the error ratio set the rank of the next step (Algorithm 2, equation 11).

A pass that writes nothing goes first in two cases: in the first steps, in which V is new
altogether, and where updates are clipped or guided, since their size has to be known before
anything is written. The test sketch of the second pass is then the basis that the first one found,
and the projection is exact.

A process that holds whole matrices computes alone. Processes that share matrices run the same
computation and exchange what :mod:`adapprox_ds.adapprox.collectives` lists. Blocks of one shape and
one rank form a stack and are computed together. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

from adapprox_ds.adapprox import algebra, kernels, small
from adapprox_ds.adapprox.collectives import Alone, Cut, Together
from adapprox_ds.adapprox.fragment import Fragment
from adapprox_ds.adapprox.hyperparameters import Hyperparameters
from adapprox_ds.adapprox.kernels import tiles
from adapprox_ds.adapprox.kernels.interface import (
    Found,
    Passed,
    Past,
    Reduced,
    Runs,
    Sketches,
    Solved,
    Stack,
    StepScalars,
)
from adapprox_ds.adapprox.rank import rank_in_use
from adapprox_ds.adapprox.sketch import sketch_key, sketch_width
from adapprox_ds.core.nonfinite import GradientCheck
from adapprox_ds.core.peers import Peers
from adapprox_ds.core.rounding import rounding_salt

#: The most bytes of sketches, bases and projections that a wave holds at once: on a CPU, and on
#: other devices, where launches are the cost. There it is a byte for so many elements, if that is
#: more.
_WAVE_BYTES, _DEVICE_WAVE_BYTES, _WAVE_SHARE = 24 << 20, 128 << 20, 8
#: The number of first steps, in which V is new altogether: a pass that only finds the basis goes
#: before the pass that updates.
FIRST_STEPS = 2


def step_scalars(h: Hyperparameters, t: int) -> StepScalars:
    """The numbers of step ``t`` that every element's update needs; ``t`` is 1 at the first step."""
    first_correction, correction = h.corrections(t)
    return StepScalars(
        beta1=h.betas[0],
        beta2=h.betas[1],
        correction=correction,
        first_correction=first_correction,
        eps=h.least_denominator,
        lr=h.learning_rate,
        weight_decay=h.weight_decay,
        ascend=h.maximize,
        of_gradients=h.momentum == "gradient",
        nesterov=h.nesterov,
        largest=h.largest_quotient(t),
        salt=rounding_salt(t),
        weight_salt=h.weight_salt(t),
    )


def update(
    fragments: Sequence[Fragment], t: int, h: Hyperparameters, check: GradientCheck | None = None
) -> None:
    """One step for fragments that this process computes without others.

    Args:
        fragments: fragments that lie on one device and whose factors have one dtype. Their weights,
            moments and factors are updated, and their ``errors`` are set to the error ratios.
        t: the number of the step, 1 at the first.
        h: the settings, which are those of all fragments.
        check: is asked for permission before anything is written; None where nothing is checked.

    Raises:
        NonfiniteGradientError: the check found gradients that are not finite.
    """
    # Fragments of one stack stand together, so that as few stacks as possible are cut by waves.
    fragments = sorted(fragments, key=lambda f: f.stack_key)
    if not fragments:
        return
    like = torch.empty(0, dtype=fragments[0].dtype, device=fragments[0].device)
    most = _most_bytes(like.device, sum(f.numel for f in fragments))
    for wave in _waves(fragments, [_bytes(f, h) for f in fragments], most):
        _Wave(wave, [f.numel for f in wave], Alone(), t, h, like).run(check)


def update_together(
    fragments: Sequence[Fragment],
    peers: Peers,
    like: Tensor,
    t: int,
    h: Hyperparameters,
    check: GradientCheck | None = None,
) -> None:
    """One step for the parameters that ZeRO cut, each of whose matrices is factored as a whole.

    This is a collective call: every process of the group makes it.

    Args:
        fragments: this process's fragments of one shard. Those of parameters that are not cut are
            passed over.
        peers: the group of processes over which the shard's parameters are partitioned.
        like: a tensor on the shard's device, of the dtype to compute in.
        t: the number of the step, 1 at the first.
        h: the settings, which are those of all fragments.
        check: as for :func:`update`; its answer is the same on all processes.

    Raises:
        NonfiniteGradientError: the check found gradients that are not finite.
        RuntimeError: the processes' copies of a matrix's factors or rank differ.
    """
    held = {f.layout.fragment.name: f for f in fragments}
    cuts = Cut.all_of(peers, h)
    # Of a matrix of which each process holds some rows, only what has one entry a column has its
    # full size here.
    sizes = [2 * c.cols * (c.width + c.tests) * like.element_size() for c in cuts]
    most = _most_bytes(like.device, sum(c.parameter.numel for c in cuts) // peers.world)
    for wave in _waves(cuts, sizes, most):
        units = [held.get(c.parameter.name) for c in wave]
        link = Together(wave, peers, like, h.shards_u, t)
        _Wave(units, [c.parameter.numel for c in wave], link, t, h, like).run(check)


class _Wave:
    """The units that a step computes together; a step takes its units in waves.

    A unit is what is clipped as one: a fragment that this process computes alone, or a parameter
    whose fragments lie on several processes. Waves bound the memory that a step needs beside the
    state.

    Args:
        units: this process's fragment of each unit; None where it holds none of the parameter.
        numels: the number of elements of each unit, over all processes.
        link: what this process exchanges with others.
        t: the number of the step.
        h: the settings.
        like: a tensor on the units' device, of the dtype to compute in.
    """

    def __init__(
        self,
        units: Sequence[Fragment | None],
        numels: Sequence[int],
        link: Alone,
        t: int,
        h: Hyperparameters,
        like: Tensor,
    ) -> None:
        self.numels, self.link, self.t, self.h, self.like = numels, link, t, h, like
        held = [(i, f) for i, f in enumerate(units) if f is not None]

        def key(unit: tuple[int, Fragment]) -> tuple:
            return (*unit[1].stack_key, link.kind(unit[0]))

        blocks = sorted((unit for unit in held if unit[1].block is not None), key=key)
        self.stacks = [_Stack(list(alike), t, h) for _, alike in groupby(blocks, key)]
        of_runs = [(i, f) for i, f in held if f.dense]
        self.runs = _runs([f for _, f in of_runs]) if of_runs else None
        self.run_units = [i for i, f in of_runs for _ in f.dense]

    def run(self, check: GradientCheck | None) -> None:
        """Do the step of these units.

        Raises:
            NonfiniteGradientError: the check found gradients that are not finite.
        """
        h, s, link = self.h, step_scalars(self.h, self.t), self.link
        stacks, backends = self.stacks, [x.backend for x in self.stacks]
        grams = small.grams([(x.q, x.first) for x in stacks], backends)
        of_q = link.sum_small(stacks, [x.flatten(1) for x in grams], lambda cut: cut.most**2)
        pasts = [
            x.past(gram_q, u)
            for x, gram_q, u in zip(stacks, of_q, link.whole_u(stacks), strict=True)
        ]
        made = small.sketches(pasts, backends)
        for x, past, sketches in zip(stacks, pasts, made, strict=True):
            x.begin(past, sketches)
        del grams, of_q, pasts, made  # memory that the step does not need any more
        if check is not None:
            check.require()
        twice = self.t <= FIRST_STEPS or h.clips or h.guided
        if twice:
            passed = kernels.run([x.stack for x in stacks], self.runs, s, write=False)
            if h.clips or h.guided:
                self._clip(passed, s)
            self._join_rows(passed)
            of_y = [x.gram_y() for x in stacks]
            sums = link.sum_small(stacks, of_y, lambda cut: cut.width**2)
            for x, gram in zip(stacks, sums, strict=True):
                x.test_by_basis(gram)
        passed = kernels.run([x.stack for x in stacks], self.runs, s, write=True)
        if not twice:
            self._join_rows(passed)
        for x, reduced in zip(stacks, passed.stacks, strict=True):
            x.take(reduced)
        del passed
        for x, p in zip(stacks, link.own_columns(stacks, [x.found.p for x in stacks]), strict=True):
            x.found.p = p
        products = small.products([x.found for x in stacks], backends)
        of_s = [s for _, s in products]
        if link.sharded:
            # Each process has the part of S that belongs to its columns.
            together = [torch.cat([of, s.flatten(1)], dim=1) for of, s in products]
        else:
            together = [of for of, _ in products]
        sums = link.sum_small(stacks, together, lambda cut: cut.products(link.sharded))
        if link.sharded:
            of_s = [of[:, -s[0].numel() :].view_as(s) for of, s in zip(sums, of_s, strict=True)]
        solved = [x.solved(*of) for x, *of in zip(stacks, sums, of_s, strict=True)]
        for x, errors in zip(stacks, small.refactor(solved, backends), strict=True):
            x.end(errors)

    def _join_rows(self, passed: Passed) -> None:
        """Keep what a pass found of the rows; of a row that ZeRO cut, each process has a part."""
        shares = []
        for x, reduced in zip(self.stacks, passed.stacks, strict=True):
            x.found.y = reduced.y
            shares.append(reduced.row_energies * x.found.row_scale)
        self.link.join_rows(self.stacks, [x.found.y for x in self.stacks], shares)
        for x, share in zip(self.stacks, shares, strict=True):
            x.found.shares = share

    def _clip(self, passed: Passed, s: StepScalars) -> None:
        """Set what each unit's update is divided by (Algorithm 3, line 9, and ``guidance``)."""
        h, like = self.h, self.like
        places = _on(self.run_units, torch.int64, like)
        of_stacks = [_on(x.numbers, torch.int64, like) for x in self.stacks]
        clip = like.new_ones(len(self.numels))
        if h.clips:
            squares = torch.zeros_like(clip)
            for reduced, at in zip(passed.stacks, of_stacks, strict=True):
                squares.index_add_(0, at, reduced.squares.to(like.dtype))
            if self.runs is not None:
                squares.index_add_(0, places, passed.squares.to(like.dtype))
            limits = _on([n * h.clip_threshold**2 for n in self.numels], like.dtype, like)
            clip = (self.link.sum_units(squares) / limits).sqrt_().clamp_(min=1.0)
        if h.guided:
            terms = like.new_zeros(len(self.numels), 3)
            for x, at in zip(self.stacks, of_stacks, strict=True):
                terms.index_add_(0, at, tiles.agreement(x.stack, s).to(like.dtype))
            if self.runs is not None:
                terms.index_add_(0, places, tiles.run_agreement(self.runs, s).to(like.dtype))
            clip = clip / algebra.guidance(terms)
        for x, at in zip(self.stacks, of_stacks, strict=True):
            x.stack.clip = clip[at]
        if self.runs is not None:
            self.runs.clip = clip[places]


class _Stack:
    """B blocks that a step computes together: they have one shape, one rank and are cut alike.

    The letters of shapes are: m local rows and n columns of a block, w columns of the sketch, t
    columns of the test sketch, k columns of the factors.

    Args:
        units: for each block the index of its unit in the wave, and its fragment.
        t: the number of the step.
        h: the settings.

    Attributes:
        stack: what the pass is given; there is none after the pass that writes.
        found: what was found so far. Its fields are filled in as the step goes on.
    """

    stack: Stack
    found: Found

    def __init__(self, units: list[tuple[int, Fragment]], t: int, h: Hyperparameters) -> None:
        self.numbers = [i for i, _ in units]
        self.fragments = [f for _, f in units]
        self.factors = [f.factors for f in self.fragments if f.factors is not None]
        self.blocks = [f.block for f in self.fragments if f.block is not None]
        self.t, self.h, self.dtype = t, h, self.fragments[0].dtype
        self.rank = rank_in_use(self.factors[0].rank)
        block, kept = self.blocks[0], self.factors[0].q
        #: The number of rows of the matrix that is factored, and the first local row that this
        #: process counts in sums over the processes: not one that began on another process.
        self.matrix_rows, self.first = block.matrix_rows or block.rows, int(block.skip > 0)
        #: The global row index of the first local row in the matrix that is factored.
        self.first_row = block.first_row if block.matrix_rows else 0
        self.width = sketch_width(self.rank, h.oversampling, self.matrix_rows, block.cols)
        self.tests = min(self.rank + h.test_oversampling, self.matrix_rows)
        columns = (kept.shape[1], self.width, self.tests)
        self.backend = small.backend_of(columns, self.dtype, kept, h)
        self.q = torch.stack([f.q for f in self.factors]).to(self.dtype)

    def past(self, gram_q: Tensor, u: Tensor) -> Past:
        """What the sketches are made of.

        Args:
            gram_q: Q^T Q over all rows of the matrix, (B, k^2), fp64.
            u: all rows of U, (B, n, k).
        """
        k, firsts = u.shape[2], [0 if b.matrix_rows else b.first_row for b in self.blocks]
        of_x, of_z = (
            [
                sketch_key(self.h.seed, b.name, first, t)
                for b, first in zip(self.blocks, firsts, strict=True)
            ]
            for t in (self.t, -self.t)
        )
        return Past(
            q=self.q,
            u=u.to(self.dtype),
            gram_q=gram_q.view(-1, k, k),
            keys=(of_x, of_z),
            width=self.width,
            tests=self.tests,
            first=self.first_row,
            rows=self.matrix_rows,
            floor=float(self.h.floor or 0.0),
        )

    def begin(self, past: Past, made: Sketches) -> None:
        """Fill in ``stack`` and, as far as it is known, ``found``."""
        block, first, none = self.blocks[0], self.fragments[0], made.z[:, :, :0]
        means = None if first.m is None else [f.block_means for f in self.fragments]
        lost = [f.elements(f.compensation) for f in self.fragments if f.compensation is not None]
        self.stack = Stack(
            rows=block.rows,
            cols=block.cols,
            skip=block.skip,
            missing=block.missing,
            w=[f.elements(f.w) for f in self.fragments],
            m=means,
            g=[f.elements(f.g) for f in self.fragments],
            first=[b.first_row * b.cols + b.skip for b in self.blocks],
            q=past.q,
            u=past.u,
            floor_rows=made.floor_rows,
            floor_cols=made.floor_cols,
            col_squares=made.col_squares,
            x=made.x,
            z=made.z,
            compensation=lost or None,
        )
        rows = block.u_rows
        self.found = Found(
            y=none,
            z=made.z,
            p=none,
            energies=none,
            shares=none,
            row_squares=made.row_squares,
            row_scale=made.row_scale,
            col_squares=made.col_squares if rows is None else made.col_squares[:, slice(*rows)],
            first=self.first,
        )

    def take(self, reduced: Reduced) -> None:
        """Keep what the pass that writes computed, and free what only that pass needed."""
        assert self.stack.z is not None
        self.found.p, self.found.energies = reduced.p, reduced.row_energies
        self.found.z = self.stack.z
        del self.stack

    def gram_y(self) -> Tensor:
        """G of algebra.py's equation 3 for the local rows that count here, (B, w^2), fp64."""
        y = self.found.y[:, self.first :].double()
        squares = algebra.row_squares(self.found)[:, self.first :, None]
        return (y.mT @ (y * squares)).flatten(1)

    def test_by_basis(self, gram: Tensor) -> None:
        """Take an orthonormal basis of Y as test sketch, so that the next pass projects exactly.

        Args:
            gram: G over all rows of the matrix, (B, w^2), fp64.
        """
        y, weights = self.found.y, algebra.row_squares(self.found)[..., None]
        basis = algebra.unit_basis(gram.view(-1, self.width, self.width))
        self.stack.x, self.stack.z = None, (y.double() @ basis * weights).to(self.dtype)

    def solved(self, sums: Tensor, s: Tensor) -> Solved:
        """What the new factors are made of, and where they go.

        Args:
            sums: :attr:`Solved.sums`.
            s: :attr:`Solved.s`.
        """
        first_u = (self.blocks[0].u_rows or (0, 0))[0]
        for f in self.factors:
            f.change_rank(self.rank)
        return Solved(
            y=self.found.y,
            p=self.found.p,
            sums=sums,
            s=s,
            rank=self.rank,
            q=[f.q for f in self.factors],
            u=[f.u for f in self.factors],
            first=(self.first_row, self.matrix_rows + first_u),
            salt=rounding_salt(~self.t),
        )

    def end(self, errors: Tensor) -> None:
        """Keep each block's error ratios: (B, 1), or (B, k) if the rank policy needs them all."""
        for fragment, error in zip(self.fragments, errors, strict=True):
            fragment.errors = [error]


def _runs(fragments: Sequence[Fragment]) -> Runs:
    """The dense runs of some fragments, in order, as the pass takes them."""
    means = None
    if fragments[0].m is not None:
        means = [m for f in fragments for m in f.mean_runs]
    lost = [x for f in fragments if f.compensation is not None for x in f.runs(f.compensation)]
    return Runs(
        w=[w for f in fragments for w in f.runs(f.w)],
        m=means,
        g=[g for f in fragments for g in f.runs(f.g)],
        v=[v for f in fragments for v in f.dense],
        first=[run.start for f in fragments for run in f.layout.runs],
        compensation=lost or None,
    )


def _bytes(f: Fragment, h: Hyperparameters) -> int:
    """How many bytes a step of a fragment needs beside the state.

    A block needs sketches and projections, dense runs a copy of themselves.
    """
    size = sum(v.nbytes for v in f.dense)
    if f.block is not None and f.factors is not None:
        width = 2 * rank_in_use(f.factors.rank) + h.oversampling + h.test_oversampling
        size += 2 * (f.block.rows + f.block.cols) * width * f.dtype.itemsize
    return size


T = TypeVar("T")


def _most_bytes(device: torch.device, numel: int) -> int:
    """The most bytes of a wave of units with so many elements on a device."""
    if device.type == "cpu":
        return _WAVE_BYTES
    return max(_DEVICE_WAVE_BYTES, numel // _WAVE_SHARE)


def _waves(units: Sequence[T], sizes: Sequence[int], most: int) -> Iterator[list[T]]:
    """Split units, in order, into waves of at most ``most`` bytes, or of a single unit.

    Args:
        units: what to split.
        sizes: the bytes that each unit needs beside the state.
        most: the most bytes of a wave.
    """
    wave: list[T] = []
    held = 0
    for unit, size in zip(units, sizes, strict=True):
        if wave and held + size > most:
            yield wave
            wave, held = [], 0
        wave.append(unit)
        held += size
    if wave:
        yield wave


def _on(numbers: Sequence[float], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Copy numbers of the host to the device of ``like``, without waiting for it."""
    values = torch.tensor(numbers, dtype=dtype, device="cpu")
    if like.device.type != "cpu":
        values = values.pin_memory().to(like.device, non_blocking=True)
    return values
