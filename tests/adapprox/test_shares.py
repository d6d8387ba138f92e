# SPDX-License-Identifier: Apache-2.0
"""A pass over shares of a matrix, cut inside rows, makes of them together what it makes of all."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from adapprox_ds.adapprox import kernels
from adapprox_ds.adapprox.kernels import native_pass
from adapprox_ds.adapprox.kernels.interface import Reduced, Stack, StepScalars
from adapprox_ds.core.kernels import backends

M, N, K, WIDTH, TESTS, BLOCKS = 23, 70, 4, 6, 9, 2
S = StepScalars(
    beta1=0.9, beta2=0.99, correction=1.5, first_correction=2.0, eps=1e-8, lr=1e-2,
    weight_decay=0.1, ascend=False, of_gradients=True, nesterov=True, largest=8.0, salt=7,
)  # fmt: skip
#: Where shares end: inside rows, at their edges, and within one row.
EDGES = {
    "inside rows": (0, 5 * N + 31, 14 * N + 2, M * N),
    "at a row's end": (0, 5 * N, 14 * N + 69, M * N),
    "within a row": (0, 7 * N + 11, 7 * N + 45, M * N),
    "a row and two cut ones": (0, 3 * N + 1, 5 * N + 2, M * N),
}


def random(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def whole(dtype: torch.dtype) -> Stack:
    flat = [[random(M * N, seed=10 * i + b).to(dtype) for b in range(BLOCKS)] for i in range(3)]
    w, m, g = flat
    return Stack(
        rows=M, cols=N, skip=0, missing=0, w=w, m=[[x.view(M, N)] for x in m], g=g,
        first=[0] * BLOCKS,
        q=random(BLOCKS, M, K, seed=91).to(dtype),
        u=random(BLOCKS, N, K, seed=92).to(dtype),
        floor_rows=random(BLOCKS, M, seed=93).abs().to(dtype),
        floor_cols=random(BLOCKS, N, seed=94).abs().to(dtype),
        col_squares=random(BLOCKS, N, seed=95).abs().to(dtype),
        x=random(BLOCKS, N, WIDTH, seed=96).to(dtype),
        z=random(BLOCKS, M, TESTS, seed=97).to(dtype),
        clip=torch.tensor([1.0, 1.5], dtype=dtype),
    )  # fmt: skip


def share(of: Stack, begin: int, end: int) -> tuple[Stack, slice]:
    """Elements [begin, end) of a stack, which has its own copies, and the rows that they lie in."""
    rows = slice(begin // N, -(-end // N))
    skip, missing = begin - rows.start * N, rows.stop * N - end
    cut = replace(of, rows=rows.stop - rows.start, skip=skip, missing=missing)
    cut.first = [begin] * BLOCKS
    cut.w, cut.g = ([x[begin:end].clone() for x in xs] for xs in (of.w, of.g))
    assert of.m is not None and of.z is not None and of.floor_rows is not None
    means = [m.flatten()[begin:end].clone() for (m,) in of.m]
    cut.m = [
        [x[part].view(r.stop - r.start, c.stop - c.start) for r, c, part in cut.tiles]
        for x in means
    ]
    cut.q, cut.z, cut.floor_rows = (x[:, rows] for x in (of.q, of.z, of.floor_rows))
    return cut, rows


def joined(parts: list[tuple[Reduced, slice]], like: Reduced) -> Reduced:
    """Sums over the shares, of what each has of a row."""
    total = Reduced(
        *(torch.zeros_like(x) for x in (like.y, like.p, like.row_energies, like.squares))
    )
    for reduced, rows in parts:
        total.y[:, rows] += reduced.y
        total.p.add_(reduced.p)
        total.row_energies[:, rows] += reduced.row_energies
        total.squares.add_(reduced.squares)
    return total


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("choice", ["native", "torch"])
@pytest.mark.parametrize("write", [True, False])
def test_shares_make_what_the_whole_does(
    edges: str, choice: str, write: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and means to the last bits; sketches, projections and sums within rounding."""
    monkeypatch.setenv(backends.VARIABLE, choice)
    dtype = torch.float32
    try:
        backends.chosen(torch.device("cpu"), native_pass.LIBRARY)
    except RuntimeError as error:
        pytest.skip(str(error))
    stack = whole(dtype)
    before = [x.clone() for x in stack.w]
    shares = [share(stack, *span) for span in pairwise(EDGES[edges])]
    (expected,) = kernels.run([stack], None, S, write).stacks
    found = [(kernels.run([cut], None, S, write).stacks[0], rows) for cut, rows in shares]
    total = joined(found, expected)
    for name in ("y", "p", "row_energies", "squares"):
        a, b = getattr(total, name), getattr(expected, name)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
    assert bool(expected.squares.any()) != write
    assert stack.m is not None
    for b in range(BLOCKS):
        w = torch.cat([cut.w[b] for cut, _ in shares])
        m = torch.cat([x.flatten() for cut, _ in shares for x in (cut.m or [])[b]])
        torch.testing.assert_close(w, stack.w[b], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(m.view(M, N), stack.m[b][0], rtol=1e-6, atol=1e-6)
        assert torch.equal(stack.w[b], before[b]) != write
    assert math.isfinite(float(expected.p.sum()))
