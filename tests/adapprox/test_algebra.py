# SPDX-License-Identifier: Apache-2.0
"""The step's small algebra, of products and Cholesky factors alone, against decompositions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adapprox_ds.adapprox.algebra import (
    balance,
    dominant,
    estimated_ratios,
    gram,
    solve,
    unit_basis,
    warm,
)

F64 = torch.float64
#: Squares of norms below this are none.
TINY = torch.finfo(F64).tiny


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def of_rank(*size: int, rank: int, seed: int = 0) -> Tensor:
    *batch, rows, cols = size
    return random(*batch, rows, rank, seed=seed) @ random(*batch, rank, cols, seed=seed + 1)


def lost(q: Tensor) -> float:
    """Of orthonormality."""
    eye = torch.eye(q.shape[-1], dtype=F64)
    return float((q.double().mT @ q.double() - eye).abs().max())


#: Columns, and the dimensions that they span.
COLUMNS: dict[str, tuple[Tensor, int]] = {
    "random": (random(2, 300, 13), 13),
    "one column": (random(1, 50, 1), 1),
    "square": (random(1, 21, 21), 21),
    "zero": (torch.zeros(2, 50, 7), 0),
    "one zero column": (random(1, 50, 5) * torch.tensor([1.0, 1, 0, 1, 1]), 4),
    "equal": (torch.ones(2, 50, 7), 1),
    "equal and square": (torch.ones(1, 7, 7), 1),
    "near dependence": (random(1, 400, 1) + 1e-4 * random(1, 400, 13, seed=1), 13),
    "low rank": (of_rank(1, 3000, 69, rank=4), 4),
    "far scales": (random(1, 60, 9) * torch.logspace(-30, 10, 9), 9),
    "far scales in a column": (random(1, 60, 9) * torch.logspace(-12, 3, 60)[:, None], 9),
    "tiny": (random(1, 60, 9) * 1e-30, 9),
    "huge": (random(1, 60, 9) * 1e30, 9),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_unit_basis_is_orthonormal_in_what_the_columns_span(name: str) -> None:
    """As many directions as there are, of norm 1; the others have less, and none is larger.

    What columns of fp32 have in directions of less than 1e-6 is rounding: none is as large as it.
    """
    a, rank = COLUMNS[name]
    basis = a.double() @ unit_basis(gram(a))
    assert basis.isfinite().all()
    for matrix in basis:
        values = torch.linalg.svdvals(matrix)
        assert float((values[:rank] - 1).abs().max() if rank else 0) < 2e-4
        assert float(values.max()) <= 1 + 1e-9
        # Rounding of the columns themselves, 1e-7, over the lift, 1e-6.
        assert (values[rank:] < 0.9).all()


@pytest.mark.parametrize("name", COLUMNS)
def test_unit_basis_spans_the_columns(name: str) -> None:
    """Each column lies in the basis but for the lift: 1e-6 of its norm."""
    a = COLUMNS[name][0].double()
    basis = a @ unit_basis(gram(a))
    rest = torch.linalg.vector_norm(a - basis @ (torch.linalg.pinv(basis, rtol=1e-7) @ a), dim=-2)
    assert float((rest / torch.linalg.vector_norm(a, dim=-2).clamp(min=TINY)).max()) < 2e-6


def test_unit_basis_keeps_the_order_of_columns() -> None:
    """The first columns of the basis span the first of the sketch, which hold most."""
    a = random(2, 90, 8).double()
    basis = a @ unit_basis(gram(a))
    expected = torch.linalg.qr(a)[0]
    torch.testing.assert_close((basis * expected).sum(-2).abs(), torch.ones(2, 8, dtype=F64))


class Sketched:
    """What a pass makes of T, whose weights are 1.

    Args:
        t: T, (N, m, n).
        width: w of the sketch.
        tests: t of the test sketch.
        known: (N, m, j) and (N, n, j), the first columns of test sketch and sketch.
    """

    def __init__(
        self, t: Tensor, width: int, tests: int, known: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self.t = t = t.double()
        self.z, x = (random(len(t), n, 20, seed=n).double() / n**0.5 for n in t.shape[1:])
        if known is not None:
            self.z, x = (torch.cat(pair, dim=2) for pair in zip(known, (self.z, x), strict=True))
        self.z, x = self.z[..., :tests], x[..., :width]
        self.y = t @ x
        self.p = self.z.mT @ t
        self.products = (gram(self.y), self.z.mT @ self.y, self.p @ self.p.mT)

    def solved(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Q, U and the energies, by the algebra."""
        of_y, of_p, energy = solve(*self.products, rank)
        return self.y @ of_y, self.p.mT @ of_p, energy

    def expected(self, rank: int) -> tuple[Tensor, Tensor]:
        """The best approximation of B P of rank k, by decompositions, and its energy."""
        found = []
        for y, z, p in zip(self.y, self.z, self.p, strict=True):
            left, values, _ = torch.linalg.svd(y / max(float(y.abs().max()), TINY))
            basis = left[:, : max(int((values > 1e-9).sum()), 1)][:, : y.shape[1]]
            part = torch.linalg.pinv(z.T @ basis, rtol=1e-9) @ p
            left, values, right = torch.linalg.svd(part, full_matrices=False)
            found.append((basis @ left[:, :rank] * values[:rank] @ right[:rank], values[:rank]))
        approx, values = zip(*found, strict=True)
        return torch.stack(approx), torch.stack([v.square().sum() for v in values])


STEEP = torch.linalg.qr(random(2, 40, 12).double())[0] * torch.logspace(0, -8, 12, dtype=F64)
MATRICES: dict[str, Tensor] = {
    "steep": STEEP @ torch.linalg.qr(random(2, 30, 12, seed=1).double())[0].mT,
    "steep and tiny": 1e-30 * STEEP @ random(2, 30, 12, seed=1).double().mT,
    "steep and huge": 1e30 * STEEP @ random(2, 30, 12, seed=1).double().mT,
    "rank 3": of_rank(2, 40, 30, rank=3),
    "rank 1": of_rank(2, 40, 30, rank=1),
    "one row": random(1, 40, 30) * (torch.arange(40) == 3)[:, None],
    "one column": random(1, 40, 30) * (torch.arange(30) == 3),
    "one element": torch.ones(1, 40, 30) * (torch.arange(1200) == 77).view(40, 30),
    "equal": torch.ones(1, 40, 30),
}


@pytest.mark.parametrize("name", MATRICES)
def test_solve_is_generalised_nystrom(name: str) -> None:
    """Energies fall steeply or end: the approximation is that of decompositions."""
    sketched = Sketched(MATRICES[name], 9, 14)
    q, u, energy = sketched.solved(5)
    approx, held = sketched.expected(5)
    scale = float(MATRICES[name].double().norm())
    torch.testing.assert_close(q @ u.mT / scale, approx / scale, rtol=0, atol=2e-4)
    torch.testing.assert_close(energy.sum(-1) / scale**2, held / scale**2, rtol=1e-6, atol=0)
    if name == "steep":
        torch.testing.assert_close(energy, energy.sort(descending=True).values)


def test_solve_of_nothing_is_nothing() -> None:
    q, u, energy = Sketched(torch.zeros(2, 40, 30), 9, 14).solved(5)
    assert not q.any() and not u.any() and not energy.any()
    assert not estimated_ratios(energy, torch.zeros(2, 1, dtype=F64)).any()


def test_solve_by_the_basis_projects() -> None:
    """With B itself as test sketch P is B^T T, and what is missed is at right angles."""
    t = MATRICES["steep"] + 1e-3 * random(2, 40, 30, seed=9).double()
    sketched = Sketched(t, 9, 14)
    z = sketched.y @ unit_basis(gram(sketched.y))
    of_y, of_p, energy = solve(gram(sketched.y), z.mT @ sketched.y, z.mT @ t @ t.mT @ z, 5)
    q, u = sketched.y @ of_y, t.mT @ z @ of_p
    assert lost(q) < 1e-6
    torch.testing.assert_close(u, t.mT @ q, rtol=1e-6, atol=1e-9)
    total = t.square().sum((1, 2))
    missed = (t - q @ u.mT).norm(dim=(1, 2)) / total.sqrt()
    found = estimated_ratios(energy, total[:, None])
    torch.testing.assert_close(found, missed[:, None], rtol=1e-4, atol=0)


def test_estimated_ratios_are_never_nan() -> None:
    """More than all there is, as estimates may be, is no error; of nothing there is none."""
    energy = torch.tensor([[2.0, 1.0], [0.5, 0.25], [0.0, 0.0]], dtype=F64)
    total = torch.tensor([[2.5], [1.0], [0.0]], dtype=F64)
    expected = torch.tensor([[0.0], [0.5], [0.0]], dtype=F64)
    torch.testing.assert_close(estimated_ratios(energy, total), expected)


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
def test_dominant_gains_on_its_start(values: Tensor) -> None:
    """At most what eigenvectors hold, and no less than the first columns do."""
    grams = torch.stack([spectrum(values, seed) for seed in range(20)])
    best, energies = dominant(grams, 5)
    energy = energies.sum(-1)
    assert lost(best) < 1e-8
    most = float(values.double().sort(descending=True).values[:5].sum())
    assert (energy <= most * (1 + 1e-9)).all()
    start = grams.diagonal(0, 1, 2)[:, :5].sum(-1)
    assert (energy >= start * (1 - 1e-9)).all()
    torch.testing.assert_close(energies, (best.mT @ grams @ best).diagonal(0, 1, 2))


def test_dominant_settles_over_steps() -> None:
    """Where each step starts with the last one's columns they end as the largest eigenvectors."""
    values = torch.logspace(0, -6, 13)
    kept, start = spectrum(values), torch.eye(13, dtype=F64)
    for step in range(25):
        best, energies = dominant((start.T @ kept @ start)[None], 5)
        rest = random(13, 8, seed=step).double()
        start = torch.linalg.qr(torch.cat((start @ best[0], rest), dim=1))[0]
    torch.testing.assert_close(energies[0], values[:5].double(), rtol=1e-4, atol=0)


def test_warm_keeps_what_holds_something() -> None:
    """Columns of the last factor that hold nothing are fresh; so are those beyond it."""
    kept, fresh = random(2, 30, 4), random(2, 30, 6, seed=1)
    weights = random(2, 30, seed=2).abs() + 0.1
    kept[1, :, 2] = 0
    norms = torch.linalg.vector_norm(kept * weights[..., None], dim=1, keepdim=True)
    sketch = warm(kept, fresh.clone(), weights, norms) / weights[..., None]
    for b in range(2):
        for j in range(6):
            column = kept[b, :, j] * weights[b] if j < 4 and not (b == 1 and j == 2) else None
            want = fresh[b, :, j] if column is None else column / column.norm()
            torch.testing.assert_close(sketch[b, :, j], want)
    narrow = warm(kept, fresh[..., :2].clone(), weights, norms)
    torch.testing.assert_close(narrow, sketch[..., :2] * weights[..., None])


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e18])
def test_balance_is_of_the_product(scale: float) -> None:
    """Weights and floor as V's root itself, formed, would give them, down to the least weight."""
    q, u = random(2, 40, 3), random(2, 30, 3, seed=1)
    q[:, 5], u[:, 7] = 1e-9 * q[:, 5], 0.0
    held = scale**2 * (q.double() @ u.double().mT).square()
    found = balance(q, scale * u, gram(q), gram(scale * u))
    rows, cols = (x.sqrt() for x in found.squared_weights(40))
    for weights, axis in ((rows, 2), (cols, 1)):
        means = held.mean(axis)
        expected = (means / means.mean(-1, keepdim=True)).clamp(min=1e-2).rsqrt()
        torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(rows[:, 5], torch.full((2,), 10.0))
    torch.testing.assert_close(cols[:, 7], torch.full((2,), 10.0))
    of_rows, of_cols = found.floor(0.1)
    least = 0.1 * held.mean(2)[..., None] * held.mean(1)[:, None] / held.mean((1, 2))[:, None, None]
    torch.testing.assert_close(
        (of_rows[..., None] * of_cols[:, None]).double(), least.sqrt(), rtol=1e-5, atol=1e-9 * scale
    )
    # Of some rows, with the sums of all.
    some = balance(q[:, 3:9], scale * u, gram(q), gram(scale * u))
    of_rows, of_cols = (x.sqrt() for x in some.squared_weights(40))
    torch.testing.assert_close(of_rows, rows[:, 3:9])
    assert torch.equal(of_cols, cols)


def test_balance_of_nothing_weighs_all_alike() -> None:
    rows, cols = balance(
        *(torch.zeros(1, n, 3) for n in (9, 7)), *(gram(torch.zeros(1, n, 3)) for n in (9, 7))
    ).squared_weights(9)
    assert (rows == 1).all() and (cols == 1).all()


def test_estimated_ratios_are_right_on_average() -> None:
    """Of noise, whose singular values fall slowly and of which test columns see much."""
    t = random(64, 40, 30) + 3.0 * of_rank(64, 40, 30, rank=3, seed=1)
    left, _, right = torch.linalg.svd(t, full_matrices=False)
    sketched = Sketched(t, 9, 13, (left[..., :5], right[:, :5].mT))
    q, u, energy = sketched.solved(5)
    total = t.double().square().sum((1, 2))
    estimate = estimated_ratios(energy, total[:, None])[:, 0]
    exact = (sketched.t - q @ u.mT).norm(dim=(1, 2)) / total.sqrt()
    assert 0.85 < float(estimate.mean() / exact.mean()) < 1.15
    assert 0.3 < float((estimate / exact).min()) < float((estimate / exact).max()) < 2
