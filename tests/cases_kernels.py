# SPDX-License-Identifier: Apache-2.0
"""Cases for both backends of the two passes, and one dense computation in fp64 to check them by.

Run as a program, this file checks the Triton kernels in Triton's interpreter, on the CPU: that has
to be chosen before Triton is first imported, so a test starts it as a process of its own.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from adapprox_ds import Adapprox, kernels
from adapprox_ds.kernels import StepScalars

#: One unit in the last place: rounding may differ in direction (Triton's interpreter truncates).
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 1e-5}


@dataclass(frozen=True)
class Case:
    m: int
    n: int
    k: int
    w: int
    floor: bool = True
    moment: bool = True
    ascend: bool = False
    eps: float = 1e-3
    dtype: torch.dtype = torch.float32  # of weights, first moment and gradient
    moment_dtype: torch.dtype | None = None
    factors: torch.dtype = torch.float32
    offset: int = 3
    transposed: bool = False  # factors stored column by column
    device: str = "cpu"


class Data:
    """A case's tensors; weights, moment and gradient amid NaN in flat tensors."""

    def __init__(self, c: Case) -> None:
        self.c = c
        self.random = torch.Generator().manual_seed(c.m * 1000 + c.n)
        self.s = StepScalars(0.8, 0.9, 1.25, c.eps, 0.03, 0.1, c.ascend)
        sign = self.normal(c.m, c.n).sign()
        g = sign * (0.1 + self.normal(c.m, c.n).abs())
        if c.eps > 0:
            g[torch.rand(g.shape, generator=self.random) < 0.1] = 0.0
        self.flat = {"w": self.hidden(self.normal(c.m, c.n)), "g": self.hidden(g)}
        if c.moment:
            self.flat["m"] = self.hidden(self.normal(c.m, c.n), c.moment_dtype)
        self.q, self.u = self.factor(c.m, c.k), self.factor(c.n, c.k)
        self.sketch, self.basis = self.factor(c.n, c.w), self.factor(c.m, c.w)
        vectors = self.normal(3, max(c.m, c.n)).abs().to(c.device, c.factors)
        self.floor = vectors[:2] if c.floor else None
        self.row_weights = vectors[2, : c.m]
        self.clip = torch.tensor(1.7, dtype=c.factors, device=c.device)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    def hidden(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """``x`` in a flat tensor at an offset, NaN before and behind it."""
        flat = torch.full((self.c.offset + x.numel() + 5,), torch.nan)
        flat[self.c.offset : self.c.offset + x.numel()] = x.flatten()
        return flat.to(self.c.device, dtype or self.c.dtype)

    def factor(self, rows: int, cols: int) -> Tensor:
        x = self.normal(rows, cols).to(self.c.device, self.c.factors)
        return x.T.contiguous().T if self.c.transposed else x

    def view(self, name: str) -> Any:
        if name not in self.flat:
            return None
        end = self.c.offset + self.c.m * self.c.n
        return self.flat[name][self.c.offset : end].view(self.c.m, self.c.n)


def dense(d: Data) -> dict[str, Tensor]:
    """What the passes should make of the data, by the formulas of kernels/interface.py, in fp64."""
    s, g, w = d.s, d.view("g").double(), d.view("w").double()
    root = (d.q.double() @ d.u.double().T).clamp(min=0)
    if d.floor is not None:
        root = root.maximum(torch.outer(d.floor[0, : d.c.m].double(), d.floor[1, : d.c.n].double()))
    v = s.beta2 * root**2 + (1 - s.beta2) * g**2
    x = g / (v.sqrt() * s.correction + s.eps)
    step = x / d.clip.double()
    if d.c.moment:
        step = s.beta1 * d.view("m").double() + (1 - s.beta1) * step
    lr = s.lr if s.ascend else -s.lr
    return {
        "sketch": v.sqrt() @ d.sketch.double(),
        "row_sums": v.sum(1),
        "col_sums": v.sum(0),
        "update_square": (x**2).sum(),
        "w": w * (1 - s.lr * s.weight_decay) + lr * step,
        **({"m": step} if d.c.moment else {}),
        "projection": d.basis.double().T @ v.sqrt(),
        "weighted_col_sums": d.row_weights.double() @ v,
        # How large the terms are that cancel in two of these, where rounding errors do not.
        "sketch_terms": v.sqrt() @ d.sketch.double().abs(),
        "projection_terms": d.basis.double().abs().T @ v.sqrt(),
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
    expected, before = dense(d), {name: flat.clone() for name, flat in d.flat.items()}
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
    for name in d.flat:
        if name == "g":
            assert torch.equal(d.flat[name].nan_to_num(7), before[name].nan_to_num(7)), name
            continue
        got, rounding = d.view(name), ROUNDING[d.flat[name].dtype]
        close(name, got, expected[name], rounding, 2e-5 * max(1.0, c.k / 16))
        # The view holds no NaN (above), so these are the surroundings.
        assert d.flat[name].isnan().sum() == c.offset + 5, name
        assert d.flat[name][: c.offset].isnan().all() and d.flat[name][-5:].isnan().all(), name
    return reduced | {name: flat.clone() for name, flat in d.flat.items()}


# --- The Triton backend in Triton's interpreter --------------------------------------------------

HALF, BRAIN = torch.float16, torch.bfloat16
#: Name -> case, programs to aim at, elements of the first pass's workspace.
INTERPRETED: dict[str, tuple[Case, int, int]] = {
    "one element": (Case(1, 1, 1, 1, offset=0), 512, 1 << 22),
    "one row": (Case(1, 150, 1, 6), 512, 1 << 22),
    "one column": (Case(150, 1, 1, 6, floor=False), 512, 1 << 22),
    "whole tiles": (Case(128, 64, 8, 13), 512, 1 << 22),
    "whole rows": (Case(64, 70, 8, 13, eps=0.0), 512, 1 << 22),
    "whole columns": (Case(70, 64, 8, 13, eps=0.0), 512, 1 << 22),
    "odd, eps 0": (Case(131, 67, 3, 5, eps=0.0, offset=1), 512, 1 << 22),
    "odd, no floor, no moment": (Case(67, 131, 16, 16, floor=False, moment=False), 512, 1 << 22),
    "one program a walk": (Case(140, 150, 8, 13), 1, 1 << 22),
    "uneven groups": (Case(330, 340, 4, 9), 12, 1 << 22),
    "several launches": (Case(330, 100, 4, 9), 512, 250),
    "a row block a launch": (Case(200, 100, 4, 9), 1, 1),
    "ascend, factors by columns": (Case(90, 80, 5, 10, ascend=True, transposed=True), 9, 1 << 22),
    "bf16": (Case(70, 90, 8, 13, dtype=BRAIN), 512, 1 << 22),
    "bf16 moment, fp32 weights": (Case(70, 90, 8, 13, moment_dtype=BRAIN), 512, 1 << 22),
    "fp16": (Case(70, 90, 8, 13, dtype=HALF, ascend=True), 512, 1 << 22),
    "k = 64": (Case(80, 100, 64, 69), 512, 1 << 22),
    "k = 128": (Case(70, 130, 128, 128, floor=False), 512, 1 << 22),
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
        triton_passes.first_pass(d.view("g").T, d.q, d.u, d.sketch, d.floor, d.s)


CHECKS: dict[str, Callable[[], None]] = {
    **{name: lambda name=name: interpret(name) for name in INTERPRETED},  # type: ignore[misc]
    "optimizer": interpret_optimizer,
    "refusal": interpret_layout_refusal,
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
