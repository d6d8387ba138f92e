# SPDX-License-Identifier: Apache-2.0
"""The forms of Triton's kernels that a pass takes, and an example of each for the self-check.

:mod:`adapprox_ds.core.kernels.self_check` says when the example is run and what follows. It is made
of seeded random numbers, never of the step's own: in a first step the factors and the first moment
are zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.adapprox.kernels import tiles
from adapprox_ds.adapprox.kernels.interface import Mean, Runs, Stack, StepScalars
from adapprox_ds.adapprox.quantized import QuantizedMatrix
from adapprox_ds.core.kernels.self_check import Form, differing, is_right
from adapprox_ds.core.rounding import is_rounded, load_weights, rounding_salt, weight_salt

#: Rows and columns of the example: more than one tile of any kernel, and more than one walk.
_ROWS, _COLS, _RUN = 70, (528, 531), 1500


def takes(stacks: Sequence[Stack], runs: Runs | None, s: StepScalars, write: bool) -> bool:
    """Whether every kernel that a pass needs is right on its device.

    Only shapes are looked at of a stack's operands but weights, gradients and first moments.
    """
    right = True
    for stack in stacks:
        wide = [0 if x is None else x.shape[2] for x in (stack.q, stack.x, stack.z)]
        mean = None if stack.m is None else stack.m[0][0]
        rest = stack.compensation is not None
        form = _form("matrices", stack.g[0], stack.w[0], mean, rest, s, write)
        triton_pass = import_module("adapprox_ds.adapprox.kernels.triton_pass")
        long = triton_pass.is_long(stack)
        key = (*form, "slices", *triton_pass.slices_of(*wide).values(), *["long"] * long)

        def compare(
            wide: list[int] = wide, like: Stack = stack, mean: Any = mean, long: bool = long
        ) -> str | None:
            kept = like.compensation is not None
            kinds = (like.g[0].dtype, like.w[0].dtype, _kind(mean), like.g[0].device, kept)
            for cols in _COLS:
                found = [_stack(wide, cols, *kinds) for _ in range(2)]
                reason = _compare(list(found), [None, None], s, write, long)
                if reason is not None:
                    return f"{reason} of ({_ROWS}, {cols})"
            return None

        right = is_right(key, compare) and right
    for g, w, mean in _kinds_of(runs):
        rest = runs is not None and runs.compensation is not None
        form = _form("runs", g, w, mean, rest, s, write)

        def compare_runs(
            g: Tensor = g, w: Tensor = w, mean: Any = mean, rest: bool = rest
        ) -> str | None:
            kinds = (g.dtype, w.dtype, _kind(mean), g.device, rest)
            found = [_runs(*kinds) for _ in range(2)]
            return _compare([None, None], found, s, write, False)

        right = is_right(form, compare_runs) and right
    return right


def _form(
    what: str, g: Tensor, w: Tensor, mean: Mean | None, rest: bool, s: StepScalars, write: bool
) -> Form:
    """Of tensors as they are: a pass that only looks has but gradients."""
    if not write:
        return (str(g.device), what, g.dtype, None, None, "updates", "reads")
    kinds: list[Any] = [g.dtype, w.dtype, _kind(mean)]
    if is_rounded(w.dtype):
        kinds.append("compensated" if rest else "alone")
        kinds.append("to nearest" if s.weight_salt is None else "at random")
    return (str(g.device), what, *kinds, "gradients" if s.of_gradients else "updates", "writes")


def _kind(mean: Mean | None) -> torch.dtype | None:
    if isinstance(mean, QuantizedMatrix):
        return mean.codes.dtype
    return None if mean is None else mean.dtype


def _kinds_of(runs: Runs | None) -> list[tuple[Tensor, Tensor, Mean | None]]:
    """A run of each kind."""
    if runs is None:
        return []
    means: Sequence[Mean | None] = [None] * len(runs.g) if runs.m is None else runs.m
    all_runs = zip(runs.g, runs.w, means, strict=True)
    return list({(g.dtype, w.dtype, _kind(m)): (g, w, m) for g, w, m in all_runs}.values())


class _Numbers:
    """The same random numbers for either backend, on a device."""

    def __init__(self, device: torch.device) -> None:
        self.random, self.device = torch.Generator("cpu").manual_seed(0), device

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        x = torch.randn(*shape, generator=self.random, device="cpu", dtype=torch.float32)
        return x.to(self.device, dtype)

    def gradients(self, numel: int, dtype: torch.dtype) -> Tensor:
        """None near zero, where quotients show rounding."""
        x = self(numel)
        return (x + x.sign() / 2).to(dtype)

    def rest(self, numel: int) -> Tensor:
        """A compensation."""
        return (64 * self(numel)).clamp(-128, 127).to(torch.int8)

    def mean(self, rows: int, cols: int, kind: torch.dtype | None) -> Mean | None:
        if kind is None:
            return None
        if kind in (torch.int8, torch.uint8):
            return QuantizedMatrix.of(self(rows, cols), 8 if kind == torch.int8 else 4)
        return self(rows, cols, dtype=kind)


def _stack(
    wide: Sequence[int], cols: int,
    g: torch.dtype, w: torch.dtype, mean: torch.dtype | None, device: torch.device,
    rest: bool = False,
) -> Stack:  # fmt: skip
    make = _Numbers(device)
    rank, width, tests = wide
    m = make.mean(_ROWS, cols, mean)
    return Stack(
        _ROWS, cols, 0, 0,
        w=[make(_ROWS * cols, dtype=w)],
        m=None if m is None else [[m]],
        g=[make.gradients(_ROWS * cols, g)],
        first=[0],
        q=make(1, _ROWS, rank),
        u=make(1, cols, rank) / max(1, rank) ** 0.5,
        floor_rows=make(1, _ROWS).abs(),
        floor_cols=make(1, cols).abs(),
        col_squares=make(1, cols).square(),
        x=make(1, cols, width) if width else None,
        z=make(1, _ROWS, tests) if tests else None,
        clip=1 + make(1).abs(),
        compensation=[make.rest(_ROWS * cols)] if rest else None,
    )  # fmt: skip


def _runs(
    g: torch.dtype,
    w: torch.dtype,
    mean: torch.dtype | None,
    device: torch.device,
    rest: bool = False,
) -> Runs:
    make = _Numbers(device)
    m = make.mean(1, _RUN, mean)
    means = None if m is None else [m]
    parts = [make(_RUN, dtype=w)], means, [make.gradients(_RUN, g)], [make(_RUN).square()]
    clip = 1 + make(1).abs()
    return Runs(*parts, [0], clip, [make.rest(_RUN)] if rest else None)


def _compare(
    stacks: Sequence[Stack | None],
    runs: Sequence[Runs | None],
    s: StepScalars,
    write: bool,
    long: bool,
) -> str | None:
    """What differs between Triton's pass over the first and torch's over the second, or None."""
    # An update that weights of any dtype show, whatever the schedule says.
    s = replace(s, lr=0.5, weight_decay=0.1, beta2=0.9, eps=1e-3, salt=rounding_salt(1))
    if s.weight_salt is not None:
        s = replace(s, weight_salt=weight_salt(1))
    triton_pass = import_module("adapprox_ds.adapprox.kernels.triton_pass")
    found = []
    for backend, stack, run in zip((triton_pass, tiles), stacks, runs, strict=True):
        own = {"long": long} if backend is triton_pass else {}
        passed = backend.run([] if stack is None else [stack], run, s, write, **own)
        results: dict[str, Tensor] = {}
        if stack is not None:
            (of,) = passed.stacks
            results |= {x: getattr(of, x) for x in ("y", "p", "row_energies", "squares")}
            mean = None if stack.m is None else stack.m[0][0]
            results |= _written(stack.w[0], stack.compensation, mean)
        if run is not None:
            results |= {"squares": passed.squares, "second moment": run.v[0]}
            mean = None if run.m is None else run.m[0]
            results |= _written(run.w[0], run.compensation, mean)
        found.append(results)
    return differing(*found)


def _written(w: Tensor, rest: list[Tensor] | None, m: Mean | None) -> dict[str, Tensor]:
    written = {"weights": w}
    if rest is not None:
        written["weights with their compensation"] = load_weights(w, rest[0], torch.float32)
    return written | ({} if m is None else {"first moment": _dense(m)})


def _dense(m: Mean) -> Tensor:
    if isinstance(m, QuantizedMatrix):
        # Of few bits; as such it is compared.
        return m.load(0, len(m.codes), torch.float32).bfloat16()
    return m
