# SPDX-License-Identifier: Apache-2.0
"""Goes through the forms of kernels that steps of Adapprox can need as matrices' ranks change.

Processes that step together check all forms in their first step (core/agreement.py), even those
that their own shards do not need.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.adapprox import kernels
from adapprox_ds.adapprox.fragment import Fragment
from adapprox_ds.adapprox.hyperparameters import Hyperparameters
from adapprox_ds.adapprox.kernels import forms
from adapprox_ds.adapprox.kernels.interface import Runs, Stack
from adapprox_ds.adapprox.rank import rank_in_use
from adapprox_ds.adapprox.sketch import sketch_width
from adapprox_ds.adapprox.small import backend_of
from adapprox_ds.adapprox.step import FIRST_STEPS, step_scalars

#: The number of columns that a kernel takes at once, if there are more than half as many.
_SLICE = 32


def check_passes(work: Sequence[tuple[Hyperparameters, Sequence[Fragment], int]]) -> None:
    """Check every form of a kernel that steps of some fragments can need, at any rank.

    Args:
        work: for each group its settings, its fragments on this process, and the number of the
            next step.
    """
    for h, fragments, t in work:
        if not h.warm_start:
            continue
        s, seen = step_scalars(h, t), set()
        for f in fragments:
            for stack, write in _stacks(f, h, t):
                # All that the form of a kernel depends on.
                of = [getattr(stack, name) for name in ("q", "x", "z")]
                wide = tuple(0 if x is None else x.shape[2] for x in of)
                means = [] if stack.m is None else stack.m[0]
                kinds = (stack.w[0].dtype, stack.g[0].dtype, *map(_kind, means), stack.cols)
                if (*wide, *kinds, write) not in seen:
                    seen.add((*wide, *kinds, write))
                    _check([stack], None, s, write)
                    if stack.x is not None and f.factors is not None:
                        backend_of(wide, f.dtype, f.factors.q, h)
        runs = [f for f in fragments if f.dense]
        twice = t <= FIRST_STEPS or h.clips or h.guided
        for f in runs:
            for write in (False, True) if twice else (True,):
                _check([], _runs(f), s, write)


def _check(stacks: list[Stack], runs: Runs | None, s: Any, write: bool) -> None:
    if kernels.backend(stacks, runs) == "triton":
        forms.takes(stacks, runs, s, write)


def _kind(m: Any) -> Any:
    return m.dtype if isinstance(m, Tensor) else m.codes.dtype


def _runs(f: Fragment) -> Runs:
    m = None if f.m is None else f.mean_runs
    rest = None if f.compensation is None else f.runs(f.compensation)
    return Runs(f.runs(f.w), m, f.runs(f.g), f.dense, [0] * len(f.dense), compensation=rest)


def _stacks(f: Fragment, h: Hyperparameters, t: int) -> Iterator[tuple[Stack, bool]]:
    """Yield the stacks of a fragment's block that passes can get, and whether they write.

    There is one for each number of slices that the columns of the factors, and those of the
    sketches for the next factors, can have.
    """
    block = f.block
    if block is None or f.factors is None:
        return
    rows, cols = block.matrix_rows or block.rows, block.cols
    control, bound = h.rank_control, block.rank_bound
    low, high = (int(control.clip(end, bound)) for end in (0, bound))
    held, rank = f.factors.q.shape[1], rank_in_use(f.factors.rank)
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
            # In the first steps the rank is still near its present value.
            near = k in (held, rank) and abs(new - rank) <= control.step
            if always or (t <= FIRST_STEPS and near):
                yield _stack(f, k, width, tests), False
                yield _stack(f, k, 0, width), True
            if not always:
                yield _stack(f, k, width, tests), True


def _stack(f: Fragment, k: int, width: int, tests: int) -> Stack:
    """A stack of a fragment's block, whose operands have shapes but no memory."""
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
