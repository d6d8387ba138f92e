# SPDX-License-Identifier: Apache-2.0
"""guidance="cosine": how far an update goes by how it agrees with the first moment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adapprox_ds import Adapprox

SHAPES = {"matrix": (24, 16), "vector": (30,)}
METHODS: dict[str, dict[str, Any]] = {
    "tracking": {},
    "tracking, int8": {"first_moment": "int8"},
}


def moved(before: Tensor | None, gradient: Tensor, knobs: dict[str, Any]) -> Tensor:
    """What a step with ``gradient`` adds to zero weights, after one with ``before``."""
    p = torch.nn.Parameter(torch.zeros_like(gradient))
    optimizer = Adapprox([p], lr=1.0, weight_decay=0.0, clip_threshold=float("inf"), **knobs)
    if before is not None:
        p.grad = before
        optimizer.step()
        p.detach().zero_()
    p.grad = gradient.clone()
    optimizer.step()
    return p.detach()


def signs(shape: tuple[int, ...]) -> Tensor:
    """Of one size, so that what normalises them keeps their direction."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).sign()


def orthogonal(x: Tensor) -> Tensor:
    """``x`` with the sign of every other element changed: as many products are 1 as are -1."""
    flips = torch.ones(x.numel())
    flips[::2] = -1.0
    return x * flips.view(x.shape)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    ("direction", "gain"),
    [("parallel", 2.0), ("orthogonal", 1.0), ("opposite", 0.5), ("first", 1.0), ("zero", 1.0)],
)
def test_gain(
    method: str, shape: tuple[int, ...], maximize: bool, direction: str, gain: float
) -> None:
    """The same step, longer or shorter: at most doubled, also where the two are parallel."""
    g = signs(shape)
    before = {
        "parallel": g,
        "orthogonal": orthogonal(g),
        "opposite": -g,
        "first": None,
        "zero": torch.zeros_like(g),
    }[direction]
    knobs = {**METHODS[method], "maximize": maximize}
    plain = moved(before, g, knobs)
    assert plain.abs().max() > 0.01
    torch.testing.assert_close(
        moved(before, g, {**knobs, "guidance": "cosine"}), gain * plain, rtol=1e-3, atol=1e-6
    )


def test_a_parameter_is_guided_as_a_whole() -> None:
    """Not element by element: a gradient that agrees in half of its elements moves all alike."""
    g = signs((24, 16))
    before = g.clone()
    before[:12] = -before[:12]
    plain = moved(before, g, {})
    ratio = moved(before, g, {"guidance": "cosine"}) / plain
    torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio[0, 0])))


@pytest.mark.parametrize(
    ("knobs", "allowed"),
    [
        ({"betas": (0.0, 0.999)}, r'"none" with betas\[0\] = 0'),
        ({"momentum": "update"}, '"none" with momentum="update"'),
    ],
)
def test_where_it_has_no_meaning(knobs: dict[str, Any], allowed: str) -> None:
    with pytest.raises(ValueError, match=rf"guidance='cosine' is not allowed; allowed: {allowed}"):
        Adapprox([torch.nn.Parameter(torch.zeros(4, 4))], guidance="cosine", **knobs)
