# SPDX-License-Identifier: Apache-2.0
"""``eps=0``: an element without a gradient has no quotient, and must not spoil the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adapprox_ds import Adapprox

KNOBS: list[dict[str, Any]] = [
    {},
    {"clip_threshold": 1.0},
    {"clip_threshold": 1.0, "floor": 0.0, "momentum": "update"},
    {"clip_threshold": 1.0, "floor": 0.0, "guidance": "cosine"},
    {"betas": (0.0, 0.999), "floor": 0.0, "clip_threshold": 1.0},
    {"preset": "paper", "rank_max": 2},
]
#: Its square, and a thousandth of that, are 0 in fp32.
VANISHING = 1e-30


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("small", [0.0, VANISHING])
def test_dead_elements(
    knobs: dict[str, Any], backend: str, small: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices and vectors, whole rows and single elements: all others go on as with a tiny eps."""
    monkeypatch.setenv("ADAPPROX_KERNELS", backend)
    random = torch.Generator().manual_seed(0)
    grads = [torch.randn(24, 40, generator=random), torch.randn(30, generator=random)]
    for g in grads:
        g[0] = small
    grads[0][3, 5] = grads[0][:, 7] = grads[1][4] = small
    runs = []
    for eps in (0.0, 1e-12):
        params = [torch.nn.Parameter(torch.ones_like(g)) for g in grads]
        optimizer = Adapprox(params, lr=0.01, weight_decay=0.0, eps=eps, **knobs)
        for step in range(4):
            for p, g in zip(params, grads, strict=True):
                p.grad = g * (1 + step % 2)
            optimizer.step()
        runs.append([p.detach() for p in params])
    for p, twin, g in zip(*runs, grads, strict=True):
        assert bool(p.isfinite().all())
        assert torch.equal(p[g == 0], torch.ones_like(p)[g == 0])
        moved = g.abs() > 1e-3
        torch.testing.assert_close(p[moved], twin[moved], rtol=1e-5, atol=1e-5)
        assert (p[moved] - 1).abs().mean() > 0.005
