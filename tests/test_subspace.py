# SPDX-License-Identifier: Apache-2.0
"""Cholesky-QR and Rayleigh-Ritz by products alone, against the decompositions they stand for."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from adapprox_ds.lowrank.subspace import (
    SharedBasis,
    cholesky_qr,
    dominant,
    orthonormal,
    tracking_sketch,
)
from torch import Tensor


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def loss_of_orthogonality(q: Tensor) -> float:
    eye = torch.eye(q.shape[-1], dtype=torch.float64)
    return float((q.double().mT @ q.double() - eye).abs().max())


COLUMNS: dict[str, Tensor] = {
    "random": random(2, 300, 13),
    "one column": random(1, 50, 1),
    "square": random(1, 21, 21),
    "zero": torch.zeros(2, 50, 7),
    "one zero column": random(1, 50, 5) * torch.tensor([1.0, 1, 0, 1, 1]),
    "equal": torch.ones(2, 50, 7),
    "equal and square": torch.ones(1, 7, 7),
    "nearly equal": random(1, 400, 1) + 1e-7 * random(1, 400, 13, seed=1),
    "near dependence": random(1, 400, 1) + 1e-4 * random(1, 400, 13, seed=1),
    "low rank": random(1, 3000, 4) @ random(4, 69, seed=1),
    "far scales": random(1, 60, 9) * torch.logspace(-30, 10, 9),
    "far scales in a column": random(1, 60, 9) * torch.logspace(-12, 3, 60)[:, None],
    "tiny": random(1, 60, 9) * 1e-30,
    "huge": random(1, 60, 9) * 1e30,
    "waves": torch.outer(torch.arange(64) + 0.5, torch.arange(9)).mul(torch.pi / 64).cos()[None],
}


@pytest.mark.parametrize("name", COLUMNS)
def test_cholesky_qr_is_orthonormal_whatever_the_columns(name: str) -> None:
    q = cholesky_qr(COLUMNS[name])
    assert q.shape == COLUMNS[name].shape and q.dtype == torch.float32
    assert loss_of_orthogonality(q) < 1e-5


@pytest.mark.parametrize("name", ["random", "square", "near dependence", "low rank", "far scales"])
def test_cholesky_qr_spans_the_columns(name: str) -> None:
    """Each column lies in the basis but for the lift: 1e-6 of its norm, and rounding."""
    a = COLUMNS[name].double()
    q = cholesky_qr(COLUMNS[name]).double()
    rest = torch.linalg.vector_norm(a - q @ (q.mT @ a), dim=-2)
    assert float((rest / torch.linalg.vector_norm(a, dim=-2)).max()) < 5e-6


def of_ranks(a: Tensor, edges: tuple[int, ...]) -> Tensor:
    """The basis that ranks find together; each has a row of the one before too, but one counts."""
    parts = []
    for i, (first, end) in enumerate(pairwise(edges)):
        begin = first - int(i > 0)
        index = torch.arange(begin, end)
        parts.append(SharedBasis(a[:, begin:end], index, slice(first - begin, None), a.shape[1]))
    moments = torch.stack([part.moments() for part in parts]).sum(0)
    gram = torch.stack([part.turn(moments) for part in parts]).sum(0)
    rows = [part.finish(gram)[:, part.own] for part in parts]
    return torch.cat(rows, dim=1)


@pytest.mark.parametrize("name", [n for n, a in COLUMNS.items() if a.shape[1] >= 50])
def test_ranks_find_the_basis_that_one_would(name: str) -> None:
    """Each matrix of a stack for itself, whatever the columns are."""
    a = COLUMNS[name]
    found = of_ranks(a, (0, 20, 21, a.shape[1]))
    assert found.shape == a.shape and found.dtype == a.dtype
    assert loss_of_orthogonality(found) < 1e-5
    alone = [of_ranks(matrix[None], (0, 20, 21, a.shape[1])) for matrix in a]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["random", "near dependence", "low rank", "far scales"])
def test_ranks_span_the_columns(name: str) -> None:
    a = COLUMNS[name].double()
    q = of_ranks(COLUMNS[name], (0, 20, 21, a.shape[1])).double()
    rest = torch.linalg.vector_norm(a - q @ (q.mT @ a), dim=-2)
    assert float((rest / torch.linalg.vector_norm(a, dim=-2)).max()) < 5e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_householder_where_nothing_waits(dtype: torch.dtype) -> None:
    a = random(2, 40, 6).to(dtype)
    q = orthonormal(a)
    assert q.dtype == dtype and loss_of_orthogonality(q) < 1e-5
    torch.testing.assert_close(q @ (q.mT @ a), a)


def spectrum(values: Tensor, seed: int = 0) -> Tensor:
    """A Gram matrix with these eigenvalues."""
    basis = torch.linalg.qr(random(len(values), len(values), seed=seed).double())[0]
    return basis @ torch.diag(values.double()) @ basis.T


@pytest.mark.parametrize(
    "values",
    [
        torch.logspace(0, -12, 13),
        torch.linspace(1, 0.1, 13),
        torch.ones(13),
        torch.cat((torch.ones(3), torch.zeros(10))),
        torch.zeros(13),
        torch.logspace(0, -12, 13) * 1e-30,
    ],
    ids=["steep", "flat", "equal", "low rank", "zero", "small"],
)
def test_dominant_holds_nearly_the_most_energy(values: Tensor) -> None:
    """From any start: at most what eigenvectors hold, and where they stand out, nearly that."""
    grams = torch.stack([spectrum(values, seed) for seed in range(20)])
    best, energies = dominant(grams, 5)
    energy = energies.sum(-1)
    assert loss_of_orthogonality(best) < 1e-9
    most = float(values.double().sort(descending=True).values[:5].sum())
    assert (energy <= most * (1 + 1e-9)).all()
    assert (energy >= most * 0.9).all()
    torch.testing.assert_close(energies, (best.mT @ grams @ best).diagonal(0, 1, 2))


def test_dominant_orders_columns_by_energy() -> None:
    best, _ = dominant(spectrum(torch.logspace(0, -6, 13))[None], 5)
    energies = (best.mT @ spectrum(torch.logspace(0, -6, 13)) @ best)[0].diagonal()
    assert torch.equal(energies, energies.sort(descending=True).values)


def test_dominant_settles_over_steps() -> None:
    """Columns that start in the order of their energy end in the eigenvectors' span."""
    values = torch.logspace(0, -3, 13)
    gram, start = spectrum(values), torch.eye(13, dtype=torch.float64)
    for _ in range(6):
        best, energy = dominant((start.T @ gram @ start)[None], 5)
        rest = random(13, 8, seed=1).double()
        start = torch.linalg.qr(torch.cat((start @ best[0], rest), dim=1))[0]
    assert float(energy.sum()) == pytest.approx(float(values[:5].double().sum()), rel=1e-9)


def test_tracking_sketch_keeps_what_holds_something() -> None:
    u, fresh, weights = (
        random(2, 30, 4),
        random(2, 30, 6, seed=1),
        random(2, 30, seed=2).abs() + 0.1,
    )
    u[1, :, 2] = 0
    sketch = tracking_sketch(u, fresh, weights) / weights[..., None]
    for b in range(2):
        for j in range(6):
            column = u[b, :, j] * weights[b] if j < 4 and not (b == 1 and j == 2) else None
            want = fresh[b, :, j] if column is None else column / column.norm()
            torch.testing.assert_close(sketch[b, :, j], want)
    narrow = tracking_sketch(u, fresh[..., :2], weights)
    torch.testing.assert_close(narrow, sketch[..., :2] * weights[..., None])
