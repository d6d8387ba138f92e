# SPDX-License-Identifier: Apache-2.0
"""Cases for all backends of the two passes, and one dense computation in fp64 to check them by.

Run as a program, this file checks the Triton kernels in Triton's interpreter, on the CPU: that has
to be chosen before Triton is first imported, so a test starts it as a process of its own.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from adapprox_ds import Adapprox, kernels
from adapprox_ds.kernels import StepScalars
from tests import cases_views, cases_windows

#: One unit in the last place: rounding may differ in direction (Triton's interpreter truncates).
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 1e-5}


@dataclass(frozen=True)
class Case:
    """A stack of ``b`` matrices, (m, n), with factors of rank k and a sketch of w columns."""

    m: int
    n: int
    k: int
    w: int
    b: int = 2
    floor: bool = True
    moment: bool = True
    of_gradients: bool = True
    nesterov: bool = True
    clips: bool = True
    largest: float = 1.5
    ascend: bool = False
    eps: float = 1e-3
    dtype: torch.dtype = torch.float32  # of weights, first moment and gradient
    moment_dtype: torch.dtype | None = None
    factors: torch.dtype = torch.float32
    separate: bool = False  # a flat tensor for each matrix, instead of one for all
    offset: int = 3  # elements before the first matrix of a flat tensor
    gap: int = 5  # elements behind each matrix
    transposed: bool = False  # factors stored column by column, one clip for all matrices
    device: str = "cpu"


class Data:
    """A case's tensors; weights, moments and gradients amid NaN in flat tensors."""

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
            clips=c.clips,
            largest=c.largest,
        )
        size = (c.b, c.m, c.n)
        sign = self.normal(*size).sign()
        g = sign * (0.1 + self.normal(*size).abs())
        if c.eps > 0 and not c.of_gradients:
            # With a mean of gradients, fp32 would show in the quotients where S is small too.
            g[torch.rand(size, generator=self.random) < 0.1] = 0.0
        self.flat = {"w": self.hidden(self.normal(*size)), "g": self.hidden(g)}
        if c.moment:
            self.flat["m"] = self.hidden(self.normal(*size), c.moment_dtype)
        self.q, self.u = self.factor(c.m, c.k), self.factor(c.n, c.k)
        self.sketch, self.basis = self.factor(c.n, c.w), self.factor(c.m, c.w)
        vectors = self.normal(c.b, 3, max(c.m, c.n)).abs().to(c.device, c.factors)
        self.floor = vectors[:, :2] if c.floor else None
        self.row_weights = vectors[:, 2, : c.m].contiguous()
        clips = 1.7 + 0.4 * torch.arange(c.b) if c.clips else torch.ones(c.b)
        self.clip = clips.to(c.device, c.factors)
        if c.transposed:
            self.clip = self.clip[-1].expand(c.b)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    def hidden(self, x: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The matrices of ``x``, last first, in flat tensors; NaN before and behind each."""
        edge, gap = torch.full((self.c.offset,), torch.nan), torch.full((self.c.gap,), torch.nan)
        parts = [torch.cat([matrix.flatten(), gap]) for matrix in x.flip(0)]
        flats = parts if self.c.separate else [torch.cat(parts)]
        dtype = dtype or self.c.dtype
        return [torch.cat([edge, flat]).to(self.c.device, dtype) for flat in flats]

    def factor(self, rows: int, cols: int) -> Tensor:
        x = self.normal(self.c.b, rows, cols).to(self.c.device, self.c.factors)
        return x.mT.contiguous().mT if self.c.transposed else x

    def view(self, name: str) -> Any:
        """The matrices of w, m or g where they lie, a list; None for an absent moment."""
        if name not in self.flat:
            return None
        c, found = self.c, []
        for flat in self.flat[name]:
            for matrix in flat[c.offset :].view(-1, c.m * c.n + c.gap):
                found.append(matrix[: c.m * c.n].view(c.m, c.n))
        return found[::-1]


def dense(d: Data) -> dict[str, Tensor]:
    """What the passes should make of the data, by the formulas of kernels/interface.py, in fp64."""
    s, (g, w) = d.s, (torch.stack(d.view(name)).double() for name in ("g", "w"))
    root = (d.q.double() @ d.u.double().mT).clamp(min=0)
    if d.floor is not None:
        floor = d.floor.double()
        root = root.maximum(floor[:, 0, : d.c.m, None] * floor[:, 1, None, : d.c.n])
    v = s.beta2 * root**2 + (1 - s.beta2) * g**2
    denominator, clip = v.sqrt() * s.correction + s.eps, d.clip.double()[:, None, None]
    signed = -g if s.ascend else g
    x, updated = signed / denominator, {}
    step = x / clip
    if d.c.moment:
        before = torch.stack(d.view("m")).double()
        if s.of_gradients:
            moment = s.beta1 * before + (1 - s.beta1) * signed
            applied = s.beta1 * moment + (1 - s.beta1) * signed if s.nesterov else moment
            quotient = (applied / denominator).clamp(-s.largest, s.largest)
            step = s.first_correction * quotient / clip
        else:
            moment = s.beta1 * before + (1 - s.beta1) * step
            applied = s.beta1 * moment + (1 - s.beta1) * step if s.nesterov else moment
            step = s.first_correction * applied
        updated["m"] = moment
    updated["w"] = w * (1 - s.lr * s.weight_decay) - s.lr * step
    return updated | {
        "sketch": v.sqrt() @ d.sketch.double(),
        "row_sums": v.sum(2),
        "col_sums": v.sum(1),
        "update_square": (x**2).sum((1, 2)) * s.clips,
        "projection": d.basis.double().mT @ v.sqrt(),
        "weighted_col_sums": (d.row_weights.double()[:, None] @ v)[:, 0],
        # How large the terms are that cancel in two of these, where rounding errors do not.
        "sketch_terms": v.sqrt() @ d.sketch.double().abs(),
        "projection_terms": d.basis.double().abs().mT @ v.sqrt(),
    }


def both_passes(passes: Any, d: Data) -> dict[str, Tensor]:
    """All that ``passes`` (a backend, or the dispatch) reduces; ``d`` holds what it updates."""
    one = passes.first_pass(d.view("g"), d.q, d.u, d.sketch, d.floor, d.s)
    two = passes.second_pass(
        *(d.view("w"), d.view("m"), d.view("g"), d.q, d.u, d.floor),
        *(d.basis, d.row_weights, d.clip, d.s),
    )
    names = ("sketch", "row_sums", "col_sums", "update_square")
    reduced = {name: getattr(one, name) for name in names}
    return reduced | {name: getattr(two, name) for name in ("projection", "weighted_col_sums")}


def close(name: str, got: Tensor, want: Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(
        got.double(), want, rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}"
    )


def check(passes: Any, c: Case) -> dict[str, Tensor]:
    """Both passes against the dense computation; nothing else is touched, nothing left unset."""
    d = Data(c)
    expected = dense(d)
    before = {name: [flat.clone() for flat in flats] for name, flats in d.flat.items()}
    # Memory that is allocated and not filled holds NaN meanwhile.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert d.q.new_empty(3).isnan().all()
        reduced = both_passes(passes, d)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in reduced.items():
        want = expected[name]
        assert value.shape == want.shape and value.dtype == c.factors, name
        size = float(expected.get(f"{name}_terms", want).max())
        close(name, value, want, 1e-5, 3e-6 * size)
    for name, flats in d.flat.items():
        for flat, old in zip(flats, before[name], strict=True):
            # The matrices held none, and what lies around them nothing else.
            assert torch.equal(flat.isnan(), old.isnan()), name
            assert name != "g" or torch.equal(flat.nan_to_num(7), old.nan_to_num(7))
        if name != "g":
            got, rounding = torch.stack(d.view(name)), ROUNDING[flats[0].dtype]
            close(name, got, expected[name], rounding, 2e-5 * max(1.0, c.k / 16))
    return reduced | {name: torch.cat(flats) for name, flats in d.flat.items()}


# --- The Triton backend in Triton's interpreter --------------------------------------------------

HALF, BRAIN = torch.float16, torch.bfloat16
#: Name -> case, programs to aim at, elements of the first pass's workspace.
INTERPRETED: dict[str, tuple[Case, int, int]] = {
    "one element": (Case(1, 1, 1, 1, b=1, offset=0), 512, 1 << 22),
    "one row": (Case(1, 150, 1, 6), 512, 1 << 22),
    "one column": (Case(150, 1, 1, 6, floor=False, separate=True), 512, 1 << 22),
    "whole tiles": (Case(128, 64, 8, 13, b=3, offset=0, gap=0), 512, 1 << 22),
    "whole rows": (
        Case(64, 70, 8, 13, b=1, eps=0.0, of_gradients=False, nesterov=False),
        512,
        1 << 22,
    ),
    "whole columns": (Case(70, 64, 8, 13, b=1, eps=0.0, clips=False), 512, 1 << 22),
    "odd, eps 0": (Case(131, 67, 3, 5, eps=0.0, offset=1), 512, 1 << 22),
    "no floor, no moment": (Case(67, 131, 16, 16, floor=False, moment=False), 512, 1 << 22),
    "no moment, no clip": (Case(67, 31, 2, 7, moment=False, clips=False), 512, 1 << 22),
    "of updates": (Case(67, 81, 8, 13, of_gradients=False, separate=True), 512, 1 << 22),
    "of updates, no clip": (Case(67, 81, 8, 13, of_gradients=False, clips=False), 512, 1 << 22),
    "one program a walk": (Case(140, 150, 8, 13), 1, 1 << 22),
    "uneven groups": (Case(330, 340, 4, 9, b=1), 12, 1 << 22),
    "groups in a stack": (Case(140, 150, 4, 9, b=3, gap=0, offset=8), 15, 1 << 22),
    "several launches": (Case(330, 100, 4, 9), 12, 250),
    "some matrices a launch": (Case(130, 40, 4, 9, b=5, separate=True), 512, 250),
    "a row block a launch": (Case(200, 100, 4, 9), 1, 1),
    "ascend, factors by columns": (Case(90, 80, 5, 10, ascend=True, transposed=True), 9, 1 << 22),
    "bf16": (Case(70, 90, 8, 13, dtype=BRAIN), 512, 1 << 22),
    "bf16 moment, fp32 weights": (Case(70, 90, 8, 13, moment_dtype=BRAIN), 512, 1 << 22),
    "bf16 moment, aligned": (Case(64, 64, 8, 13, moment_dtype=BRAIN, offset=0, gap=8), 9, 1 << 22),
    "fp16": (Case(70, 90, 8, 13, dtype=HALF, ascend=True, of_gradients=False), 512, 1 << 22),
    "k = 64": (Case(80, 100, 64, 69, b=1), 512, 1 << 22),
    "k = 128": (Case(70, 130, 128, 128, b=1, floor=False), 512, 1 << 22),
}


def interpret(name: str) -> None:
    from adapprox_ds.kernels import triton_passes

    case, programs, partials = INTERPRETED[name]
    with (
        mock.patch.object(triton_passes, "_PROGRAMS", programs),
        mock.patch.object(triton_passes, "_PARTIALS", partials),
    ):
        check(triton_passes, case)


def interpret_optimizer() -> None:
    """Some steps of the optimizer through the dispatch: either backend, the same weights."""
    from adapprox_ds.kernels import triton_passes

    ends = []
    for choice in ("torch", "triton"):
        random = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(70, 90, generator=random))
        optimizer = Adapprox([p], lr=1e-2)
        with (
            mock.patch.dict(os.environ, {kernels.VARIABLE: choice}),
            mock.patch.object(triton_passes, "first_pass", wraps=triton_passes.first_pass) as one,
            mock.patch.object(triton_passes, "second_pass", wraps=triton_passes.second_pass) as two,
        ):
            for _ in range(3):
                p.grad = torch.randn(70, 90, generator=random)
                optimizer.step()
        assert one.call_count == two.call_count == (3 if choice == "triton" else 0)
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)


def interpret_layout_refusal() -> None:
    from adapprox_ds.kernels import triton_passes

    d = Data(Case(6, 6, 1, 2))
    with pytest.raises(ValueError, match="contiguous"):
        transposed = [g.T for g in d.view("g")]
        triton_passes.first_pass(transposed, d.q, d.u, d.sketch, d.floor, d.s)


def interpret_workspace() -> None:
    """Every block is some program's, and partial results are as few as kernels/README.md says."""
    from adapprox_ds.kernels import triton_passes

    sizes, partials = (1, 64, 1000, 8192, 50257), triton_passes._PARTIALS
    for stack, m, n, rows_owned in product((1, 5, 300), sizes, sizes, (True, False)):
        cut = triton_passes._Cut.of(stack, m, n, 8, 13, rows_owned=rows_owned)
        side, other, step = (m, n, "COLS") if rows_owned else (n, m, "ROWS")
        walked = -(-other // cut.constants[step])
        assert cut.blocks == -(-side // 64)
        assert (cut.groups - 1) * cut.span < walked <= cut.groups * cut.span
        bound: float = stack * side + 512 * 64
        if rows_owned:
            assert cut.matrices * cut.owned * n <= max(n, partials)
            bound = max(bound, stack * m * (1 + n / 4096))
        assert stack * cut.groups * side <= bound


CHECKS: dict[str, Callable[[], None]] = {
    **{name: lambda name=name: interpret(name) for name in INTERPRETED},  # type: ignore[misc]
    "optimizer": interpret_optimizer,
    "views": partial(cases_views.check, "triton"),
    "refusal": interpret_layout_refusal,
    "workspace": interpret_workspace,
    **cases_windows.CHECKS,
}


def main() -> None:
    torch.set_num_threads(1)
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
