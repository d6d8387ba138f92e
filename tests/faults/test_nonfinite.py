# SPDX-License-Identifier: Apache-2.0
"""Gradients that are not finite: the step is left out whole, on all ranks, or passed on."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from adapprox_ds import Adapprox, MicroAdam
from adapprox_ds.core.nonfinite import GradientCheck, NonfiniteGradientError, _largest
from tests.faults.cases_nonfinite import CASES

SHAPES = {"w": (24, 16), "conv": (8, 6, 3, 3), "b": (11,), "s": ()}
KNOBS: dict[str, Any] = {"lr": 1e-2, "rank_max": 4, "rank_init": 3}
#: The default's two passes, in each form of first moment, and Algorithm 3.
METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "int8": {"first_moment": "int8", "guidance": "cosine", "factor_dtype": "bf16"},
    "paper": {"preset": "paper"},
    "micro": {
        "window": 3,
        "block_size": 64,
        "quant_block_size": 16,
        "density": 0.1,
        "alpha": 0.125,
    },
    "micro_full": {"window": 3, "quant_bits": 32},
}


#: Of the fixture ``outcomes`` (conftest.py).
WORLD = (2, "tests.faults.cases_nonfinite", CASES)


@pytest.mark.parametrize("case", CASES)
def test_nonfinite(outcomes: dict[str, str], case: str) -> None:
    """See cases_nonfinite.py."""
    assert not outcomes[case], outcomes[case]


Params = dict[str, torch.nn.Parameter]
Optimizer = Adapprox | MicroAdam


def make(dtype: torch.dtype = torch.float32, **knobs: Any) -> tuple[Params, Optimizer]:
    """With the settings of one of METHODS; a window makes it MicroAdam's."""
    generator = torch.Generator().manual_seed(0)
    params = {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in SHAPES.items()
    }
    if "window" in knobs:
        return params, MicroAdam(list(params.items()), lr=1e-2, **knobs)
    return params, Adapprox(list(params.items()), **{**KNOBS, **knobs})


def step(
    params: Params, optimizer: Optimizer, t: int, poison: dict[str, float] | None = None
) -> None:
    """One step; ``poison`` goes into the last element of a parameter's gradient."""
    for i, (name, p) in enumerate(params.items()):
        generator = torch.Generator().manual_seed(100 * i + t)
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        if poison and name in poison:
            p.grad.view(-1)[-1] = poison[name]
    optimizer.step()


def bits(params: Params, optimizer: Optimizer) -> list[Tensor]:
    """Weights and all that is kept of moments."""
    tensors = [p.detach().clone() for p in params.values()]
    for state in optimizer.state.values():
        tensors += [state["step"], state["exp_avg"].to_dense().clone()]
        store = state["exp_avg_sq"].store
        if isinstance(optimizer, MicroAdam):
            window, error = store.window, state["error"].store
            held = (window.indices, window.values, error.codes, error.low, error.high)
            tensors += [x.clone() for x in held]
            continue
        tensors += [store.dense.clone(), *(x.clone() for b in store.factors for x in (b.q, b.u))]
    return tensors


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("value", [math.nan, -math.inf, 2e19], ids=str)
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("method", METHODS)
def test_step_is_left_out(
    monkeypatch: pytest.MonkeyPatch, method: str, backend: str, value: float
) -> None:
    """Nothing has changed, and the run goes on as if the step had never been."""
    monkeypatch.setenv("ADAPPROX_KERNELS", backend)
    params, optimizer = make(**METHODS[method], nonfinite="skip")
    twin, unbroken = make(**METHODS[method], nonfinite="propagate")
    strict, raising = make(**METHODS[method])
    for t in range(6):
        for pair in ((params, optimizer), (twin, unbroken), (strict, raising)):
            step(*pair, t)
        name = list(SHAPES)[t % len(SHAPES)]
        before = bits(params, optimizer)
        step(params, optimizer, 100 + t, {name: value})
        assert same(before, bits(params, optimizer))
        with pytest.raises(NonfiniteGradientError, match=rf"gradients of '{name}' hold"):
            step(strict, raising, 100 + t, {name: value})
    for pair in ((params, optimizer), (strict, raising)):
        assert same(bits(twin, unbroken), bits(*pair))
        assert pair[1].metrics().skipped == 6 and pair[1].metrics().step == 6
    assert unbroken.metrics().skipped == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e25], ids=str)
def test_propagate_looks_at_nothing(value: float) -> None:
    """The damage that the check keeps out: one gradient costs the matrix, a step later."""
    params, optimizer = make(nonfinite="propagate")
    for t in range(3):
        step(params, optimizer, t, {"w": value} if t == 1 else None)
    assert not params["w"].isfinite().any()
    assert params["conv"].isfinite().all()


@pytest.mark.parametrize("method", ["default", "micro"])
def test_before_the_first_step(method: str) -> None:
    params, optimizer = make(**METHODS[method], nonfinite="skip")
    twin, unbroken = make(**METHODS[method])
    step(params, optimizer, 9, {"b": math.nan, "w": math.inf})
    for t in range(3):
        step(params, optimizer, t)
        step(twin, unbroken, t)
    assert same(bits(params, optimizer), bits(twin, unbroken))


@pytest.mark.parametrize("cls", [Adapprox, MicroAdam])
def test_the_message_names_all(cls: type[Any]) -> None:
    params = {f"p{i}": torch.nn.Parameter(torch.ones(8, 8)) for i in range(9)}
    optimizer = cls(list(params.items()))
    message = f"{cls.__name__}: gradients of 'p0', 'p1', 'p2', 'p3', 'p4' and 3 more hold"
    with pytest.raises(NonfiniteGradientError, match=re.escape(message)):
        step(params, optimizer, 0, {f"p{i}": math.nan for i in range(8)})


@pytest.mark.parametrize("cls", [Adapprox, MicroAdam])
def test_strictest_group_holds(cls: type[Any]) -> None:
    """One call of ``step`` is one decision."""
    params, _ = make()
    w, conv = ((name, params[name]) for name in ("w", "conv"))
    for modes, raises in ((("skip", "propagate"), False), (("propagate", "raise"), True)):
        groups = [{"params": [w], "nonfinite": modes[0]}, {"params": [conv], "nonfinite": modes[1]}]
        optimizer = cls(groups)
        before = [p.detach().clone() for p in params.values()]
        if raises:
            with pytest.raises(NonfiniteGradientError):
                step(params, optimizer, 0, {"w": math.nan})
        else:
            step(params, optimizer, 0, {"conv": math.nan})
        assert same(before, [p.detach() for p in params.values()])


@pytest.mark.parametrize("method", ["default", "micro"])
@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float64, 1e30), (torch.float16, 6e4), (torch.bfloat16, 1e18)]
)
def test_large_is_fine_where_squares_are(method: str, dtype: torch.dtype, value: float) -> None:
    """The limit is that of the arithmetic, not of the gradient's dtype."""
    params, optimizer = make(dtype, **METHODS[method])
    for t in range(2):
        step(params, optimizer, t, dict.fromkeys(params, value))
    assert all(p.isfinite().all() for p in params.values())
    assert optimizer.skipped == 0


class Event:
    """Stands for a device's: notes when the host waited."""

    waited = 0

    def synchronize(self) -> None:
        self.waited += 1


@pytest.mark.parametrize("method", METHODS)
def test_answer_may_come_late(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """As on an accelerator: reductions may be under way by then, but nothing is written."""
    events: list[Event] = []
    start = GradientCheck.start.__func__  # type: ignore[attr-defined]

    def late(*arguments: Any) -> GradientCheck:
        check: GradientCheck = start(GradientCheck, *arguments)
        events.append(Event())
        check.ready = events[-1]
        return check

    monkeypatch.setattr(GradientCheck, "start", late)
    params, optimizer = make(**METHODS[method], nonfinite="skip")
    for t in range(3):
        step(params, optimizer, t)
        before = bits(params, optimizer)
        step(params, optimizer, 9, {"conv": math.nan})
        assert same(before, bits(params, optimizer))
    assert [event.waited for event in events] == [1] * 6


def test_the_answer_comes_from_an_accelerator() -> None:
    """Norms on a CPU go to the accelerator's, and not the other way, whose copy is not there yet.

    An accelerator's sizes are stood for by "meta", whose every copy can be told.
    """
    for devices in (("cpu", "meta"), ("meta", "cpu")):
        params = [torch.ones(3, device=device) for device in devices]
        pieces = [_piece(g) for g in params]
        assert _largest(pieces).device.type == "meta"
    assert _largest([_piece(torch.ones(3))]).device.type == "cpu"


def _piece(g: Tensor) -> Any:
    return SimpleNamespace(g=g)
