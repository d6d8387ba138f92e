# SPDX-License-Identifier: Apache-2.0
"""Adapprox in plain torch follows Algorithm 3, and the tracking step, written naively in fp64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from adapprox_ds import Adapprox
from adapprox_ds.adapprox import algebra
from tests.adapprox.oracle import FragmentOracle, Settings

SHAPES = {
    "vector": (17,),
    "scalar": (),
    "tall": (40, 12),
    "wide": (9, 33),
    "stack": (4, 10, 14),
    "conv": (12, 6, 3, 3),
    "tiny": (2, 2),
    "row": (1, 8),
}
STEPS = 50


def gradients(step: int, shape: tuple[int, ...], index: int) -> torch.Tensor:
    """Gradients with structure (a low-rank scale pattern) and noise, as real ones have."""
    generator = torch.Generator().manual_seed(1000 * index + step)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    scale = torch.linspace(0.1, 3.0, max(noise.numel(), 1), dtype=torch.float64)
    return (noise * scale.reshape(-1)[: noise.numel()].reshape(shape)).float().double()


ADAPTS = Settings(k0=4, kmax=6, delta=1, xi=0.05, p=3)
#: After the first steps one pass a step, unless updates are clipped or guided.
TRACKS = replace(ADAPTS, tracking=True, bias_correction=True, nesterov=True, clip=math.inf)
METHODS = {
    "paper": replace(ADAPTS, l=3),
    "paper, expanding": replace(ADAPTS, k0=1, delta=2, policy="expand", interval=7, l=3, xi=0.03),
    "tracking": replace(TRACKS, momentum="gradient"),
    "tracking, mean of updates": TRACKS,
    "tracking, clipped": replace(TRACKS, clip=1.0),
    "tracking, guided": replace(TRACKS, momentum="gradient", nesterov=False, guided=True),
    "floor": replace(TRACKS, floor=0.3, bias_correction=False, nesterov=False),
}


@pytest.fixture(autouse=True)
def lift(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp64 Gram matrices are lifted for columns of fp64; by default, for such of fp32."""
    if request.node.callspec.params["dtype"] == torch.float64:
        monkeypatch.setattr(algebra, "_LIFT", 1e-15)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("beta1", "dtype", "bound", "maximize"),
    [
        (0.9, torch.float32, 2e-3, False),
        (0.9, torch.float64, 1e-8, True),
        (0.0, torch.float64, 1e-8, False),
    ],
    ids=["fp32-min", "fp64-max", "fp64-no-mean"],
)
def test_follows_the_oracle(
    method: str, beta1: float, dtype: torch.dtype, bound: float, maximize: bool
) -> None:
    """After each of 50 steps every weight is within ``bound`` of the oracle.

    The bound is absolute, where weights and the sum of all updates are of order one.
    """
    s = METHODS[method]
    follow(replace(s, beta1=beta1, maximize=maximize, guided=s.guided and beta1 > 0), dtype, bound)


@pytest.mark.parametrize("method", ["tracking", "tracking, clipped", "tracking, guided"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-3), (torch.float64, 1e-8)], ids=["fp32", "fp64"]
)
def test_late_starters(method: str, dtype: torch.dtype, bound: float) -> None:
    """Where nothing is known yet all columns are fresh, whatever the step, and all come to life."""
    optimizer = follow(METHODS[method], dtype, bound, first=5)
    blocks = [b for state in optimizer.state.values() for b in state["exp_avg_sq"].store.factors]
    assert blocks
    for block in blocks:
        assert block.q.any(0).all() and block.u.any(0).all()


def follow(s: Settings, dtype: torch.dtype, bound: float, first: int = 0) -> Adapprox:
    """Compare each of 50 steps; before the ``first`` gradients are 0."""
    torch.manual_seed(0)
    params = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    oracles = {name: FragmentOracle(name, p.detach(), s) for name, p in params.items()}
    live = {name: torch.nn.Parameter(p.detach().to(dtype)) for name, p in params.items()}
    optimizer = Adapprox(list(live.items()), **s.knobs())
    for step in range(STEPS):
        for index, (name, p) in enumerate(live.items()):
            g = gradients(step, SHAPES[name], index) * float(step >= first)
            p.grad = g.to(dtype)
            oracles[name].step(g.reshape(-1))
        optimizer.step()
        for name, p in live.items():
            difference = (p.detach().double().reshape(-1) - oracles[name].w).abs().max()
            assert difference <= bound, (name, step, float(difference))
    metrics = optimizer.metrics()
    assert set(metrics.parameters) == {n for n, o in oracles.items() if o.block is not None}
    for name, reported in metrics.parameters.items():
        block = oracles[name].block
        assert reported.rank == block.ranks[-1]
        assert reported.error == pytest.approx(block.xi, rel=1e-3, abs=3e-4)
    moved = {tuple(o.block.ranks) for o in oracles.values() if o.block is not None}
    assert any(len(set(ranks)) > 1 for ranks in moved), "no rank ever changed: nothing was tested"
    return optimizer
