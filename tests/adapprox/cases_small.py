# SPDX-License-Identifier: Apache-2.0
"""The small algebra of stacks, in C++ and Triton against torch.

C++ is run by test_native.py, Triton's interpreter by cases_kernels.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from adapprox_ds.adapprox import small
from adapprox_ds.adapprox.kernels.interface import Found, Past, Sketches, Solved

TORCH = small.Backend("torch")


@dataclass(frozen=True)
class Case:
    """A stack.

    Attributes:
        first: the first row that counts on this process.
        known: whether the last factors are other than zero.
        held: whether the pass found anything.
        kept: the dtype of the factors.
    """

    blocks: int
    rows: int
    cols: int
    rank: int
    width: int
    tests: int
    first: int = 0
    known: bool = True
    held: bool = True
    kept: torch.dtype = torch.float32
    floor: float = 0.1
    device: str = "cpu"

    @property
    def columns(self) -> tuple[int, int, int]:
        return self.rank, self.width, self.tests


CASES = [
    Case(2, 40, 30, 4, 9, 14),
    Case(1, 1, 5, 1, 1, 1),
    Case(2, 70, 270, 8, 13, 18, first=1),
    Case(1, 35, 50, 3, 5, 8),
    Case(1, 270, 24, 16, 21, 26),
    Case(2, 1, 30, 1, 1, 4, first=1),  # no row of it counts on this process
    Case(1, 17, 40, 5, 7, 3),  # a test sketch that has fewer columns than the factors
    Case(1, 60, 90, 22, 27, 32, kept=torch.bfloat16),
    Case(1, 60, 50, 4, 9, 14, known=False),
    Case(1, 60, 50, 4, 9, 14, held=False, kept=torch.bfloat16, first=1),
]


def in_torch() -> Any:
    """Leave the small algebra to torch, where a check is about other kernels: it takes long."""
    return mock.patch.object(small, "backend_of", lambda *_: TORCH)


def run(cases: Sequence[Case], backends: Sequence[small.Backend]) -> list[dict[str, Any]]:
    """What a step computes of stacks, in names."""
    random = torch.Generator().manual_seed(0)

    def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        drawn = torch.randn(shape, generator=random, dtype=dtype)
        return drawn.to(cases[0].device)

    pasts, passed = [], []
    for c in cases:
        random.manual_seed(c.rows)
        q, u = (
            x * c.known
            for x in (numbers(c.blocks, c.rows, c.rank), numbers(c.blocks, c.cols, c.rank))
        )
        u = 1e-3 * u
        if c.rank > 2:
            u[..., 2] = 0  # a column that holds nothing
        keys = [5, -7, 11][: c.blocks], [1 << 40, 2, -(1 << 62)][: c.blocks]
        pasts.append(Past(q, u, q, keys, c.width, c.tests, 4, c.rows + 9, c.floor))
        y, p = numbers(c.blocks, c.rows, c.width), numbers(c.blocks, c.tests, c.cols + 3)
        energies = numbers(c.blocks, c.rows, dtype=torch.float64).abs()
        passed.append((y * c.held, p[..., : c.cols] * c.held, energies * c.held))
    grams = small.grams([(x.q, c.first) for x, c in zip(pasts, cases, strict=True)], backends)
    pasts = [replace(x, gram_q=gram) for x, gram in zip(pasts, grams, strict=True)]
    made = small.sketches(pasts, backends)
    found = [
        Found(
            y, x.z, p, energies, energies * x.row_scale, x.row_squares, x.row_scale,
            torch.cat([x.col_squares[:, :1], x.col_squares], dim=1)[:, 1:], c.first,
        )
        for (y, p, energies), x, c in zip(passed, made, cases, strict=True)
    ]  # fmt: skip
    products = small.products(found, backends)
    solved = []
    for x, (sums, s), c in zip(found, products, cases, strict=True):
        new_q, new_u = (
            torch.zeros(c.blocks, n, c.rank, dtype=c.kept, device=c.device)
            for n in (c.rows, c.cols)
        )
        rank = min(c.rank, c.width)
        q, u = ([of[:, :rank].contiguous() for of in new.unbind()] for new in (new_q, new_u))
        solved.append(Solved(x.y, x.p, sums, s, rank, q, u, (4, c.rows + 9), 77))
    errors = small.refactor(solved, backends)
    results = []
    for i, x in enumerate(made):
        results.append({of.name: getattr(x, of.name) for of in fields(Sketches)})
        results[-1] |= {"gram": grams[i], "sums": products[i][0], "s": products[i][1]}
        results[-1] |= {"errors": errors[i]}
        results[-1] |= {"q": torch.stack(solved[i].q), "u": torch.stack(solved[i].u)}
    return results


def check(of: str, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """A backend gives what algebra.py does."""
    backends = [small.Backend("triton", size_of(cases)) if of == "triton" else small.Backend(of)]
    found = run(cases, backends * len(cases))
    wanted = run(cases, [TORCH] * len(cases))
    for c, ours, theirs in zip(cases, found, wanted, strict=True):
        # Of fewer tests than columns of the sketch no solution is the only one.
        free = {"q", "u", *(["errors"] if c.tests < c.width else [])}
        for name, want in theirs.items():
            if name in free or want is None or ("floor" in name and not c.known):
                assert (ours[name] is None) == (want is None)
                continue
            close(name, ours[name], want, 2e-5 if want.dtype == torch.float32 else 1e-5)
        if c.tests >= c.width:
            product, want = (x["q"].double() @ x["u"].double().mT for x in (ours, theirs))
            close("factors", product, want, 1e-4 if c.kept == torch.float32 else 2.0**-6)
    return found


def size_of(cases: Sequence[Case]) -> int:
    from adapprox_ds.adapprox.kernels import triton_small

    return triton_small.size_of(*(x for c in cases for x in c.columns))


def close(name: str, ours: Tensor, theirs: Tensor, bound: float) -> None:
    """Equal up to rounding; NaN nowhere."""
    size = float(theirs.double().abs().max()) if theirs.numel() else 0.0
    torch.testing.assert_close(
        ours.double(),
        theirs.double(),
        rtol=bound,
        atol=bound / 10 * size,
        msg=lambda m: f"{name}: {m}",
    )


def check_every_case(of: str, device: str = "cpu", more: Sequence[Case] = ()) -> None:
    """Cases of one dtype at once; what a stack gives does not depend on which others there are."""
    cases = [replace(c, device=device) for c in (*CASES, *more)]
    for kept in (torch.float32, torch.bfloat16):
        check(of, [c for c in cases if c.kept == kept])
    others = [replace(c, floor=0.0) for c in cases[:2]]
    together = check(of, others)
    if of == "triton":
        alone = run(others[-1:], [small.Backend(of, size_of(others))])
        for name, x in together[-1].items():
            assert x is None or torch.equal(x, alone[0][name]), name


def check_a_step_of_nothing(of: str) -> None:
    """Factors of zero, of which the pass found nothing, stay zero."""
    (found,) = check(of, [Case(1, 60, 50, 4, 9, 14, known=False, held=False)])
    assert not found["q"].any() and not found["u"].any() and not found["errors"].any()
    assert (found["row_squares"] == 1).all()
