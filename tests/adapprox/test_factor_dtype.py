# SPDX-License-Identifier: Apache-2.0
"""factor_dtype="bf16": half the bytes, and a second moment that does not stand still."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from adapprox_ds import Adapprox
from adapprox_ds.core.rounding import round_factor, rounding_salt

METHODS: dict[str, dict[str, Any]] = {
    "tracking": {"rank_max": 4},
    "paper": {"preset": "paper", "rank_max": 4},
}


def trained(steps: int, **knobs: Any) -> tuple[Adapprox, torch.nn.Parameter]:
    """After gradients of one size but for rows and columns: V of rank 1."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(48, 1, generator=generator) + 0.5
    p = torch.nn.Parameter(torch.zeros(48, 32))
    optimizer = Adapprox([p], lr=1e-3, rank_init=4, rank_min=4, **knobs)
    for _ in range(steps):
        p.grad = scale * torch.randn(48, 32, generator=generator).sign()
        optimizer.step()
    return optimizer, p


@pytest.mark.parametrize("method", METHODS)
def test_half_the_bytes(method: str) -> None:
    full, _ = trained(3, **METHODS[method])
    short, q = trained(3, factor_dtype="bf16", **METHODS[method])
    bytes_of = [next(iter(o.metrics().parameters.values())).state_bytes for o in (full, short)]
    assert bytes_of[1] * 2 == bytes_of[0]
    assert short.state[q]["exp_avg_sq"].allocated_bytes * 2 == bytes_of[0]


@pytest.mark.parametrize("method", METHODS)
def test_it_follows_the_full_one(method: str) -> None:
    """Over 300 steps V falls by a quarter; rounded to the nearest it would not move at all."""
    moments = {}
    for kept_in in ("fp32", "bf16"):
        optimizer, p = trained(100, factor_dtype=kept_in, **METHODS[method])
        early = optimizer.state[p]["exp_avg_sq"].to_dense()
        for _ in range(300):
            p.grad = torch.zeros_like(p)
            optimizer.step()
        late = optimizer.state[p]["exp_avg_sq"].to_dense()
        moments[kept_in] = late
        assert float(late.sum() / early.sum()) == pytest.approx(0.999**300, rel=0.02)
    difference = (moments["bf16"] - moments["fp32"]).norm() / moments["fp32"].norm()
    assert 0 < float(difference) < 0.15


def test_rounding_is_right_on_average_and_the_same_anywhere() -> None:
    """Between the two neighbours, mean error far below half a step; a row's noise is its own."""
    salt, bf16 = rounding_salt(7), torch.bfloat16
    x = torch.rand(2, 400, 5) + 1.0
    kept = round_factor(x, bf16, 0, salt)
    error = kept.float() - x
    assert error.abs().max() < 2**-7
    assert error.mean().abs() < 2**-7 / 20
    assert torch.equal(round_factor(x[1:], bf16, 0, salt)[0], kept[1])
    assert torch.equal(round_factor(x[:, 123:], bf16, 123, salt), kept[:, 123:])
    assert not torch.equal(round_factor(x, bf16, 400, salt), kept)
    assert not torch.equal(round_factor(x, bf16, 0, rounding_salt(8)), kept)
    assert torch.equal(round_factor(x.double(), bf16, 0, salt), kept)
    assert round_factor(x, torch.float32, 0, salt) is x


@pytest.mark.parametrize(("saved", "asked"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_a_state_of_another_dtype_is_taken_over(saved: str, asked: str) -> None:
    """As a run goes on with the setting changed; its values stay, but for rounding."""
    optimizer, p = trained(20, factor_dtype=saved, rank_max=4)
    before = optimizer.state[p]["exp_avg_sq"].to_dense()
    state = copy.deepcopy(optimizer.state_dict())
    again, q = trained(1, factor_dtype=asked, rank_max=4)
    again.load_state_dict(state)
    again.param_groups[0]["factor_dtype"] = asked
    q.grad = torch.zeros_like(q)
    again.step()
    moment = again.state[q]["exp_avg_sq"]
    assert {b.q.dtype for b in moment.store.factors} == {
        torch.bfloat16 if asked == "bf16" else torch.float32
    }
    torch.testing.assert_close(moment.to_dense(), 0.999 * before, rtol=0.03, atol=1e-6)
