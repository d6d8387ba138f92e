# SPDX-License-Identifier: Apache-2.0
"""The steps that a loaded state has done: counted as any Adam counts them, or refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from adapprox_ds import Adapprox, MicroAdam
from tests.adapprox.test_optimizer import KNOBS, make, make_params, through_file, train


@pytest.mark.parametrize("method", ["adapprox", "micro"])
@pytest.mark.parametrize("kept", ["int", "float", "group", "last", "tensor1"])
def test_loads_steps_of_any_adam(kept: str, method: str) -> None:
    """Numbers, as DeepSpeed's Adams and old ones of torch count, in the state or in the group."""
    params = make_params()
    other = make_params()
    if method == "adapprox":
        make_one: Any = lambda ps: Adapprox(list(ps.items()), **KNOBS)  # noqa: E731
        source: Any = torch.optim.AdamW(params.values())
    else:
        make_one = lambda ps: MicroAdam(list(ps.items()))  # noqa: E731
        source = make_one(params)
    train(params, source, 0, 3)
    saved = through_file(source.state_dict())
    expected, optimizer = make_one(params), make_one(other)
    expected.load_state_dict(copy.deepcopy(saved))
    forms = {"int": 3, "float": 3.0, "last": 0, "tensor1": torch.tensor([3])}
    for state in saved["state"].values():
        assert float(state.pop("step")) == 3
        if kept in forms:
            state["step"] = forms[kept]
    if kept == "last":  # FusedAdam
        state["step"] = 3
    if kept == "group":
        saved["param_groups"][0]["step"] = 3
    optimizer.load_state_dict(saved)
    for name, p in params.items():
        other[name].data.copy_(p.data)
        step = optimizer.state[other[name]]["step"]
        assert (step.dtype, step.shape, float(step)) == (torch.float32, (), 3.0)
    assert optimizer.metrics().step == 3
    train(params, expected, 3, 5)
    train(other, optimizer, 3, 5)
    assert all(torch.equal(p, other[name]) for name, p in params.items())
    # Put there without a load, as DeepSpeed's loaders of universal checkpoints do.
    for p in other.values():
        optimizer.state[p]["step"] = 5
    train(params, expected, 5, 6)
    train(other, optimizer, 5, 6)
    assert all(torch.equal(p, other[name]) for name, p in params.items())


@pytest.mark.parametrize("step", [None, "3", -1, 2.5, math.nan, torch.zeros(2)], ids=repr)
def test_steps_that_say_nothing_are_refused(step: Any) -> None:
    """Before anything is replaced; nothing moves."""
    params, optimizer = make()
    train(params, optimizer, 0, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    held = {p: dict(state) for p, state in optimizer.state.items()}
    saved["param_groups"][0]["lr"] = 7.0
    last = list(saved["state"].values())[-1]
    del last["step"]
    if step is not None:
        last["step"] = step
    with pytest.raises(RuntimeError, match="'step'"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] != 7.0
    assert all(optimizer.state[p] == state for p, state in held.items())
    before = {name: p.detach().clone() for name, p in params.items()}
    last_state = optimizer.state[list(params.values())[-1]]
    last_state.pop("step")
    if step is not None:
        last_state["step"] = step
    with pytest.raises(RuntimeError, match="'step'"):
        train(params, optimizer, 2, 3)
    assert all(torch.equal(p, before[name]) for name, p in params.items())
