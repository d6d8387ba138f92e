# SPDX-License-Identifier: Apache-2.0
"""Adapprox in plain torch behaves as a user of torch.optim expects; see test_oracle for values."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from adapprox_ds import Adapprox
from tests.adapprox.oracle import FragmentOracle, Settings

Params = dict[str, torch.nn.Parameter]
SHAPES = {"w": (24, 16), "conv": (8, 6, 3, 3), "b": (11,), "s": (), "none": (0, 4)}
FACTORED = {"w": (24, 16), "conv": (48, 9)}
KNOBS: dict[str, Any] = {
    "lr": 1e-2,
    "weight_decay": 0.1,
    "rank_init": 3,
    "rank_max": 4,
    "rank_step": 1,
    "error_threshold": 0.05,
    "oversampling": 2,
    "preset": None,
}


@pytest.fixture(autouse=True, params=[None, "paper"], ids=["default", "paper"])
def preset(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Everything holds for both methods."""
    monkeypatch.setitem(KNOBS, "preset", request.param)
    return request.param


def make_params(dtype: torch.dtype = torch.float32, seed: int = 0) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in SHAPES.items()
    }


def make(dtype: torch.dtype = torch.float32, **knobs: Any) -> tuple[Params, Adapprox]:
    params = make_params(dtype)
    return params, Adapprox(list(params.items()), **{**KNOBS, **knobs})


def gradient(name: str, step: int, shape: tuple[int, ...]) -> Tensor:
    """Noise whose scale varies over the rows."""
    generator = torch.Generator().manual_seed(100 * sum(map(ord, name)) + step)
    noise = torch.randn(shape, generator=generator)
    rows = torch.arange(1.0, shape[0] + 1) if shape else torch.ones(())
    return noise * rows.view(shape[:1] + (1,) * (len(shape) - 1))


def train(params: Params, optimizer: torch.optim.Optimizer, begin: int, end: int) -> None:
    for step in range(begin, end):
        for name, p in params.items():
            p.grad = gradient(name, step, p.shape).to(p.dtype)
        optimizer.step()


def values(params: Params) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in params.items()}


def assert_same(a: Params, b: Params) -> None:
    for name, p in a.items():
        assert torch.equal(p, b[name]), name


def through_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_closure() -> None:
    """It runs with gradients enabled, its loss is returned, and the step uses its gradients."""
    params, optimizer = make()
    plain, reference = make()

    def closure() -> Tensor:
        loss = torch.stack([(p * gradient(n, 0, p.shape)).sum() for n, p in params.items()]).sum()
        loss.backward()
        return loss

    expected = sum(float((p.detach() * gradient(n, 0, p.shape)).sum()) for n, p in plain.items())
    assert optimizer.step(closure).item() == pytest.approx(expected, rel=1e-4)
    train(plain, reference, 0, 1)
    assert_same(params, plain)
    assert reference.step() is None


def test_scheduler_changes_lr_and_betas(preset: str | None) -> None:
    """Each step uses what OneCycleLR has set: equal to the oracle with the same values."""
    p = torch.nn.Parameter(make_params()["w"].detach().clone())
    s = Settings(k0=3, kmax=4, xi=0.05, tracking=not preset, bias_correction=not preset)
    s.momentum = "update" if preset else "gradient"
    oracle = FragmentOracle("w", p.detach(), s)
    optimizer = Adapprox([("w", p)], **s.knobs())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=12)
    used = set()
    for step in range(10):
        group = optimizer.param_groups[0]
        s.lr, (s.beta1, s.beta2) = group["lr"], group["betas"]
        used.add((s.lr, s.beta1))
        p.grad = gradient("w", step, p.shape)
        oracle.step(p.grad.reshape(-1))
        optimizer.step()
        schedule.step()
        assert (p.detach().double().reshape(-1) - oracle.w).abs().max() < 1e-4
    assert len({lr for lr, _ in used}) > 5 and len({beta1 for _, beta1 in used}) > 5


def test_beta1_raised_from_zero() -> None:
    """A first moment that is asked for later is kept from then on, not silently left out."""
    params, optimizer = make(betas=(0.0, 0.999))
    twin, reference = make(betas=(0.0, 0.999))
    for p, o in ((params, optimizer), (twin, reference)):
        train(p, o, 0, 2)
    optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    for p, o in ((params, optimizer), (twin, reference)):
        train(p, o, 2, 4)
    assert "exp_avg" in optimizer.state[params["w"]]
    assert not torch.equal(params["w"], twin["w"])


def test_add_param_group_after_steps() -> None:
    """The new group trains as it would alone, the old one as it would have without it."""
    params, optimizer = make()
    plain, reference = make()
    new, alone = ({"late": torch.nn.Parameter(torch.ones(20, 10))} for _ in range(2))
    train(params, optimizer, 0, 3)
    optimizer.add_param_group({"params": list(new.items()), "lr": 0.5})
    train(params | new, optimizer, 3, 6)
    train(plain, reference, 0, 6)
    train(alone, Adapprox(list(alone.items()), **{**KNOBS, "lr": 0.5}), 3, 6)
    assert_same(params, plain)
    assert_same(new, alone)
    steps = [int(optimizer.state[p]["step"]) for p in (params["w"], new["late"])]
    assert steps == [6, 3]


def test_maximize_mirrors_minimize() -> None:
    """Ascent along -g is descent along g, bit for bit."""
    (down, descent), (up, ascent) = make(), make(maximize=True)
    for step in range(4):
        for name in SHAPES:
            down[name].grad = gradient(name, step, SHAPES[name])
            up[name].grad = -gradient(name, step, SHAPES[name])
        descent.step()
        ascent.step()
    assert_same(up, down)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_resume_is_bitwise(dtype: torch.dtype) -> None:
    """From a file, into a new process's optimizer: same weights, ranks and state dtypes."""
    whole, unbroken = make(dtype)
    train(whole, unbroken, 0, 8)
    params, optimizer = make(dtype)
    train(params, optimizer, 0, 4)
    state, weights = through_file(optimizer.state_dict()), values(params)
    train(params, optimizer, 4, 8)  # taking a state_dict changes nothing
    assert_same(params, whole)
    resumed = {name: torch.nn.Parameter(w) for name, w in weights.items()}
    fresh = Adapprox(list(resumed.items()), **{**KNOBS, "lr": 77.0, "rank_max": 50})
    fresh.load_state_dict(state)
    for p in resumed.values():
        held = fresh.state[p]
        assert set(held) == {"step", "exp_avg", "exp_avg_sq"}
        assert (held["step"].dtype, held["step"].shape) == (torch.float32, ())
        assert held["exp_avg_sq"].dtype == dtype
        assert held["exp_avg"].dtype == torch.promote_types(dtype, torch.float32)
        assert held["exp_avg"].shape == held["exp_avg_sq"].shape == p.shape
    train(resumed, fresh, 4, 8)
    assert_same(resumed, whole)
    assert fresh.metrics() == unbroken.metrics()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copy_trains_on_like_the_original(how: str) -> None:
    """Parameters and optimizer copied together, as for an exponential average or a rollback."""
    params, optimizer = make()
    train(params, optimizer, 0, 3)
    pair = (params, optimizer)
    twins, twin = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    before = values(params)
    train(twins, twin, 3, 6)
    assert all(torch.equal(p, before[n]) for n, p in params.items())
    train(params, optimizer, 3, 6)
    assert_same(twins, params)
    assert twin.metrics() == optimizer.metrics()


def test_metrics_are_exact() -> None:
    """Ranks, error ratios and bytes: 4 k (m + n) a matrix, dense vectors, the first moment."""
    params, optimizer = make()
    empty = optimizer.metrics()
    assert (empty.step, empty.state_bytes, empty.parameters) == (0, 0, {})
    assert math.isnan(empty.mean_rank) and math.isnan(empty.mean_error)
    train(params, optimizer, 0, 5)
    metrics = optimizer.metrics(synchronize=True)
    numel = sum(p.numel() for p in params.values())
    assert metrics.step == 5 and metrics.adamw_state_bytes == 8 * numel
    assert {n: m.shape for n, m in metrics.parameters.items()} == FACTORED
    for name, m in metrics.parameters.items():
        block = optimizer.state[params[name]]["exp_avg_sq"].store.factors[0]
        assert 1 <= m.rank == block.q.shape[1] == block.u.shape[1] <= 4
        assert m.state_bytes == 4 * m.rank * sum(m.shape)
        assert 0.0 < m.error < 1.0
    held = list(metrics.parameters.values())
    factors = sum(m.state_bytes for m in held)
    assert metrics.mean_rank == sum(m.rank for m in held) / 2
    assert metrics.mean_error == pytest.approx(sum(m.error for m in held) / 2)
    assert metrics.state_bytes == 4 * numel + 4 * (11 + 1) + factors < metrics.adamw_state_bytes


def test_metrics_before_the_next_step() -> None:
    """A copied or resumed optimizer reports what it holds before it has stepped."""
    params, optimizer = make()
    train(params, optimizer, 0, 3)
    _, resumed = make()
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    for other in (resumed, copy.deepcopy(optimizer)):
        assert other.metrics() == optimizer.metrics()


def test_no_first_moment_without_beta1() -> None:
    """beta1 = 0 allocates nothing for it."""
    params, optimizer = make(betas=(0.0, 0.999))
    train(params, optimizer, 0, 2)
    assert all(set(optimizer.state[p]) == {"step", "exp_avg_sq"} for p in params.values())
    metrics = optimizer.metrics()
    assert metrics.state_bytes == 48 + sum(m.state_bytes for m in metrics.parameters.values())


def test_runs_are_reproducible() -> None:
    """Bitwise, whatever the global random state, which stays untouched; the seed matters."""
    runs = []
    for global_seed, seed in ((1, 0), (2, 0), (1, 5)):
        params, optimizer = make(seed=seed)
        if global_seed == 2:
            optimizer.init_state()  # what the first step would allocate
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        train(params, optimizer, 0, 5)
        optimizer.metrics()
        through_file(optimizer.state_dict())
        assert torch.equal(torch.get_rng_state(), before)
        runs.append(params)
    assert_same(runs[0], runs[1])
    assert not torch.equal(runs[0]["w"], runs[2]["w"])


def test_without_gradient() -> None:
    """No state, no change, not even weight decay; gradients themselves are left alone."""
    params, optimizer = make()
    params["w"].requires_grad_(False)
    before = values(params)
    for name in ("conv", "b"):
        params[name].grad = gradient(name, 0, SHAPES[name])
    optimizer.step()
    for name in ("conv", "b"):
        assert torch.equal(params[name].grad, gradient(name, 0, SHAPES[name]))  # type: ignore[arg-type]
        assert not torch.equal(params[name], before[name])
    for name in ("w", "s", "none"):
        assert params[name] not in optimizer.state or not optimizer.state[params[name]]
        assert torch.equal(params[name], before[name])


def strided(name: str, like: Tensor) -> Tensor:
    """The same values in another memory order."""
    return like.to(memory_format=torch.channels_last) if name == "conv" else like.T.contiguous().T


@pytest.mark.parametrize("gradients", ["strided", "contiguous"])
def test_memory_order_does_not_matter(gradients: str) -> None:
    """A channels_last convolution and a transposed matrix train as contiguous ones."""
    names = list(FACTORED)
    plain = {name: p for name, p in make_params().items() if name in names}
    other = {n: torch.nn.Parameter(strided(n, p.detach())) for n, p in plain.items()}
    a, b = (Adapprox(list(x.items()), **KNOBS) for x in (plain, other))
    for step in range(4):
        for name in names:
            g = gradient(name, step, SHAPES[name])
            plain[name].grad = g
            other[name].grad = strided(name, g) if gradients == "strided" else g.clone()
        a.step()
        b.step()
    assert not any(other[name].is_contiguous() for name in names)
    assert_same(other, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_parameters_train(dtype: torch.dtype) -> None:
    """A quadratic loss falls; the second moment is kept in fp32."""
    params, optimizer = make(dtype, lr=3e-2, weight_decay=0.0)
    targets = make_params(dtype, seed=1)

    def apart() -> float:
        return sum(float((p - targets[n]).detach().norm()) for n, p in params.items())

    start = apart()
    for _ in range(60):
        for name, p in params.items():
            p.grad = (p - targets[name]).detach()
        optimizer.step()
    assert apart() < 0.4 * start
    store = optimizer.state[params["w"]]["exp_avg_sq"].store
    assert store.factors[0].q.dtype == store.factors[0].u.dtype == torch.float32
    assert all(p.dtype == dtype for p in params.values())


def test_zero_gradients() -> None:
    """Weights only decay, and what follows is finite."""
    params, optimizer = make()
    before = values(params)
    for _ in range(3):
        for p in params.values():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for name, p in params.items():
        torch.testing.assert_close(p.detach(), before[name] * (1 - 1e-2 * 0.1) ** 3)
        assert torch.equal(optimizer.state[p]["exp_avg_sq"].to_dense(), torch.zeros_like(p))
    train(params, optimizer, 0, 3)
    assert all(torch.isfinite(p).all() for p in params.values())
    assert not torch.equal(params["w"], before["w"])


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (2, 2), (1, 1), (3, 1, 1)], ids=str)
def test_matrices_too_small_to_factor(shape: tuple[int, ...]) -> None:
    """They train as the vector of their elements does."""
    n = math.prod(shape)
    matrix = torch.nn.Parameter(torch.linspace(-1, 1, n).view(shape))
    vector = torch.nn.Parameter(matrix.detach().reshape(-1).clone())
    optimizer = Adapprox([matrix, vector], **KNOBS)
    for step in range(4):
        vector.grad = gradient("v", step, (n,))
        matrix.grad = vector.grad.view(shape)
        optimizer.step()
    assert torch.equal(matrix.reshape(-1), vector)
    assert not optimizer.metrics().parameters


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
def test_loads_adamw_state(order: torch.memory_format, preset: str | None) -> None:
    """AdamW's values and moments, in whatever memory order; missing knobs are construction's.

    The paper's step, whose first moment is the mean of something else, refuses and stays as it was.
    """
    params = make_params()
    conv = params["conv"] = torch.nn.Parameter(params["conv"].detach().to(memory_format=order))
    adamw = torch.optim.AdamW(params.values(), lr=3e-3, betas=(0.8, 0.99), weight_decay=0.2)
    train(params, adamw, 0, 3)
    second = adamw.state[conv]["exp_avg_sq"].clone()
    optimizer = Adapprox(list(params.items()), **{**KNOBS, "rank_init": 4})
    if preset:
        group = dict(optimizer.param_groups[0])
        with pytest.raises(ValueError, match=r"warm_start=False.*one of gradients.*load_universal"):
            optimizer.load_state_dict(through_file(adamw.state_dict()))
        assert optimizer.param_groups[0] == group and not optimizer.state
        return
    optimizer.load_state_dict(through_file(adamw.state_dict()))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-3, (0.8, 0.99), 0.2)
    assert all(group[k] == KNOBS[k] for k in ("rank_max", "oversampling", "error_threshold"))
    assert group["momentum"] == "gradient"  # what AdamW's exp_avg is the mean of
    train(params, optimizer, 3, 4)
    metrics = optimizer.metrics()
    assert metrics.step == 4 and metrics.state_bytes < metrics.adamw_state_bytes
    expected = 0.99 * second + 0.01 * gradient("conv", 3, conv.shape) ** 2
    kept = optimizer.state[conv]["exp_avg_sq"].to_dense()
    assert (kept - expected).norm() < 0.5 * expected.norm()
