# SPDX-License-Identifier: Apache-2.0
"""Weights in bf16 and fp16: rounded at random, with a compensation, or to nearest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adapprox_ds import Adapprox
from adapprox_ds.core.rounding import keep_weights, load_weights, weight_salt

NARROW = (torch.bfloat16, torch.float16)
#: Of fp16 the least normal number is 2^-14, and the least of all 2^-24.
SCALES = (1e4, 1.0, 1e-3, 2.0**-14, 2.0**-20, 2.0**-24)


def _last_place(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a last place of numbers of that size is worth, fp64: the naive definition."""
    digits, least = (7, -126) if dtype == torch.bfloat16 else (10, -14)
    exponent = torch.floor(torch.log2(x.double().abs().clamp(min=2.0**-140))).clamp(min=least)
    return 2.0 ** (exponent - digits)


def _numbers(scale: float) -> Tensor:
    return torch.randn(4000, generator=torch.Generator().manual_seed(1)) * scale


@pytest.mark.parametrize("dtype", NARROW)
def test_weights_are_rounded_to_neighbours_and_right_on_average(dtype: torch.dtype) -> None:
    for scale in SCALES:
        x, steps = _numbers(scale), 200
        place = _last_place(x, dtype)
        w, total = torch.zeros(4000, dtype=dtype), torch.zeros(4000, dtype=torch.float64)
        for t in range(steps):
            keep_weights(w, None, x, 0, weight_salt(t))
            assert ((w.double() - x.double()).abs() < place).all()
            total += w.double()
        off = (total / steps - x.double()) / place
        # A coin of variance at most 1/4, over steps and numbers.
        assert off.abs().max() < 5 * 0.5 / steps**0.5
        assert off.mean().abs() < 5 * 0.5 / (steps * 4000) ** 0.5


@pytest.mark.parametrize("dtype", NARROW)
def test_a_compensation_keeps_eight_more_bits(dtype: torch.dtype) -> None:
    for scale in SCALES:
        x = _numbers(scale)
        place = _last_place(x, dtype)
        w, rest = torch.zeros(4000, dtype=dtype), torch.zeros(4000, dtype=torch.int8)
        keep_weights(w, rest, x, 0, weight_salt(3))
        held = load_weights(w, rest, torch.float32)
        assert ((held.double() - x.double()).abs() <= place / 256).all()
        # The weight alone is the nearest one, and the compensation is in 1/256 of its last place.
        assert ((w.double() - x.double()).abs() <= place * (0.5 + 1 / 256)).all()
        lower = torch.minimum(place, _last_place(w.float() * (1 - 2.0**-12), dtype))
        assert ((held.double() - w.double()).abs() <= rest.double().abs() * place / 256).all()
        assert ((held.double() - w.double()).abs() >= rest.double().abs() * lower / 256).all()
        # Both together are one number: to nearest it is written as it was.
        again, rest_again = torch.zeros_like(w), torch.zeros_like(rest)
        keep_weights(again, rest_again, held, 0, None)
        assert torch.equal(again, w) and torch.equal(rest_again, rest)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("compensated", [False, True])
def test_special_numbers_stay_and_finite_ones_stay_finite(
    dtype: torch.dtype, compensated: bool
) -> None:
    inf, largest = float("inf"), torch.finfo(dtype).max
    x = torch.tensor([float("nan"), inf, -inf, 0.0, -0.0, largest * (1 + 2.0**-12), -largest])
    for salt in (weight_salt(1), weight_salt(2), None):
        w = torch.zeros(7, dtype=dtype)
        rest = torch.zeros(7, dtype=torch.int8) if compensated else None
        keep_weights(w, rest, x, 0, salt)
        held = load_weights(w, rest, torch.float32)
        assert held[0].isnan() and held[1] == inf and held[2] == -inf
        assert held[3] == 0 and held[4] == 0 and held[4].signbit()
        assert held[5:].isfinite().all() and w[5] == largest and w[6] == -largest


def test_bits_depend_on_the_place_and_the_step_alone() -> None:
    x = _numbers(1.0)
    whole, part, other = (torch.zeros(4000, dtype=torch.bfloat16) for _ in range(3))
    keep_weights(whole, None, x, 7, weight_salt(5))
    keep_weights(part[1000:], None, x[1000:], 1007, weight_salt(5))
    assert torch.equal(whole[1000:], part[1000:])
    keep_weights(other, None, x, 7, weight_salt(6))
    assert not torch.equal(whole, other)


def _run(rounding: str | None, dtype: torch.dtype, lr: float, steps: int = 60) -> Tensor:
    """Where weights come to whose gradients hardly change; in fp64."""
    random = torch.Generator().manual_seed(2)
    matrix = torch.nn.Parameter(torch.randn(48, 40, generator=random).to(dtype))
    vector = torch.nn.Parameter(torch.randn(33, generator=random).to(dtype))
    parameters = [matrix, vector]
    optimizer = Adapprox(parameters, lr=lr, weight_decay=0.1, weight_rounding=rounding)
    of = [torch.randn(p.shape, generator=random) for p in parameters]
    for _ in range(steps):
        for p, g in zip(parameters, of, strict=True):
            p.grad = (g + 0.1 * torch.randn(p.shape, generator=random)).to(dtype)
        optimizer.step()
    found = []
    for p in parameters:
        rest = optimizer.state[p].get("compensation")
        assert (rest is not None) == (rounding == "compensated" and dtype in NARROW)
        found.append(load_weights(p.detach(), rest, torch.float32).double().flatten())
    return torch.cat(found)


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("dtype", NARROW)
def test_updates_far_below_a_last_place_count(
    dtype: torch.dtype, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32 each weight of about 1 moves by 60 lr; bf16's last place is 2^-8 to 2^-7."""
    monkeypatch.setenv("ADAPPROX_KERNELS", kernels)
    lr = 8e-5 if dtype == torch.bfloat16 else 1e-5
    begin = _run("nearest", dtype, lr, steps=0)
    wanted = _run(None, torch.float32, lr) - begin
    # Weights begin as they are in 16 bits.
    wanted -= _run(None, torch.float32, lr, steps=0) - begin

    def moved(rounding: str | None) -> Tensor:
        return _run(rounding, dtype, lr) - begin

    size = wanted.norm()
    assert (moved("nearest") - wanted).norm() > 0.9 * size  # so the bounds below say something
    assert (moved("compensated") - wanted).norm() < 0.03 * size
    # Each weight is off by up to a last place, but what all moved along is right.
    for rounding in ("stochastic", None):
        along = float(moved(rounding) @ wanted / size**2)
        assert abs(along - 1) < 0.2
