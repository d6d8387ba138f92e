# SPDX-License-Identifier: Apache-2.0
"""rank_policy="expand": ranks that grow from a small start until the error is met."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adapprox_ds import Adapprox
from adapprox_ds.adapprox.rank import RankPolicy
from adapprox_ds.adapprox.srsi import error_ratio, error_ratios, srsi

POLICY = RankPolicy(2, 20, 3, 0.9, 0.1, kind="expand", start=2, interval=5)
FREE = 10_000


def falling(rank: int, met_at: int) -> list[float]:
    """Error ratios of 1, 2, ... columns, which meet the threshold from ``met_at`` on."""
    return [0.05 if k >= met_at else 0.5 for k in range(1, rank + 1)]


@pytest.mark.parametrize(
    ("rank", "met_at", "t", "expected"),
    [
        (2, 9, 1, 5),  # not met: delta k more
        (5, 4, 1, 5),  # met: stays, though fewer would do
        (20, 99, 3, 20),  # not beyond k_max
        (11, 4, 5, 5),  # tried again: of 2, 5, 8 the first that meets it
        (11, 2, 10, 2),  # down to k_0
        (11, 11, 5, 11),  # none of 2, 5, 8 does
        (11, 99, 5, 14),  # nor do all
    ],
)
def test_next_rank(rank: int, met_at: int, t: int, expected: int) -> None:
    assert POLICY.next_rank(rank, falling(rank, met_at), FREE, t) == expected


@given(
    st.integers(1, 40), st.integers(1, 60), st.integers(1, 20), st.integers(1, 30),
    st.integers(1, 8), st.integers(1, 30),
)  # fmt: skip
def test_limits(rank: int, met_at: int, t: int, bound: int, step: int, start: int) -> None:
    """Within k_min, k_max and the block's bound, whatever the errors; it falls only on a try."""
    policy = RankPolicy(1, 30, step, 0.9, 0.1, kind="expand", start=start, interval=5)
    rank = min(rank, 30, bound)
    after = policy.next_rank(rank, falling(rank, met_at), bound, t)
    assert 1 <= after <= min(30, bound)
    assert after == int(after)
    assert after >= rank or (t % 5 == 0 and met_at <= after)


def test_error_ratios_are_those_of_the_first_columns() -> None:
    """Without a residual of each; no digits are lost at errors as small as the threshold."""
    a = low_rank(40, 30, [1.0, 0.1, 0.01, 3e-3, 1e-3, 5e-4])
    q, u = srsi(a, 6, torch.randn(30, 9, generator=torch.Generator().manual_seed(1)), 3)
    found = error_ratios(a, q, u)
    for k in range(1, 7):
        exact = error_ratio(a.double(), q[:, :k].double(), u[:, :k].double())
        assert float(found[k - 1]) == pytest.approx(float(exact), rel=1e-3, abs=1e-6)


def low_rank(rows: int, cols: int, values: list[float]) -> Tensor:
    """A matrix of these singular values."""
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(rows, len(values), generator=generator))[0]
    right = torch.linalg.qr(torch.randn(cols, len(values), generator=generator))[0]
    return left * torch.tensor(values) @ right.T


def test_ranks_follow_the_gradients() -> None:
    """Squares of rank 5 ask for 5; when gradients become simple, a try finds that 1 will do."""
    generator = torch.Generator().manual_seed(0)
    rich = (torch.rand(40, 5, generator=generator) @ torch.rand(5, 30, generator=generator)).sqrt()
    simple = torch.outer(torch.rand(40, generator=generator), torch.rand(30, generator=generator))
    p = torch.nn.Parameter(torch.zeros(40, 30))
    optimizer = Adapprox(
        [p],
        warm_start=False,
        betas=(0.9, 0.5),
        rank_policy="expand",
        rank_max=8,
        rank_interval=10,
        error_threshold=1e-2,
    )
    ranks = []
    for step in range(60):
        p.grad = rich if step < 20 else simple
        optimizer.step()
        ranks.append(next(iter(optimizer.metrics(synchronize=True).parameters.values())).rank)
    assert ranks[:3] == [1, 2, 3]
    assert all(b - a <= 1 for a, b in pairwise(ranks))
    assert 4 <= ranks[19] <= 5
    assert ranks[-1] == 1
