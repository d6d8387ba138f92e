# SPDX-License-Identifier: Apache-2.0
"""Ranks that step together agree on kernels, once, so that none takes another backend.

Triton's kernels are checked on each rank's own device (kernels/self_check.py), and a device or a
compiler can fail on one rank alone. So each rank checks all forms that its steps can ever take, as
ranks of matrices change, and tells the others what failed; torch takes that everywhere. All ranks
of a process group do so in their first step, whether they hold something of a form or nothing, and
no later step asks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from adapprox_ds import kernels
from adapprox_ds.kernels import self_check
from adapprox_ds.kernels.interface import Runs, Stack
from adapprox_ds.lowrank.rank import max_saving_rank, rank_in_use
from adapprox_ds.lowrank.sketch import sketch_width
from adapprox_ds.optim.fragment import Fragment
from adapprox_ds.optim.hyperparameters import Hyperparameters
from adapprox_ds.optim.shards import ShardLayouts
from adapprox_ds.optim.step import FIRST_STEPS, step_scalars

#: Columns that a kernel takes at once, where there are more than half as many.
_SLICE = 32


def settle(check: Callable[[], Any], devices: Iterable[torch.device], table: ShardLayouts) -> None:
    """Check this rank's kernels and agree on them with others; collective in the first step.

    Does nothing where nobody steps together, or where they agreed before.

    Args:
        check: looks at all forms that this rank's steps can take.
        devices: that it steps on.
        table: of the optimizer.
    """
    if table.ranks is None or table.agreed is not None:
        return
    world = distributed.get_world_size(table.ranks)
    table.agreed = world > 1
    if world == 1:
        return
    choices = {kernels.chosen(device, "native") for device in devices}
    mine: dict[str, str] = {}
    if choices - {"triton"}:
        # A rank that has no such kernels would step otherwise than those that do.
        asked = os.environ.get(kernels.VARIABLE, "auto")
        mine = {self_check.EVERY: f"{min(choices - {'triton'})} is taken, of {asked}"}
    elif choices and not kernels.is_forced():
        check()
        mine = self_check.failures()
    told: list[Any] = [None] * world
    distributed.all_gather_object(told, mine, group=table.ranks)
    if kernels.is_forced():
        return
    for rank, failed in zip(distributed.get_process_group_ranks(table.ranks), told, strict=True):
        self_check.give_up({form: f"on rank {rank}: {why}" for form, why in failed.items()})


def check_passes(work: Sequence[tuple[Hyperparameters, Sequence[Fragment], int]]) -> None:
    """Check every form of a kernel that steps of some fragments can take, at any rank.

    Args:
        work: the settings, this rank's fragments and the number of their next step.
    """
    for h, fragments, t in work:
        if not h.warm_start:
            continue
        s, seen = step_scalars(h, t), set()
        for f in fragments:
            for stack, write in _stacks(f, h, t):
                # Everything that a kernel's form is made of.
                of = [getattr(stack, name) for name in ("q", "x", "z")]
                wide = tuple(0 if x is None else x.shape[2] for x in of)
                means = [] if stack.m is None else stack.m[0]
                kinds = (stack.w[0].dtype, stack.g[0].dtype, *map(_kind, means), stack.cols)
                if (*wide, *kinds, write) not in seen:
                    seen.add((*wide, *kinds, write))
                    _check([stack], None, s, write)
        runs = [f for f in fragments if f.dense]
        twice = t <= FIRST_STEPS or h.clips or h.guided
        for f in runs:
            for write in (False, True) if twice else (True,):
                _check([], _runs(f), s, write)


def _check(stacks: list[Stack], runs: Runs | None, s: Any, write: bool) -> None:
    if kernels.backend(stacks, runs) == "triton":
        self_check.takes(stacks, runs, s, write)


def _kind(m: Any) -> Any:
    return m.dtype if isinstance(m, Tensor) else m.codes.dtype


def _runs(f: Fragment) -> Runs:
    m = None if f.m is None else f.mean_runs
    rest = None if f.compensation is None else f.runs(f.compensation)
    return Runs(f.runs(f.w), m, f.runs(f.g), f.dense, [0] * len(f.dense), compensation=rest)


def _stacks(f: Fragment, h: Hyperparameters, t: int) -> Iterator[tuple[Stack, bool]]:
    """What passes are given of a fragment's block, and whether they write.

    Their columns are of each number of slices that the rank of the factors, and of the sketches
    that make the next ones, can have.
    """
    block = f.block
    if block is None:
        return
    rows, cols = block.matrix_rows or block.rows, block.cols
    control, bound = h.rank_control, max_saving_rank(rows, cols)
    low, high = (int(control.clip(end, bound)) for end in (0, bound))
    held, rank = f.factors[0].q.shape[1], rank_in_use(f.factors[0].rank)
    factors = {k: -(-k // _SLICE) + (k > _SLICE // 2) for k in {held, rank, *range(low, high + 1)}}
    news: dict[tuple, tuple[int, int, int]] = {}
    for k in {rank, *range(max(1, low), high + 1)}:
        width = sketch_width(k, h.oversampling, rows, cols)
        tests = min(k + h.test_oversampling, rows)
        slices = [(-(-x // _SLICE), x > _SLICE // 2) for x in (width, tests)]
        news.setdefault((*slices, abs(k - rank) <= control.step), (k, width, tests))
    olds = {slices: k for k, slices in factors.items()}.values()
    always = h.clips or h.guided
    for k in {*olds, held, rank}:
        for new, width, tests in news.values():
            # The first steps are not far from where the rank is now.
            near = k in (held, rank) and abs(new - rank) <= control.step
            if always or (t <= FIRST_STEPS and near):
                yield _stack(f, k, width, tests), False
                yield _stack(f, k, 0, width), True
            if not always:
                yield _stack(f, k, width, tests), True


def _stack(f: Fragment, k: int, width: int, tests: int) -> Stack:
    """A stack of a fragment's block whose operands have but shapes."""
    assert f.block is not None
    rows, cols = f.block.rows, f.block.cols

    def empty(*shape: int) -> Tensor:
        return torch.empty((), dtype=f.dtype, device=f.device).expand(shape)

    return Stack(
        rows=rows,
        cols=cols,
        skip=f.block.skip,
        missing=f.block.missing,
        w=[f.elements(f.w)],
        m=None if f.m is None else [f.block_means],
        g=[f.elements(f.g)],
        first=[0],
        q=empty(1, rows, k),
        u=empty(1, cols, k),
        floor_rows=None,
        floor_cols=None,
        col_squares=empty(1, cols),
        x=empty(1, cols, width) if width else None,
        z=empty(1, rows, tests) if tests else None,
        compensation=None if f.compensation is None else [f.elements(f.compensation)],
    )
