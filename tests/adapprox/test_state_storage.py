# SPDX-License-Identifier: Apache-2.0
"""What a state holds alive is what metrics() says of it: no factor is a view of a wider tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from adapprox_ds import Adapprox
from adapprox_ds.adapprox.moment import LowRankMoment
from adapprox_ds.adapprox.quantized import QuantizedMoment

SHAPES = ((40, 30), (64, 9), (30,), (2, 2))
#: Ranks that fall to 1, and ones that stay.
FALLS = {"rank_max": 4, "rank_init": 4, "rank_step": 4, "rank_beta": 0.0, "error_threshold": 0.99}
KINDS: dict[str, dict[str, Any]] = {
    "tracking": {"rank_max": 4},
    "tracking, falls": FALLS,
    "tracking, bf16": {**FALLS, "factor_dtype": "bf16", "first_moment": "bf16"},
    "tracking, int8": {**FALLS, "first_moment": "int8"},
    "paper": {"preset": "paper", "rank_max": 4},
    "paper, falls": {"preset": "paper", **FALLS},
    "paper, falls without oversampling": {"preset": "paper", **FALLS, "oversampling": 0},
    "paper, bf16": {"preset": "paper", **FALLS, "factor_dtype": "bf16"},
    "rank 1": {"rank_max": 1},
    "paper, rank 1": {"preset": "paper", "rank_max": 1},
}


def tensors(state: dict[str, Any]) -> Iterator[Tensor]:
    """What a parameter's moments physically are."""
    for key in ("exp_avg", "exp_avg_sq"):
        moment = state[key]
        if isinstance(moment, LowRankMoment):
            yield moment.store.dense
            yield from (x for b in moment.store.factors for x in (b.q, b.u))
        elif isinstance(moment, QuantizedMoment):
            yield from (moment.store.codes, moment.store.scales)
        else:
            yield moment


def bytes_alive(optimizer: Adapprox) -> int:
    """Of all storages, each counted once."""
    held = [x.untyped_storage() for state in optimizer.state.values() for x in tensors(state)]
    return sum({s.data_ptr(): s.nbytes() for s in held if s.nbytes()}.values())


def step(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, t: int) -> None:
    generator = torch.Generator().manual_seed(t)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", ["new", "AdamW's", "resumed"])
def test_bytes_of_a_state(kind: str, start: str) -> None:
    """After each step, however it began."""
    knobs = KINDS[kind]
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = Adapprox(params, **knobs)
    if start == "AdamW's" and "preset" not in knobs:  # the paper's step refuses it
        adamw = torch.optim.AdamW(params)
        step(params, adamw, 0)
        optimizer.load_state_dict(adamw.state_dict())
    if start == "resumed":
        before = Adapprox(params, **knobs)
        for t in range(3):
            step(params, before, t)
        optimizer.load_state_dict(before.state_dict())
    for t in range(4):
        step(params, optimizer, t)
        assert bytes_alive(optimizer) == optimizer.metrics().state_bytes
    ranks = {m.rank for m in optimizer.metrics().parameters.values()}
    assert ranks == {1} if "error_threshold" in knobs or knobs["rank_max"] == 1 else ranks != {1}
