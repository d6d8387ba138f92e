# SPDX-License-Identifier: Apache-2.0
"""The two kinds of a first moment: which group has which, and how one is made of the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapprox_ds import Adapprox
from adapprox_ds.checkpoint.moments import Normalisation, kind_of, shared_settings

BETAS = [(0.9, 0.999), (0.0, 0.9), (0.9, 0.95), (0.5, 0.2), (0.99, 0.9), (0.9, 0.0)]


def moments(gradients: Tensor, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Adam's, of a (steps, n) run of gradients."""
    first, second = torch.zeros_like(gradients[0]), torch.zeros_like(gradients[0])
    for g in gradients:
        first = betas[0] * first + (1 - betas[0]) * g
        second = betas[1] * second + (1 - betas[1]) * g**2
    return first, second


def worst(betas: tuple[float, float], steps: int) -> Tensor:
    """The gradients of which |m| / sqrt(v) is largest, where it is bounded."""
    age = torch.arange(steps - 1, -1, -1, dtype=torch.float64)
    return (max(betas[0], 0.1) / max(betas[1], 0.1)) ** age.clamp(max=100)


def normalisation(betas: tuple[float, float], step: int, **more: Any) -> Normalisation:
    return Normalisation.of_group({"betas": betas, "eps": 1e-8, **more}, step)


def test_the_kind_of_a_group() -> None:
    """Adam's is of gradients, whatever else is in the group; Adapprox's is what it says."""
    w = nn.Parameter(torch.zeros(3, 4))
    assert kind_of(torch.optim.AdamW([w]).param_groups[0]) == "gradient"
    for settings, kind in (({}, "gradient"), ({"preset": "paper"}, "update")):
        assert kind_of(Adapprox([w], **settings).param_groups[0]) == kind
    group = Adapprox([w], momentum="update").param_groups[0]
    assert kind_of(group) == "update"
    assert kind_of(shared_settings(group)) == "gradient"


def test_without_eps_what_never_had_a_gradient_stays_0() -> None:
    n = normalisation((0.9, 0.999), 3, eps=0.0)
    assert n.to_updates(torch.zeros(2), torch.tensor([0.0, 1.0])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("corrects", [True, False])
@pytest.mark.parametrize("steps", [1, 7, 300])
def test_weights_go_on_as_they_went(betas: tuple[float, float], corrects: bool, steps: int) -> None:
    """M is what a mean of gradients is divided into at use, whatever the gradients; and back."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(steps, 64, generator=generator, dtype=torch.float64)
    g[:, 0] = worst(betas, steps)
    g[:, 1] = 0.0
    first, second = moments(g, betas)
    n = normalisation(betas, steps, bias_correction=corrects)
    correction = 1 - betas[1] ** steps if corrects else 1.0
    updates = n.to_updates(first, second)
    expected = first / ((second / correction).sqrt() + 1e-8)
    torch.testing.assert_close(updates, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(n.to_gradients(updates, second), first, rtol=1e-12, atol=0)


def test_adam_corrects_unless_it_says_otherwise() -> None:
    """torch's does not name the setting; DeepSpeed's does."""
    v = torch.full((1,), 4.0)
    assert float(normalisation((0.9, 0.75), 1).to_gradients(torch.ones(1), v)) == 4.0
    group = {"bias_correction": False}
    assert float(normalisation((0.9, 0.75), 1, **group).to_gradients(torch.ones(1), v)) == 2.0


def test_factors_that_lost_an_entry_do_not_make_a_giant_of_it() -> None:
    """Where v reads as 0 and m is not, M is the most that any gradients give, and not m / eps."""
    betas, steps = (0.9, 0.999), 2000
    n = normalisation(betas, steps)
    held = float(n.to_updates(torch.tensor([-1e-3]), torch.zeros(1)))
    first, second = moments(worst(betas, steps)[:, None], betas)
    attained = float(first / (second / (1 - betas[1] ** steps)).sqrt())
    assert held == pytest.approx(-attained, rel=1e-6)
    assert 6 < attained < 7.3
