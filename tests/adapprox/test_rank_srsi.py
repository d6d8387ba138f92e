# SPDX-License-Identifier: Apache-2.0
"""Rank control against the algorithms' text, S-RSI against the optimal truncated SVD."""

from __future__ import annotations

import cmath
import hashlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adapprox_ds import Adapprox
from adapprox_ds.adapprox.rank import RankPolicy, rank_in_use
from adapprox_ds.adapprox.sketch import gaussian_sketch, gaussian_sketches, sketch_key, sketch_width
from adapprox_ds.adapprox.srsi import error_ratio, srsi

#: The paper's settings: k_min 1, k_max 256, delta k = ceil(0.02 * 256), beta_3 0.9, xi 1e-3.
PAPER = RankPolicy(minimum=1, maximum=256, step=6, momentum=0.9, threshold=1e-3)
UNBOUNDED = 10_000
#: Sizes of matrices: tall, wide, square, hardly larger than the sketch.
SIZES = [(96, 64), (50, 120), (80, 80), (12, 9)]


@pytest.mark.parametrize(
    ("rank", "error", "bound", "expected"),
    [
        (100.0, 2e-3, UNBOUNDED, 0.9 * 100 + 0.1 * 106),  # up: k' = k + delta
        (100.0, 5e-4, UNBOUNDED, 0.9 * 100 + 0.1 * 94),  # down: k' = k - delta
        (100.0, 1e-3, UNBOUNDED, 0.9 * 100 + 0.1 * 94),  # up only if xi is above the threshold
        (100.25, 1.0, UNBOUNDED, 0.9 * 100.25 + 0.1 * 106.25),  # the moment is not rounded
        (253.0, 1.0, UNBOUNDED, 0.9 * 253 + 0.1 * 256),  # k' <= k_max
        (256.0, 1.0, UNBOUNDED, 256.0),
        (3.0, 0.0, UNBOUNDED, 0.9 * 3 + 0.1 * 1),  # k' >= k_min
        (1.0, 0.0, UNBOUNDED, 1.0),
        (30.0, 1.0, 32, 0.9 * 30 + 0.1 * 32),  # k' <= what saves memory
        (32.0, 1.0, 32, 32.0),
    ],
)
def test_reflect_is_algorithm_2(rank: float, error: float, bound: int, expected: float) -> None:
    """k' = clip(k +- delta k), then k <- beta_3 k + (1 - beta_3) k'."""
    assert PAPER.reflect(rank, error, bound) == pytest.approx(expected, rel=1e-12)


def test_rank_climbs_to_the_maximum_and_back() -> None:
    """Over steps: by 0.1 delta k until the clip is met, to k_max in use and back to k_min."""
    k, path = 1.0, []
    for _ in range(500):
        k = PAPER.reflect(k, 1.0, UNBOUNDED)
        path.append(k)
    assert path[:3] == pytest.approx([1.6, 2.2, 2.8])
    assert path == sorted(path) and rank_in_use(k) == 256
    for _ in range(500):
        k = PAPER.reflect(k, 0.0, UNBOUNDED)
    assert rank_in_use(k) == 1


POLICIES = st.builds(
    RankPolicy,
    minimum=st.integers(1, 20),
    maximum=st.integers(20, 60),
    step=st.integers(1, 30),
    momentum=st.floats(0.0, 0.999),
    threshold=st.just(1e-3),
)


@given(POLICIES, st.integers(1, 80), st.floats(0.0, 100.0), st.booleans())
def test_rank_stays_within_its_limits(
    policy: RankPolicy, bound: int, start: float, rising: bool
) -> None:
    """k_min <= k <= min(k_max, bound); a block too small for k_min has its bound instead."""
    high = min(policy.maximum, bound)
    low = min(policy.minimum, high)
    k = policy.clip(start, bound)
    assert low <= k <= high and (k == start or k in (low, high))
    after = policy.reflect(k, 1.0 if rising else 0.0, bound)
    assert low - 1e-9 <= after <= high + 1e-9
    assert low <= rank_in_use(after) <= high
    assert after >= k - 1e-9 if rising else after <= k + 1e-9
    assert abs(after - k) <= (1 - policy.momentum) * policy.step + 1e-9


@pytest.mark.parametrize(
    ("moment", "used"),
    [(1.0, 1), (1.49, 1), (1.5, 2), (2.5, 3), (7.51, 8), (255.6, 256), (0.2, 1), (0.0, 1)],
)
def test_rank_in_use(moment: float, used: int) -> None:
    """Rounded to the nearest, halves up, never below 1."""
    assert rank_in_use(moment) == used and isinstance(rank_in_use(moment), int)


def matrix(size: tuple[int, int], spectrum: Tensor, seed: int = 0) -> Tensor:
    """An fp64 matrix with these singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    k = len(spectrum)
    left, right = (
        torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))[0]
        for n in size
    )
    return (left * spectrum) @ right.T


def factor(a: Tensor, rank: int, seed: int = 0, iterations: int = 5) -> tuple[Tensor, Tensor]:
    """S-RSI with the paper's l = p = 5."""
    width = sketch_width(rank, 5, *a.shape)
    return srsi(a, rank, gaussian_sketch(seed, "w", 0, 1, (a.shape[1], width), a), iterations)


#: Singular values by index 1, 2, ..., and how far from the optimal error S-RSI may be.
#: Keeping the first k of the k + p columns, as the paper does, makes oversampling idle: where the
#: spectrum decays slowly the error is some per cent above the optimum, whatever p is.
SPECTRA = {
    "halving": (lambda i: 0.5**i, 0.01),
    "cliff": (lambda i: torch.where(i <= 4, 1.0, 0.01 / i), 0.01),
    "1/i^2": (lambda i: 1.0 / i**2, 0.10),
    "1/i": (lambda i: 1.0 / i, 0.10),
    "slow": (lambda i: torch.exp(-0.05 * i), 0.10),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_close_to_the_optimal_rank_k(name: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    """Within 1 % of the truncated SVD's error where the spectrum has a gap after k."""
    spectrum, excess = SPECTRA[name]
    values = spectrum(torch.arange(1, min(size) + 1, dtype=torch.float64))
    a = matrix(size, values)
    for seed in range(4):
        q, u = factor(a.to(dtype), 4, seed)
        error = (a - q.double() @ u.double().T).norm()
        optimum = values[4:].square().sum().sqrt()
        assert 1 - 1e-3 <= error / optimum < 1 + excess


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
def test_factors(size: tuple[int, int], dtype: torch.dtype, eps: float) -> None:
    """Exact for rank k; Q is orthonormal and U = A^T Q, also where k + p > min(m, n)."""
    for rank in (1, 3, 9):
        a = matrix(size, torch.linspace(2.0, 1.0, rank, dtype=torch.float64)).to(dtype)
        q, u = factor(a, rank)
        assert (q.shape, u.shape) == ((size[0], rank), (size[1], rank))
        assert q.dtype == u.dtype == dtype and q.is_contiguous() and u.is_contiguous()
        assert (q.T @ q - torch.eye(rank, dtype=dtype)).abs().max() < eps
        assert (u - a.T @ q).abs().max() < eps
        assert (q @ u.T - a).abs().max() < eps
        assert error_ratio(a, q, u) < eps


def test_more_iterations_come_closer() -> None:
    """Each power iteration helps on a slow spectrum; one alone is clearly worse than five."""
    a = matrix((96, 64), 1.0 / torch.arange(1, 65, dtype=torch.float64))
    errors = [
        sum(float(error_ratio(a, *factor(a, 8, seed, iterations))) for seed in range(5))
        for iterations in (1, 2, 5)
    ]
    assert errors[0] > 1.03 * errors[2] and errors[0] > errors[1] > errors[2]


def test_zero_matrix() -> None:
    """Q is orthonormal, Q U^T = 0 and xi = 0, not NaN."""
    zero = torch.zeros(20, 12)
    q, u = factor(zero, 3)
    assert torch.allclose(q.T @ q, torch.eye(3), atol=1e-6)
    assert torch.equal(u, torch.zeros(12, 3)) and float(error_ratio(zero, q, u)) == 0.0


@pytest.mark.parametrize("scale", [1e27, 1e12, 1e-12, 1e-30])
def test_scale_does_not_matter(scale: float) -> None:
    """Second moments are squares: products of two of their norms leave the range of fp32."""
    a = matrix((60, 40), 1.0 / torch.arange(1, 41, dtype=torch.float64)).abs().float()
    q, u = factor(a, 5)
    scaled_q, scaled_u = factor(a * scale, 5)
    torch.testing.assert_close(scaled_q @ (scaled_u / scale).T, q @ u.T, rtol=1e-3, atol=1e-4)
    xi, scaled_xi = error_ratio(a, q, u), error_ratio(a * scale, scaled_q, scaled_u)
    assert float(scaled_xi) == pytest.approx(float(xi), rel=1e-3)


@pytest.mark.parametrize("scale", [1e15, 1e-18, 1e-25])
@pytest.mark.parametrize("preset", [None, "paper"])
def test_extreme_gradients_give_sane_updates(scale: float, preset: str | None) -> None:
    """Of the optimizer: finite, and never larger than the clip threshold allows: RMS <= lr."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((24, 16), (8, 6, 3, 3), (11,))]
    optimizer = Adapprox(params, lr=1e-2, weight_decay=0.0, rank_max=4, preset=preset)
    for _ in range(6):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator) * scale
        optimizer.step()
        for p, old in zip(params, before, strict=True):
            rms = float((p.detach() - old).double().square().mean().sqrt())
            assert math.isfinite(rms) and rms <= 1e-2 * 1.001
            assert scale < 1 or rms > 0.05 * 1e-2


@pytest.mark.parametrize("residual", [0.5, 1e-2, 1e-3, 1e-4])
def test_error_ratio(residual: float) -> None:
    """In fp32 as in fp64, also around the paper's threshold, where norms cancel."""
    a = matrix((60, 40), torch.tensor([1.0, residual], dtype=torch.float64))
    left, values, right = torch.linalg.svd(a)
    q, u = left[:, :1], right[:1].T * values[0]
    exact = float((a - q @ u.T).norm() / a.norm())
    assert exact == pytest.approx(residual / math.hypot(1.0, residual))
    ratio = error_ratio(a.float(), q.float(), u.float())
    assert ratio.shape == () and float(ratio) == pytest.approx(exact, rel=1e-2)
    assert float(error_ratio(a, q, u)) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(
    ("rank", "oversampling", "rows", "cols", "width"),
    [(8, 5, 100, 90, 13), (8, 5, 10, 90, 10), (8, 5, 100, 9, 9), (1, 0, 5, 5, 1)],
)
def test_sketch_width(rank: int, oversampling: int, rows: int, cols: int, width: int) -> None:
    """k + p, within the matrix."""
    assert sketch_width(rank, oversampling, rows, cols) == width


KEY = (3, "layers.0.w", 7, 11)
F32 = torch.empty(0)


def draw(seed: int, name: str, first_row: int, step: int, like: Tensor = F32) -> Tensor:
    return gaussian_sketch(seed, name, first_row, step, (40, 6), like)


def test_sketch_is_reproducible() -> None:
    """Same key, same draw, whatever the global random state, which is left alone."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw(*KEY)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(draw(*KEY), first)
    assert abs(float(first.mean())) < 0.2 and abs(float(first.std()) - 1) < 0.15


def test_sketch_is_the_same_in_every_release() -> None:
    """Else a run that is resumed after an upgrade is not the unbroken one: SplitMix64, Box-Muller.

    Here with Python's integers; the key's hash is that of "seed, name, row, step".
    """
    key = int.from_bytes(hashlib.blake2b(b"3\0w\0005\0007", digest_size=8).digest(), "little")
    pairs, expected = 4, []
    for i in range(1, pairs + 1):
        x = (key + i * 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        x ^= x >> 31
        radius = math.sqrt(-2 * math.log(((x >> 40) + 1) / 2**24))
        expected.append(cmath.rect(radius, 2 * math.pi * (x % 2**24) / 2**24))
    flat = [z.real for z in expected] + [z.imag for z in expected]
    found = gaussian_sketch(3, "w", 5, 7, (7, 1), F32).view(-1)
    torch.testing.assert_close(found, torch.tensor(flat[:7]), rtol=1e-5, atol=1e-6)


def test_sketches_are_normal_and_independent() -> None:
    """Moments, lags and correlations between blocks, each within five standard deviations."""
    count, size = 64, (500, 8)
    keys = [sketch_key(0, f"layers.{i}.w", 0, 1) for i in range(count)]
    x = gaussian_sketches(keys, size, F32).view(count, -1).double()
    n = x.numel()
    assert abs(float(x.mean())) < 5 / n**0.5
    assert abs(float(x.square().mean()) - 1) < 5 * (2 / n) ** 0.5
    assert abs(float(x.pow(4).mean()) - 3) < 5 * (96 / n) ** 0.5
    half = x.shape[1] // 2  # where sines follow cosines
    for lag in (1, 8, half - 1, half, half + 1):
        assert abs(float((x[:, :-lag] * x[:, lag:]).mean())) < 5 / (n / 2) ** 0.5
    correlation = torch.corrcoef(x).fill_diagonal_(0).abs().max()
    assert float(correlation) < 5.5 / x.shape[1] ** 0.5


def test_a_stack_of_sketches_is_each_ones_own() -> None:
    keys = [sketch_key(seed, "w", 0, 1) for seed in range(3)]
    for seed, sketch in enumerate(gaussian_sketches(keys, (33, 5), F32)):
        assert torch.equal(sketch, gaussian_sketch(seed, "w", 0, 1, (33, 5), F32))


@pytest.mark.parametrize(
    "key",
    [
        (4, "layers.0.w", 7, 11),
        (3, "layers.1.w", 7, 11),
        (3, "layers.0.w", 8, 11),
        (3, "layers.0.w", 7, 12),
        (3, "layers.0.w", 71, 1),
        (3, "layers.0.w7", 1, 1),
        (37, "layers.0.w", 11, 3),
    ],
    ids=str,
)
def test_every_part_of_the_key_changes_the_sketch(key: tuple[int, str, int, int]) -> None:
    """Seed, name, first row and step; none runs into the next."""
    other, first = draw(*key), draw(*KEY)
    assert (other != first).float().mean() > 0.99
    assert abs(float((other * first).mean())) < 0.3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_sketch_does_not_depend_on_the_dtype(dtype: torch.dtype) -> None:
    """The fp32 draw, cast."""
    cast = draw(*KEY, like=torch.empty(0, dtype=dtype))
    assert cast.dtype == dtype and torch.equal(cast, draw(*KEY).to(dtype))
