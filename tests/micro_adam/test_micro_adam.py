# SPDX-License-Identifier: Apache-2.0
"""MicroAdam in plain torch: against Algorithm 1, against Adam, its state and what it refuses."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from adapprox_ds import MicroAdam
from adapprox_ds.core.kernels import backends
from adapprox_ds.micro_adam.tensors import WindowMean, WindowSquare
from tests.micro_adam.micro_oracle import MicroFragmentOracle, MicroSettings, untied

SHAPES = [(30, 37), (300,), (7,), (1,), (), (6, 4, 3, 3), (33,)]
SMALL: dict[str, Any] = {"density": 0.05, "block_size": 256, "quant_block_size": 32}


def oracle_settings(**changes: Any) -> MicroSettings:
    given = {"lr": 1e-2, "decay": 0.1, "density": 0.05, "block": 256, "group": 32}
    return MicroSettings(**{**given, **changes})


def parameters(dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]


def give_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    """Of different size over steps and columns; some are left out."""
    torch.manual_seed(step + 1)
    for i, p in enumerate(params):
        p.grad = torch.randn_like(p) * (1.0 + step % 5)
        if p.dim() == 2:
            p.grad *= torch.arange(1, p.shape[1] + 1, dtype=p.dtype)
        if i == 2 and step % 7 == 3:
            p.grad = None
        if i == 1 and step % 11 == 5:
            p.grad *= 1e-3  # not 0: elements of one code would tie


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window": 3},
        {"bits": 32},
        {"density": 0.3, "block": 64, "group": 64},
        {"beta1": 0.0},
        {"alpha": 0.1},
        {"alpha": 0.7, "bits": 32, "window": 3},
    ],
    ids=str,
)
def test_follows_algorithm_1(changes: dict[str, Any]) -> None:
    """For 100 steps, in fp64: weights, both moments and the error, to rounding."""
    s = oracle_settings(**changes)
    params = parameters()
    oracles = [MicroFragmentOracle(p.detach(), s) for p in params]
    optimizer = MicroAdam(
        params,
        lr=s.lr,
        betas=(s.beta1, s.beta2),
        weight_decay=s.decay,
        window=s.window,
        density=s.density,
        block_size=s.block,
        quant_bits=s.bits,
        quant_block_size=s.group,
        alpha=s.alpha,
    )
    for step in range(100):
        give_gradients(params, step)
        for p, oracle in zip(params, oracles, strict=True):
            if p.grad is not None:
                oracle.step(p.grad)
        optimizer.step()
        for p, oracle in zip(params, oracles, strict=True):
            if not oracle.t or step % 9:
                continue
            state = optimizer.state[p]
            assert int(state["step"]) == oracle.t
            for ours, theirs in (
                (p.detach(), oracle.w),
                (state["exp_avg"], oracle.m),
                (state["exp_avg_sq"], oracle.v),
                (state["error"], oracle.e),
            ):
                torch.testing.assert_close(ours.reshape(-1) + 0.0, theirs, rtol=1e-9, atol=1e-12)
    assert any(oracle.t < 100 for oracle in oracles)


def test_is_adam_as_long_as_the_window_holds_all_steps() -> None:
    """Density 1 and no quantisation: AdamW to rounding for m steps; then within the bound.

    What leaves the window counts beta^m of its weight: the first moment, corrected, is off by at
    most beta_1^m / (1 - beta_1^t) of the largest gradient, the second likewise.
    """
    window, betas = 10, (0.7, 0.8)
    p, q = (torch.nn.Parameter(torch.linspace(-1, 1, 700, dtype=torch.float64)) for _ in range(2))
    ours = MicroAdam([p], 1e-2, betas, density=1.0, window=window, quant_bits=32, block_size=512)
    adam = torch.optim.AdamW([q], 1e-2, betas)
    for step in range(40):
        torch.manual_seed(step)
        gradient = torch.randn(700).bfloat16().double()
        p.grad, q.grad = gradient.clone(), gradient.clone()
        ours.step()
        adam.step()
        if step < window:
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
        largest = 4.5
        for key, beta, most in (
            ("exp_avg", betas[0], largest),
            ("exp_avg_sq", betas[1], largest**2),
        ):
            off = (ours.state[p][key].to_dense() - adam.state[q][key]).abs().max()
            assert off <= (beta**window * most if step >= window else 1e-12)
            assert step <= window or off > 0.0
        assert not ours.state[p]["error"].to_dense().any()


@pytest.mark.parametrize("alpha", [0.0, 0.125])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes_and_layouts_of_memory(dtype: torch.dtype, alpha: float) -> None:
    """Weights in bf16 are stepped in fp32 and rounded once; channels_last changes nothing."""
    torch.manual_seed(0)
    start, s = torch.randn(8, 6, 4, 4).to(dtype), oracle_settings(decay=0.01, block=64)
    s = replace(s, alpha=alpha)
    oracle = MicroFragmentOracle(start, s, dtype=torch.float32)
    made = [start.clone(), start.clone().contiguous(memory_format=torch.channels_last)]
    params = [torch.nn.Parameter(x) for x in made]
    knobs = {**SMALL, "block_size": 64, "weight_rounding": "nearest", "alpha": alpha}
    optimizer = MicroAdam(params, lr=s.lr, **knobs)
    for step in range(5):
        gradient = untied(start.shape, step).to(dtype)
        for p in params:
            p.grad = gradient.clone(memory_format=torch.preserve_format)
        params[1].grad = params[1].grad.contiguous(memory_format=torch.channels_last)
        optimizer.step()
        oracle.step(gradient)
        oracle.w = oracle.w.to(dtype).double()
        torch.testing.assert_close(
            params[0].detach().double().view(-1), oracle.w, rtol=2e-5, atol=2e-6
        )
        assert torch.equal(*params)
        assert all(torch.equal(p.grad, gradient) for p in params)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("bits", [4, 32])
def test_alpha_applies_a_part_of_the_error_and_keeps_the_rest(
    backend: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same step with alpha = 0: its error, less what moves the weights; where it is 0, none.

    A step without a gradient is none, so that nothing is applied or forgotten in it.
    """
    monkeypatch.setenv(backends.VARIABLE, backend)
    lr, alpha = 0.5, 0.25
    start, gradient = torch.randn(4, 256), torch.randn(4, 256)
    gradient[2] = gradient[:, 7] = 0.0  # as of an embedding's padding
    ends = []
    for part in (0.0, alpha):
        p = torch.nn.Parameter(start.clone())
        optimizer = MicroAdam([p], lr, weight_decay=0.0, quant_bits=bits, alpha=part, **SMALL)
        p.grad = gradient.clone()
        optimizer.step()
        p.grad = None
        optimizer.step()
        ends.append((p.detach(), optimizer.state[p]["error"] + 0.0))
    (w, error), (moved, kept) = ends
    torch.testing.assert_close(kept, (1.0 - alpha) * error)
    torch.testing.assert_close(w - moved, lr * alpha * error, rtol=1e-4, atol=1e-6)
    assert (error != 0.0).float().mean() > 0.5
    assert torch.equal(moved[2], start[2]) and torch.equal(moved[:, 7], start[:, 7])


def test_alpha_is_a_groups_own_and_may_change() -> None:
    """Set back to 0, it steps as if it had never been anything else."""
    ps = [torch.nn.Parameter(torch.ones(300)) for _ in range(3)]
    groups = [{"params": [p], "alpha": alpha} for p, alpha in zip(ps, (0.5, 0.0, 0.5), strict=True)]
    optimizer = MicroAdam(groups)
    optimizer.param_groups[2]["alpha"] = 0.0
    for p in ps:
        p.grad = torch.randn(300, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert torch.equal(ps[1], ps[2])
    assert not torch.equal(ps[0], ps[1])


def test_ascends() -> None:
    p, q = (torch.nn.Parameter(torch.ones(50)) for _ in range(2))
    up = MicroAdam([p], weight_decay=0.0, maximize=True, alpha=0.25)
    down = MicroAdam([q], weight_decay=0.0, alpha=0.25)
    for _ in range(3):
        p.grad = torch.randn(50)
        q.grad = p.grad.clone()
        up.step()
        down.step()
    torch.testing.assert_close(p - 1.0, 1.0 - q)
    assert (p != 1.0).any()


def test_bytes_of_a_real_models_shapes() -> None:
    """GPT-2's layer and embeddings: below a byte a parameter, and as the docstring says."""
    shapes = [(50257, 64), (768, 2304), (2304,), (768, 768), (768, 3072), (3072,), (768,)]
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = MicroAdam(params)
    optimizer.init_state()
    metrics = optimizer.metrics()
    numel = sum(p.numel() for p in params)
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for store in (
            state["exp_avg"].store,
            state["exp_avg_sq"].store.window,
            state["error"].store,
        )
        for t in (getattr(store, n, None) for n in ("indices", "values", "codes", "low", "high"))
        if t is not None
    }
    assert metrics.state_bytes == sum(held.values())
    assert round(metrics.state_bytes / numel, 2) == 0.96
    assert metrics.adamw_state_bytes == 8 * numel


def test_both_moments_share_one_window_through_saves_and_loads() -> None:
    """In memory, in a file, in a copy and after a load; and the run goes on to the bit."""
    params = parameters(torch.float32)
    optimizer = MicroAdam(params, **SMALL, alpha=0.125)
    for step in range(5):
        give_gradients(params, step)
        optimizer.step()
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    again = MicroAdam(others, window=4)  # the settings come with the state
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for state in again.state.values():
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        assert isinstance(mean, WindowMean) and isinstance(square, WindowSquare)
        assert square.store.window is mean.store
    for step in range(5, 12):
        give_gradients(params, step)
        for p, q in zip(params, others, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        again.step()
    assert all(map(torch.equal, params, others))


def test_gradients_that_are_not_finite_stay_where_they_are() -> None:
    """With "propagate" a NaN spoils its block of the window and its group's error, and no other."""
    p = torch.nn.Parameter(torch.ones(4, 256))
    optimizer = MicroAdam([p], **SMALL, nonfinite="propagate")
    p.grad = torch.randn(4, 256)
    p.grad[1, 40] = math.nan
    optimizer.step()
    assert p.isnan().nonzero().tolist() == [[1, 40]]
    assert not optimizer.state[p]["error"].to_dense().isnan().any()


@pytest.mark.parametrize("name", ["window", "density", "block_size", "quant_bits"])
def test_the_shape_of_the_state_cannot_change_within_a_run(name: str) -> None:
    p = torch.nn.Parameter(torch.ones(600))
    optimizer = MicroAdam([p])
    optimizer.init_state()
    value = {"window": 4, "density": 0.5, "block_size": 512, "quant_bits": 32}[name]
    optimizer.param_groups[0][name] = value
    p.grad = torch.ones(600)
    with pytest.raises(RuntimeError, match=rf"MicroAdam: ({name}={value}|the loaded exp_avg)"):
        optimizer.step()


def test_states_of_others_are_refused() -> None:
    """Adam's dense moments, another model's window; writes into the compact tensors."""
    p = torch.nn.Parameter(torch.ones(600))
    adam = torch.optim.AdamW([p])
    p.grad = torch.ones(600)
    adam.step()
    ours = MicroAdam([p])
    ours.load_state_dict(adam.state_dict())
    with pytest.raises(RuntimeError, match=r"holds \['exp_avg', 'exp_avg_sq', 'step'\], dense"):
        ours.step()
    other = MicroAdam([torch.nn.Parameter(torch.ones(500))])
    other.init_state()
    ours.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="in 500 elements where this shard has 1 in 600"):
        ours.step()
    for key in ("exp_avg", "exp_avg_sq", "error"):
        for write in (lambda x: x.zero_(), lambda x: x.copy_(torch.zeros(500))):
            with pytest.raises(NotImplementedError, match=r"would write into .* out of the call"):
                write(ours.state[p][key])


def test_sparse_gradients_are_refused() -> None:
    embedding = torch.nn.Embedding(5, 4, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="MicroAdam: sparse gradients are not supported"):
        MicroAdam(embedding.parameters()).step()
