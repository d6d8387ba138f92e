# SPDX-License-Identifier: Apache-2.0
"""Cases for all backends of the pass, and one dense computation in fp64 to check them by.

Run as a program, this file checks the Triton kernels in Triton's interpreter, on the CPU: that has
to be chosen before Triton is first imported, so a test starts it as a process of its own.
"""

from __future__ import annotations

import json
import math
import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from adapprox_ds import Adapprox
from adapprox_ds.adapprox.kernels import tiles
from adapprox_ds.adapprox.kernels.interface import Mean, Passed, Runs, Stack, StepScalars, tiles_of
from adapprox_ds.adapprox.quantized import (
    GROUP,
    QuantizedMatrix,
    code_bytes,
    group_count,
    load_rows,
)
from adapprox_ds.core.kernels import backends
from adapprox_ds.core.rounding import is_rounded, load_weights, rounding_salt, weight_salt
from tests import interpreted
from tests.adapprox import cases_addresses, cases_small
from tests.core import cases_views
from tests.micro_adam import cases_windows

HALF, BRAIN, FULL, CODES = torch.float16, torch.bfloat16, torch.float32, torch.int8
#: Codes of 4 bits.
NIBBLES = torch.uint8
#: One unit in the last place: rounding may differ in direction (Triton's interpreter truncates).
#: Codes: of the largest of a group, the most that a rounded root can be off.
ROUNDING = {FULL: 1e-5, BRAIN: 2**-7, HALF: 2**-10, torch.float64: 1e-5, CODES: 1e-5, NIBBLES: 1e-5}


@dataclass(frozen=True)
class Case:
    """``b`` blocks, (m, n), with factors of rank k, w columns in x and t in z; and dense runs."""

    m: int
    n: int
    k: int
    w: int
    t: int
    b: int = 2
    skip: int = 0
    missing: int = 0
    runs: tuple[int, ...] = ()
    write: bool = True
    floor: bool = True
    moment: torch.dtype | None = FULL
    of_gradients: bool = True
    nesterov: bool = True
    clips: bool = True
    largest: float = 1.5
    ascend: bool = False
    eps: float = 1e-3
    dtype: torch.dtype = FULL  # of weights and gradients
    rounding: str = "nearest"  # of weights
    factors: torch.dtype = FULL
    separate: bool = False  # a flat tensor for each block, instead of one for all
    offset: int = 3  # elements before the first block of a flat tensor
    gap: int = 5  # elements behind each block
    transposed: bool = False  # operands stored column by column, one clip for all blocks
    device: str = "cpu"


class Data:
    """A case's stack, runs and numbers; what a pass updates lies amid NaN in flat tensors."""

    def __init__(self, c: Case) -> None:
        self.c = c
        self.random = torch.Generator().manual_seed(c.m * 1000 + c.n)
        self.s = StepScalars(
            beta1=0.8 if c.moment else 0.0,
            beta2=0.9,
            correction=1.25,
            first_correction=1.5 if c.moment else 1.0,
            eps=c.eps,
            lr=0.03,
            weight_decay=0.1,
            ascend=c.ascend,
            of_gradients=c.of_gradients,
            nesterov=c.nesterov,
            largest=c.largest,
            salt=rounding_salt(7),
            weight_salt=None if c.rounding == "nearest" else weight_salt(7),
        )
        #: All flat tensors, and the parts of them that a pass may write.
        self.flats: list[Tensor] = []
        self.written: list[Tensor] = []
        sizes = [c.m * c.n - c.skip - c.missing] * c.b
        w, g = self.flat(sizes), self.flat(sizes, grads=True)
        tiles = tiles_of(c.m, c.n, c.skip, c.missing)
        shapes = [(r.stop - r.start, col.stop - col.start) for r, col, _ in tiles]
        means = None
        if c.moment is not None:
            means = self.flat([self.mean_sizes(shapes)] * c.b, c.moment)
        floors = self.normal(c.b, c.m).abs(), self.normal(c.b, c.n).abs()
        self.stack = Stack(
            c.m, c.n, c.skip, c.missing, w, None, g, [1000 * i + c.skip for i in range(c.b)],
            q=self.operand(c.m, c.k),
            u=self.operand(c.n, c.k),
            floor_rows=self.on(floors[0]) if c.floor else None,
            floor_cols=self.on(floors[1]) if c.floor else None,
            col_squares=self.on(self.normal(c.b, c.n).abs()),
            x=self.operand(c.n, c.w) if c.w else None,
            z=self.operand(c.m, c.t) if c.t else None,
            compensation=self.rest(sizes),
        )  # fmt: skip
        if means is not None:
            self.stack.m = self.means(means, shapes)
        clips = self.on(1.7 + 0.4 * torch.arange(c.b + len(c.runs)))
        if c.clips:
            self.stack.clip = clips[:1].expand(c.b) if c.transposed else clips[: c.b]
        self.runs = None
        if c.runs:
            w, g, v = self.flat(c.runs), self.flat(c.runs, grads=True), self.flat(c.runs, c.factors)
            for x in v:
                x.abs_()
            kept = None
            if c.moment is not None:
                lengths = [self.mean_sizes([(1, size)]) for size in c.runs]
                means = zip(self.flat(lengths, c.moment), c.runs, strict=True)
                kept = [self.means([x], [(1, size)])[0][0] for x, size in means]
            firsts = [7 * i for i in range(len(c.runs))]
            clip = clips[c.b :] if c.clips else None
            self.runs = Runs(w, kept, g, v, firsts, clip, self.rest(c.runs))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    def on(self, x: Tensor) -> Tensor:
        return x.to(self.c.device, self.c.factors)

    def operand(self, rows: int, cols: int) -> Tensor:
        x = self.on(self.normal(self.c.b, rows, cols))
        return x.mT.contiguous().mT if self.c.transposed else x

    def rest(self, sizes: Sequence[int]) -> list[Tensor] | None:
        """Compensations of weights, where the case keeps them: any numbers of eight bits."""
        if self.c.rounding != "compensated" or not is_rounded(self.c.dtype):
            return None
        found = self.flat(sizes, CODES)
        for x in found:
            x.copy_(torch.randint(-128, 128, x.shape, generator=self.random))
        return found

    def flat(
        self, sizes: Sequence[int], dtype: torch.dtype | None = None, grads: bool = False
    ) -> list[Tensor]:
        """Tensors of random numbers, the last first in memory; NaN before and behind each."""
        c, dtype = self.c, dtype or self.c.dtype
        fill = 99 if dtype in (CODES, NIBBLES) else math.nan
        groups = [[size] for size in sizes] if c.separate else [list(sizes)]
        found = []
        for group in groups:
            numel = c.offset + sum(size + c.gap for size in group)
            flat = torch.full((numel,), fill, dtype=dtype, device=c.device)
            self.flats.append(flat)
            at = c.offset
            for size in reversed(group):
                part = flat[at : at + size]
                part.copy_(self.gradients(size) if grads else self.normal(size))
                at += size + c.gap
                if not grads:
                    self.written.append(part)
                found.append(part)
        return found if c.separate else found[::-1]

    def gradients(self, size: int) -> Tensor:
        g = self.normal(size).sign() * (0.1 + self.normal(size).abs())
        if not self.c.write or (self.c.eps > 0 and not self.c.of_gradients):
            # With a mean of gradients, fp32 would show in the quotients where S is small too.
            g[torch.rand(size, generator=self.random) < 0.1] = 0.0
        return g

    def means(self, flats: list[Tensor], shapes: list[tuple[int, int]]) -> list[list[Mean]]:
        """The first moments of tiles that lie end to end."""
        found: list[list[Mean]] = []
        counts = [r * group_count(n) for r, n in shapes]
        bits = {CODES: 8, NIBBLES: 4}.get(self.c.moment or FULL)
        scales = self.flat([sum(counts)] * len(flats), FULL) if bits else flats
        for flat, scale in zip(flats, scales, strict=True):
            parts = flat.split([r * (code_bytes(n, bits) if bits else n) for r, n in shapes])
            found.append([x.view(r, -1) for x, (r, _) in zip(parts, shapes, strict=True)])
            if bits:
                views = zip(found[-1], scale.split(counts), shapes, strict=True)
                found[-1] = [QuantizedMatrix(x, y.view(r, -1), n) for x, y, (r, n) in views]
                for m in found[-1]:
                    made = QuantizedMatrix.of(self.normal(len(m), m.cols), bits)
                    m.codes.copy_(made.codes)
                    m.scales.copy_(made.scales)
        return found

    def mean_sizes(self, shapes: Sequence[tuple[int, int]]) -> int:
        """Elements of what the first moments of some matrices, end to end, are kept in."""
        bits = 4 if self.c.moment == NIBBLES else 8
        return sum(rows * code_bytes(cols, bits) for rows, cols in shapes)


def values(means: Sequence[Mean]) -> Tensor:
    """Of first moments, one after the other, fp64."""
    parts = [
        load_rows(m, 0, len(m), torch.float32 if isinstance(m, QuantizedMatrix) else m.dtype)
        for m in means
    ]
    return torch.cat([x.flatten().double() for x in parts])


def dense(d: Data) -> dict[str, list[Tensor]]:
    """What the pass should make of the data, by the formulas of kernels/interface.py, in fp64."""
    s, c, found = d.s, d.c, {}

    def add(**tensors: Tensor) -> None:
        for name, x in tensors.items():
            found.setdefault(name, []).append(x)

    def update(w: Tensor, m: Tensor | None, g: Tensor, v: Tensor, clip: Tensor | None) -> None:
        denominator = v.sqrt() * s.correction + s.eps
        clip = torch.ones_like(v[0]) if clip is None else clip.double()
        signed = -g if s.ascend else g
        x = torch.where(g == 0, 0.0, signed / denominator)
        step = x / clip
        if m is not None:
            new = signed if s.of_gradients else step
            m = s.beta1 * m + (1 - s.beta1) * new
            step = s.beta1 * m + (1 - s.beta1) * new if s.nesterov else m
            if s.of_gradients:
                step = (step / denominator).clamp(-s.largest, s.largest) / clip
            step = s.first_correction * step
            add(m=m)
        add(w=w * (1 - s.lr * s.weight_decay) - s.lr * step, squares=(x**2).sum() * (not c.write))

    x = d.stack
    for i in range(c.b):
        held = torch.zeros(c.m * c.n, dtype=torch.bool, device=c.device)
        held[c.skip : c.m * c.n - c.missing] = True
        root = (x.q[i].double() @ x.u[i].double().T).clamp(min=0)
        if x.floor_rows is not None and x.floor_cols is not None:
            root = root.maximum(torch.outer(x.floor_rows[i].double(), x.floor_cols[i].double()))
        g = torch.zeros(c.m * c.n, dtype=torch.float64, device=c.device)
        g[held] = x.g[i].double()
        v = (s.beta2 * root.flatten() ** 2 + (1 - s.beta2) * g**2) * held
        full = v.view(c.m, c.n)
        empty = full.new_empty
        wide = empty(c.n, 0) if x.x is None else x.x[i].double()
        tall = empty(c.m, 0) if x.z is None else x.z[i].double()
        add(
            y=full.sqrt() @ wide,
            p=tall.T @ full.sqrt(),
            row_energies=full @ x.col_squares[i].double(),
            # How large the terms are that cancel in two of these, where rounding errors do not.
            y_terms=full.sqrt() @ wide.abs(),
            p_terms=tall.abs().T @ full.sqrt(),
        )
        mean = None if x.m is None else values(x.m[i])
        clip = None if x.clip is None else x.clip[i]
        update(weights(x, i), mean, x.g[i].double(), v[held], clip)
    for i in range(len(c.runs)):
        assert d.runs is not None
        g, v = (of[i].double() for of in (d.runs.g, d.runs.v))
        v = s.beta2 * v + (1 - s.beta2) * g**2
        add(v=v)
        mean = None if d.runs.m is None else values([d.runs.m[i]])
        clip = None if d.runs.clip is None else d.runs.clip[i]
        update(weights(d.runs, i), mean, g, v, clip)
    return found


def weights(of: Stack | Runs, i: int) -> Tensor:
    """Of a block or run with their compensation, fp64."""
    rest = None if of.compensation is None else of.compensation[i]
    return load_weights(of.w[i], rest, torch.float64)


def close(name: str, got: Tensor, want: Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(
        got.double(), want, rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}"
    )


def passes(backend: Any, data: Sequence[Data]) -> Passed:
    """One pass over the stacks of all, and the runs of the first."""
    stacks = [d.stack for d in data if d.c.b]
    passed: Passed = backend.run(stacks, data[0].runs, data[0].s, data[0].c.write)
    return passed


def check(backend: Any, *cases: Case, products: float = 3e-6) -> list[Tensor]:
    """A pass against the dense computation; nothing else is touched, nothing left unset.

    Args:
        backend: the module that has the pass.
        cases: stacks that go through one pass.
        products: how far the sketches may be off, relative to the terms that they are sums of.

    Returns:
        All that it made and wrote.
    """
    data = [Data(c) for c in cases]
    expected = [dense(d) for d in data]
    before = [[x.clone() for x in d.flats] for d in data]
    # Memory that is allocated and not filled holds NaN meanwhile.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        passed = passes(backend, data)
    finally:
        torch.use_deterministic_algorithms(False)
    made = iter(passed.stacks)
    found = [passed.squares]
    for i, (d, want) in enumerate(zip(data, expected, strict=True)):
        squares = passed.squares if i == 0 and d.runs is not None else passed.squares[:0]
        if d.c.b:
            reduced = next(made)
            squares = torch.cat([reduced.squares, squares])
            for name in ("y", "p", "row_energies"):
                value = getattr(reduced, name)
                kind = torch.float64 if name == "row_energies" else d.c.factors
                assert value.dtype == kind, name
                terms = torch.stack(want.get(f"{name}_terms", want[name]))
                size = float(terms.max()) if terms.numel() else 0.0
                off = 3e-6 if name == "row_energies" else products
                close(name, value, torch.stack(want[name]), 1e-5, off * size)
                found.append(value)
        assert squares.dtype == torch.float64
        if i == 0 or d.runs is None:
            close("squares", squares, torch.stack(want["squares"]), 3e-5, 0)
        found += [squares, *d.flats]
        if d.c.write:
            check_written(d, want)
        for x in d.written if d.c.write else []:
            x.zero_()
        for old, new in zip(before[i], d.flats, strict=True):
            # What lies around is what it was, and all of it where nothing is to be written.
            same = old.clone().view(-1)
            spots = torch.zeros_like(same, dtype=torch.bool)
            for x in d.written if d.c.write else []:
                if x.untyped_storage().data_ptr() == new.untyped_storage().data_ptr():
                    spots[x.storage_offset() : x.storage_offset() + x.numel()] = True
            same[spots] = 0
            assert torch.equal(same.nan_to_num(7), new.nan_to_num(7))
    return found


def check_written(d: Data, want: dict[str, list[Tensor]]) -> None:
    c, atol = d.c, 2e-5 * max(1.0, d.c.k / 16)
    of = [d.stack, *([] if d.runs is None else [d.runs])]
    found = [weights(x, i) for x in of for i in range(len(x.w))]
    # Eight bits more, and their own rounding.
    finer = 2**-7 if any(x.compensation is not None for x in of) else 1
    for got, expected in zip(found, want["w"], strict=True):
        close("w", got, expected, ROUNDING[c.dtype] * finer, atol)
    means = [m for x in of if x.m is not None for m in x.m]
    for mean, expected in zip(means, want.get("m", []), strict=True):
        parts = mean if isinstance(mean, list) else [mean]
        # A rounded root of 8 bits is off by half a level, its square by that much more.
        level = 0.2065 if c.moment == NIBBLES else 1.01 / 127
        coarse = max(
            float(m.scales.nan_to_num(0).max()) if isinstance(m, QuantizedMatrix) else 0.0
            for m in parts
        )
        assert c.moment is not None
        close("m", values(parts), expected, ROUNDING[c.moment], atol + coarse * level)
    for got, expected in zip([] if d.runs is None else d.runs.v, want.get("v", []), strict=True):
        close("v", got, expected, 1e-5, 1e-6)


def check_small_means(backend: Any, c: Case) -> None:
    """First moments in bf16 and in codes as of the torch backend, to the same bits.

    But where the means that are rounded differ in their last bit, to a neighbour's.
    """
    bits = []
    for each in (backend, tiles):
        d = Data(c)
        passes(each, [d])
        means = [m for of in (d.stack.m or []) for m in of] + list((d.runs and d.runs.m) or [])
        pairs = [
            (signed_codes(m), m.scales)
            if isinstance(m, QuantizedMatrix)
            else (m.view(torch.int16), m[:0])
            for m in means
        ]
        bits.append([torch.cat([x.flatten() for x in of]) for of in zip(*pairs, strict=True)])
    (ours, scales), (theirs, other) = bits
    torch.testing.assert_close(scales.float(), other.float(), rtol=1e-6, atol=0)
    off = (ours.int() - theirs.int()).abs()
    assert int(off.max()) <= 1
    assert int(off.count_nonzero()) <= max(2, 0.002 * off.numel())


def signed_codes(m: QuantizedMatrix) -> Tensor:
    """One an element."""
    if m.bits == 8:
        return m.codes
    pairs = torch.stack([m.codes & 15, m.codes >> 4], -1).flatten(1)[:, : m.cols].to(torch.int8)
    return torch.where(pairs > 7, pairs - 16, pairs)


def check_narrow_weights(backend: Any, c: Case) -> None:
    """Weights in 16 bits and their compensation as of the torch backend, to the same bits.

    But where the numbers that are rounded differ in their last bits, to a neighbour's.
    """
    found = []
    for each in (backend, tiles):
        d = Data(c)
        passes(each, [d])
        of = [d.stack, *([] if d.runs is None else [d.runs])]
        units = [x.view(torch.int16).int() & 0x7FFF for y in of for x in y.w]
        if c.rounding == "compensated":
            rests = [x for y in of for x in y.compensation or []]
            units = [(x << 8) + rest for x, rest in zip(units, rests, strict=True)]
        found.append(torch.cat([x.flatten() for x in units]))
    off = (found[0] - found[1]).abs()
    if c.rounding != "compensated":
        assert int(off.max()) <= 1
    # Of 16 or 19 bits in all, backends that compute with 22 or more have most in common.
    often = 0.002 if c.rounding != "compensated" else 0.01 if c.dtype == BRAIN else 0.04
    assert int(off.count_nonzero()) <= max(2, often * off.numel())


def check_bad_group(backend: Any, bad: float, kept: torch.dtype = CODES) -> None:
    """A group of codes with something that is not finite becomes NaN, and no other."""
    d = Data(Case(4, 300, 3, 5, 6, b=1, moment=kept, offset=0))
    d.stack.g[0].view(4, 300)[1, 200] = bad
    reduced = passes(backend, [d]).stacks[0]
    assert d.stack.m is not None
    found = load_rows(d.stack.m[0][0], 0, 4, FULL)
    assert found[1, GROUP : 2 * GROUP].isnan().all() and int(found.isnan().sum()) == GROUP
    assert int((~d.stack.w[0].isfinite()).sum()) == 1
    assert not d.stack.w[0].view(4, 300)[1, 200].isfinite()
    lost = ~reduced.row_energies[0].isfinite()
    assert lost.tolist() == [False, True, False, False]
    assert (~reduced.p[0].isfinite()).any(0).nonzero().tolist() == [[200]]
    d = Data(replace(d.c, write=False))
    d.stack.g[0][5] = bad
    assert not passes(backend, [d]).stacks[0].squares.isfinite()


# --- The Triton backend in Triton's interpreter --------------------------------------------------

RUNS = (1, 128, 1025, 300)
#: Name -> cases of one pass.
INTERPRETED: dict[str, list[Case]] = {
    "one element": [Case(1, 1, 1, 1, 1, b=1, offset=0)],
    "one row": [Case(1, 150, 1, 6, 1)],
    "one row, cut twice": [Case(1, 150, 1, 6, 1, skip=7, missing=9)],
    "one column": [Case(150, 1, 1, 1, 9, floor=False, separate=True)],
    "whole tiles": [Case(128, 64, 8, 13, 16, b=2, offset=0, gap=0)],
    "aligned": [Case(70, 80, 8, 13, 16, offset=8, gap=0)],
    "two walks, odd": [Case(5, 530, 3, 5, 7, eps=0.0, offset=1, b=1)],
    "cut rows": [Case(80, 70, 4, 9, 12, skip=11, missing=23)],
    "two cut rows": [Case(2, 700, 4, 2, 2, skip=690, missing=20, b=1)],
    "no x": [Case(67, 31, 16, 0, 16, floor=False, moment=None)],
    "no z": [Case(67, 31, 2, 7, 0, moment=None, clips=False, of_gradients=False)],
    "reads": [Case(67, 131, 8, 13, 16, write=False, runs=RUNS, skip=5, eps=0.0)],
    "reads, bf16": [Case(67, 31, 8, 0, 0, write=False, runs=RUNS, dtype=BRAIN)],
    "of updates": [Case(7, 81, 8, 7, 7, of_gradients=False, separate=True, runs=RUNS)],
    "of updates, no clip": [Case(67, 31, 8, 13, 16, of_gradients=False, clips=False)],
    "ascend": [Case(90, 40, 5, 10, 12, ascend=True, transposed=True, runs=RUNS)],
    "runs alone": [Case(9, 9, 1, 1, 1, b=0, runs=RUNS, nesterov=False)],
    "runs without means": [Case(9, 9, 1, 1, 1, moment=None, runs=RUNS, largest=math.inf)],
    "many shapes": [
        Case(70, 50, 8, 13, 16),
        Case(80, 30, 8, 13, 16, skip=4),
        Case(9, 40, 20, 24, 9),
        Case(30, 64, 8, 13, 16, dtype=BRAIN, moment=BRAIN),
        Case(3, 50, 1, 3, 3, floor=False),
    ],
    "many launches": [Case(200, 40, 4, 9, 12, b=3), Case(150, 30, 4, 9, 12, skip=9)],
    "bf16": [Case(70, 40, 8, 13, 16, dtype=BRAIN, runs=RUNS)],
    "fp16": [Case(70, 40, 8, 13, 16, dtype=HALF, moment=HALF, ascend=True)],
    "bf16 moment": [Case(70, 40, 8, 13, 16, moment=BRAIN, runs=RUNS)],
    "codes": [Case(35, 300, 8, 13, 16, moment=CODES, runs=RUNS, skip=50, missing=9, b=1)],
    "bf16 at random": [
        Case(35, 150, 8, 13, 16, dtype=BRAIN, rounding="stochastic", runs=RUNS, skip=4, b=1)
    ],
    "bf16 compensated": [
        Case(35, 150, 8, 13, 16, dtype=BRAIN, rounding="compensated", runs=RUNS, missing=4, b=1)
    ],
    "fp16 at random": [Case(20, 90, 8, 13, 16, dtype=HALF, rounding="stochastic", moment=CODES)],
    "fp16 compensated": [Case(20, 90, 8, 13, 16, dtype=HALF, rounding="compensated")],
    "codes of updates": [Case(33, 128, 8, 13, 16, moment=CODES, of_gradients=False)],
    "nibbles": [Case(35, 301, 8, 13, 16, moment=NIBBLES, runs=RUNS, skip=50, missing=9, b=1)],
    "nibbles of updates": [Case(33, 128, 8, 13, 16, moment=NIBBLES, of_gradients=False)],
    "k = 128": [Case(140, 150, 128, 132, 136, b=1)],
}
#: Floats of projections that a launch may have, where not all that the package lets it have.
PARTIALS = {"many launches": 1000, "cut rows": 1}
#: Places in 64 bits, as in a matrix of very long rows.
LONG = ("two walks, odd", "codes", "nibbles")


def interpret(name: str) -> None:
    from adapprox_ds.adapprox.kernels import triton_pass

    cases = INTERPRETED[name]
    partials = PARTIALS.get(name, triton_pass._PARTIALS)
    largest = 1 if name in LONG else triton_pass._LARGEST
    share = triton_pass._SHARE if name not in PARTIALS else 1 << 40
    with mock.patch.multiple(triton_pass, _PARTIALS=partials, _SHARE=share, _LARGEST=largest):
        check(triton_pass, *cases)
        if cases[0].moment in (BRAIN, CODES, NIBBLES):
            check_small_means(triton_pass, cases[0])
        if cases[0].rounding != "nearest":
            check_narrow_weights(triton_pass, cases[0])


def interpret_bad_groups() -> None:
    from adapprox_ds.adapprox.kernels import triton_pass

    for bad in (math.nan, math.inf):
        check_bad_group(triton_pass, bad)
        check_bad_group(triton_pass, bad, NIBBLES)


def interpret_shape_alone() -> None:
    """A block's bits do not depend on what else the pass takes."""
    from adapprox_ds.adapprox.kernels import triton_pass

    one, other = Case(150, 40, 8, 13, 16, b=1), Case(70, 50, 8, 13, 16)
    with mock.patch.multiple(triton_pass, _PARTIALS=1500, _SHARE=10):
        alone, together = check(triton_pass, one), check(triton_pass, one, other)
    for a, b in zip(alone, together, strict=False):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def interpret_optimizer() -> None:
    """Some steps of the optimizer through the dispatch: either backend, the same weights."""
    from adapprox_ds.adapprox.kernels import triton_pass

    ends = []
    for choice in ("torch", "triton"):
        random = torch.Generator().manual_seed(0)
        shapes = ((70, 90), (90, 70), (70, 90), (40,))
        params = [torch.nn.Parameter(torch.randn(x, generator=random)) for x in shapes]
        optimizer = Adapprox(params, lr=1e-2)
        with (
            mock.patch.dict(os.environ, {backends.VARIABLE: choice}),
            mock.patch.object(triton_pass, "run", wraps=triton_pass.run) as run,
        ):
            for _ in range(2):
                for p in params:
                    p.grad = torch.randn(p.shape, generator=random)
                optimizer.step()
        assert bool(run.call_count) == (choice == "triton")
        ends.append(torch.cat([p.detach().flatten() for p in params]))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)


def interpret_views() -> None:
    with cases_small.in_torch():
        cases_views.check("triton", steps=1)


CHECKS: dict[str, Callable[[], None]] = {
    **{name: partial(interpret, name) for name in INTERPRETED},
    "bad groups": interpret_bad_groups,
    "shape alone": interpret_shape_alone,
    "optimizer": interpret_optimizer,
    "views": interpret_views,
    "small matrices": partial(cases_small.check_every_case, "triton"),
    "small matrices of nothing": partial(cases_small.check_a_step_of_nothing, "triton"),
    **cases_windows.CHECKS,
    **cases_addresses.CHECKS,
}


def main() -> None:
    torch.set_num_threads(1)
    interpreted.prepare()
    found = {}
    for name, run in CHECKS.items():
        try:
            run()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
