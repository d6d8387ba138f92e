# SPDX-License-Identifier: Apache-2.0
"""First moments in fewer bits, rounding at random, and the bound of an update, in plain torch."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from adapprox_ds import Adapprox
from adapprox_ds.adapprox.hyperparameters import Hyperparameters
from adapprox_ds.adapprox.quantized import QuantizedMoment
from adapprox_ds.core.rounding import round_stochastically, rounding_salt
from adapprox_ds.report.estimate import estimate

SHAPES = ((40, 300), (128, 130), (7, 3, 50), (260,), (), (2, 2))
KINDS = ("fp32", "bf16", "int8")


def gradient(step: int, index: int, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + index)
    return torch.randn(shape, generator=generator) + 0.3


def start(kind: str, **more: Any) -> tuple[list[torch.nn.Parameter], Adapprox]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]
    return params, Adapprox(params, lr=1e-2, rank_max=4, first_moment=kind, **more)


def train(params: list[torch.nn.Parameter], optimizer: Adapprox, first: int, last: int) -> None:
    for step in range(first, last):
        for i, p in enumerate(params):
            p.grad = gradient(step, i, tuple(p.shape)).to(p.dtype)
        optimizer.step()


def reloaded(
    params: list[torch.nn.Parameter], optimizer: Adapprox
) -> tuple[list[torch.nn.Parameter], Adapprox]:
    """Both, through a file."""
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), params), file)
    file.seek(0)
    state, resumed = torch.load(file, weights_only=False)
    fresh = Adapprox(resumed)
    fresh.load_state_dict(state)
    return resumed, fresh


@pytest.mark.parametrize("preset", [None, "paper"])
@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_small_moments_follow_full_ones(kind: str, preset: str | None) -> None:
    """Within what their rounding can do: a part of the way that weights went."""
    (full, one), (small, two) = start("fp32", preset=preset), start(kind, preset=preset)
    before = [p.detach().clone() for p in full]
    train(full, one, 0, 20)
    train(small, two, 0, 20)
    for one_of, other, p in zip(full, small, before, strict=True):
        a, b = one_of.detach(), other.detach()
        assert not a.numel() > 4 or not torch.equal(a, b)
        # 20 steps of 0.01 go at most 0.2 far; few elements may end where they began.
        assert (a - b).norm() <= 0.02 * max((a - p).norm(), 0.05 * a.numel() ** 0.5)


@pytest.mark.parametrize("momentum", ["gradient", "update"])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bitwise(kind: str, momentum: str) -> None:
    whole, unbroken = start(kind, momentum=momentum)
    train(whole, unbroken, 0, 6)
    params, optimizer = start(kind, momentum=momentum)
    train(params, optimizer, 0, 3)
    resumed, fresh = reloaded(params, optimizer)
    train(resumed, fresh, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert fresh.metrics() == unbroken.metrics()


@pytest.mark.parametrize("before", KINDS)
@pytest.mark.parametrize("after", KINDS)
def test_the_kind_can_change_on_the_way(before: str, after: str) -> None:
    """The setting of the next step is what the moment is kept as."""
    params, optimizer = start(before)
    train(params, optimizer, 0, 3)
    held = [optimizer.state[p]["exp_avg"].float().clone() for p in params]
    optimizer.param_groups[0]["first_moment"] = after
    train(params, optimizer, 3, 4)
    for i, (p, old) in enumerate(zip(params, held, strict=True)):
        first = optimizer.state[p]["exp_avg"]
        assert isinstance(first, QuantizedMoment) == (after == "int8")
        expected_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}
        assert after == "int8" or first.dtype == expected_dtype[after]
        dense = torch.as_tensor(first.to_dense() if after == "int8" else first).float()
        expected = 0.9 * old + 0.1 * gradient(3, i, tuple(p.shape))
        assert (dense - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_is_fp32_whatever_the_parameter_is(dtype: torch.dtype) -> None:
    """To the bytes of the estimate; a run that goes on from a file keeps its bits."""

    def begin() -> tuple[list[torch.nn.Parameter], Adapprox]:
        params = [torch.nn.Parameter(p.detach().to(dtype)) for p in start("fp32")[0]]
        return params, Adapprox(params, lr=1e-2, rank_max=4)

    whole, unbroken = begin()
    mean = [torch.zeros(s) for s in SHAPES]
    for step in range(4):
        train(whole, unbroken, step, step + 1)
        for i, m in enumerate(mean):
            m.lerp_(gradient(step, i, SHAPES[i]).to(dtype).float(), 0.1)
    for p, m in zip(whole, mean, strict=True):
        held = unbroken.state[p]["exp_avg"]
        assert held.dtype == torch.float32
        torch.testing.assert_close(held, m, rtol=1e-5, atol=1e-6)
    shapes = {str(i): s for i, s in enumerate(SHAPES)}
    expected = estimate(shapes, stage=0, world=1, ranks=[4]).adapprox[4].state
    assert (unbroken.metrics().state_bytes,) == expected
    params, optimizer = begin()
    train(params, optimizer, 0, 2)
    resumed, fresh = reloaded(params, optimizer)
    train(resumed, fresh, 2, 4)
    for p, q in zip(whole, resumed, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(unbroken.state[p]["exp_avg"], fresh.state[q]["exp_avg"])


def test_codes_of_low_precision_parameters_are_read_in_full() -> None:
    p = torch.nn.Parameter(torch.zeros(3, 50, dtype=torch.bfloat16))
    optimizer = Adapprox([p], first_moment="int8")
    train([p], optimizer, 0, 1)
    codes = optimizer.state[p]["exp_avg"]
    kept = codes.store.read(0, 150, torch.float32)
    optimizer.param_groups[0].update(first_moment="fp32", lr=0.0)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["exp_avg"].view(-1), kept * 0.9)


def test_codes_of_another_partition_are_refused() -> None:
    params, optimizer = start("int8")
    train(params, optimizer, 0, 1)
    state = optimizer.state_dict()
    state["state"][0]["exp_avg"], state["state"][1]["exp_avg"] = (
        state["state"][i]["exp_avg"].view(-1)[: 40 * 300].clone() for i in (0, 1)
    )
    other = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other[0] = torch.nn.Parameter(torch.randn(300, 40))
    fresh = Adapprox(other)
    state["state"][0] = optimizer.state[params[0]]
    fresh.load_state_dict(state)
    before = [p.detach().clone() for p in other]
    with pytest.raises(RuntimeError, match="exp_avg.*another.*universal checkpoint"):
        train(other, fresh, 1, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, other, strict=True))


def test_bytes() -> None:
    held = {}
    for kind in KINDS:
        params, optimizer = start(kind)
        train(params, optimizer, 0, 1)
        held[kind] = optimizer.metrics().state_bytes
    numel = sum(p.numel() for p in params)
    scales = 40 * 3 + 128 * 2 + 21 + 3 + 1 + 1
    assert held["fp32"] - held["bf16"] == 2 * numel
    # (7, 3, 50) is most nearly square as 21 x 50; (2, 2) is dense, one run.
    assert held["fp32"] - held["int8"] == 3 * numel - 4 * scales


def test_parameters_of_several_dtypes_do_not_mix() -> None:
    """Each is computed in its own precision, whatever it shares a group with."""
    alone = torch.nn.Parameter(torch.linspace(1, 2, 7, dtype=torch.float64))
    beside = [torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(alone.detach().clone())]
    for params in ([alone], beside):
        optimizer = Adapprox(params, lr=1e-3)
        for step in range(3):
            for p in params:
                p.grad = gradient(step, 0, (7,))[: p.numel()].to(p.dtype)
            optimizer.step()
    assert torch.equal(alone, beside[1])


def test_rounding_at_random_is_unbiased_and_to_neighbours() -> None:
    x = torch.tensor([1.0 + 2.0**-9, -3.3, 1e-30, -(2.0**-140), 0.0, 1.0, 3.0e38]).repeat(20000, 1)
    found = round_stochastically(x, 0, rounding_salt(3)).float()
    spacing = 2.0 ** (x.abs().clamp(min=2.0**-126).log2().floor() - 7)
    assert ((found - x).abs() < spacing).all()
    exact = torch.tensor([4, 5])
    assert torch.equal(found[:, exact], x[:, exact])
    bias = ((found.double() - x) / spacing).mean(0).abs()
    assert float(bias.max()) < 5 * 0.5 / 20000**0.5
    again = round_stochastically(x, 0, rounding_salt(4)).float()
    assert not torch.equal(found, again)
    part = round_stochastically(x[10:20], 10 * x.shape[1], rounding_salt(3)).float()
    assert torch.equal(part, found[10:20])


def test_rounding_lets_nan_and_infinity_through() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf]).repeat(500)
    found = round_stochastically(x, 7, rounding_salt(1))
    torch.testing.assert_close(found.float(), x, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.5, 0.3), (0.0, 0.9), (0.99, 0.9)])
@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("nesterov", [True, False])
def test_the_bound_of_an_update(
    betas: tuple[float, float], bias_correction: bool, nesterov: bool
) -> None:
    """No gradients exceed it, and where it is finite some reach it."""
    h = Hyperparameters(betas=betas, bias_correction=bias_correction, nesterov=nesterov)
    b1, b2 = betas
    for steps in (1, 2, 10, 300):
        ages = torch.arange(steps - 1, -1, -1, dtype=torch.float64)
        random = torch.randn(steps, 200, generator=torch.Generator().manual_seed(0)).double()
        weights = (1 - b1) * b1**ages
        if nesterov:
            weights = b1 * weights + (1 - b1) * (ages == 0).double()
        best = (weights / b2**ages)[:, None] if steps <= 10 else random
        g = torch.cat((random, random.exp(), random.abs() ** 5, best), dim=1)
        first = weights @ g
        second = ((1 - b2) * b2**ages) @ g.square()
        quotient = (first / second.sqrt()).abs().max() / h.corrections(steps)[1]
        bound = h.largest_quotient(steps)
        assert float(quotient) <= bound * (1 + 1e-9)
        if steps <= 10 and math.isfinite(bound):
            assert float(quotient) >= bound * (1 - 1e-9)


def test_an_entry_that_factors_lost_does_not_explode() -> None:
    """A row's moment is gone, its mean is not, its gradient is 0: M / D has no bound of its own.

    The step is at most the learning rate times what gradients can make of it.
    """
    p = torch.nn.Parameter(torch.zeros(30, 20))
    optimizer = Adapprox([p], lr=1.0, weight_decay=0.0)
    train([p], optimizer, 0, 3)
    block = optimizer.state[p]["exp_avg_sq"].store.factors[0]
    block.q[4] = 0.0
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    h = Hyperparameters()
    largest = h.largest_quotient(4) * h.corrections(4)[0]
    moved = (p.detach() - before).abs()
    assert float(moved.max()) <= largest * (1 + 1e-5)
    assert float(moved[4].min()) > 0.9 * largest


def test_betas_of_a_scheduler_are_not_held_to_constant_ones() -> None:
    """One-cycle schedules change beta_1: steps of AdamW's size pass."""
    moved = {}

    def build(name: str, p: torch.nn.Parameter) -> torch.optim.Optimizer:
        if name == "AdamW":
            return torch.optim.AdamW([p], lr=1e-3, weight_decay=0.0)
        return Adapprox([p], lr=1e-3, weight_decay=0.0, nesterov=False)

    for name in ("AdamW", "Adapprox"):
        p = torch.nn.Parameter(torch.zeros(64))
        optimizer = build(name, p)
        for step in range(400):
            optimizer.param_groups[0]["betas"] = (0.05 if step < 399 else 0.95, 0.999)
            # Nearly all of the first moment is of the last gradient when beta_1 rises.
            p.grad = torch.full((64,), 1.0 if step == 398 else 1e-3)
            before = p.detach().clone()
            optimizer.step()
        moved[name] = float((p.detach() - before).abs().max())
    assert moved["Adapprox"] == pytest.approx(moved["AdamW"], rel=1e-3)
    group = optimizer.param_groups[0]
    assert group["betas_seen"] == (0.05, 0.95, 0.999, 0.999)
    loaded = build("Adapprox", torch.nn.Parameter(torch.zeros(64)))
    loaded.load_state_dict(optimizer.state_dict())
    assert loaded.param_groups[0]["betas_seen"] == group["betas_seen"]
