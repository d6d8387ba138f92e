# SPDX-License-Identifier: Apache-2.0
"""Parameter groups: empty ones, the caller's own dicts, refused ones, what they inherit."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import Adafactor, AdamW

from adapprox_ds import Adapprox, MicroAdam
from adapprox_ds.zero import MatrixViews
from tests.zero.cases_groups import CASES

BUILD: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adapprox": lambda groups: Adapprox(groups, lr=0.5, rank_max=2),
    "MicroAdam": lambda groups: MicroAdam(groups, lr=0.5),
    "MatrixViews": lambda groups: MatrixViews(AdamW, groups, lr=0.5),
}


#: Of the fixture ``outcomes`` (conftest.py).
WORLD = (2, "tests.zero.cases_groups", CASES)


@pytest.mark.parametrize("case", CASES)
def test_under_deepspeed(outcomes: dict[str, str], case: str) -> None:
    """See tests/zero/cases_groups.py."""
    assert not outcomes[case], outcomes[case]


def parameter(fill: float = 1.0) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full((8, 6), fill))


COLD = {"warm_start": False}


def step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize(
    ("common", "own", "right"),
    [
        (
            {"clip_threshold": 1.0, "floor": 0.3},
            {"momentum": "gradient"},
            {"clip_threshold": 1.0, "floor": 0.3},
        ),
        ({"rank_init": 4, "rank_step": 2}, {"rank_max": 16}, {"rank_init": 4, "rank_step": 2}),
        ({}, {"rank_max": 16}, {"rank_init": 16, "rank_step": 1}),
        ({"rank_step": 2}, {"rank_max": 16}, {"rank_init": 16, "rank_step": 2}),
        ({"rank_init": 4}, {**COLD, "rank_policy": "expand"}, {"rank_init": 4}),
        ({**COLD, "rank_policy": "expand"}, {"rank_min": 3}, {"rank_init": 3}),
        ({"power_iterations": 1}, COLD, {"power_iterations": 1}),
        ({}, COLD, {"power_iterations": 5, "floor": 0.0, "momentum": "update", "nesterov": False}),
        ({"nesterov": False}, {"warm_start": True}, {"nesterov": False}),
        ({"clip_threshold": math.inf}, {"momentum": "update"}, {"clip_threshold": math.inf}),
        ({}, {"momentum": "update"}, {"clip_threshold": 1.0, "floor": 0.0}),
        ({"right_factor": "replicated"}, {"scope": "matrix"}, {"right_factor": "replicated"}),
        ({}, {"scope": "matrix"}, {"right_factor": "sharded"}),
        ({"preset": "paper"}, {"rank_max": 100}, {"rank_init": 100, "rank_step": 2}),
        ({"preset": "paper", "rank_init": 7}, {"rank_max": 100}, {"rank_init": 7, "rank_step": 2}),
    ],
)
def test_groups_inherit_what_was_given(
    common: dict[str, Any], own: dict[str, Any], right: dict[str, Any]
) -> None:
    """Explicit arguments stay in groups; only derived defaults follow a group's own settings."""
    group = Adapprox([{"params": [parameter()], **own}], **common).param_groups[0]
    assert {name: group[name] for name in right} == right
    added = Adapprox([parameter()], **common)
    added.add_param_group({"params": [parameter()], **own})
    assert {name: added.param_groups[1][name] for name in right} == right
    again = pickle.loads(pickle.dumps(Adapprox([parameter()], **common)))
    again.add_param_group({"params": [parameter()], **own})
    assert {name: again.param_groups[1][name] for name in right} == right


def test_what_cannot_hold_for_a_group_is_refused() -> None:
    """An explicit argument that a group's own setting excludes: named, not dropped."""
    with pytest.raises(ValueError, match=r"rank_init=16 is not allowed.*rank_init <= 8"):
        Adapprox([{"params": [parameter()], "rank_max": 8}], rank_max=64, rank_init=16)


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("named", [False, True])
def test_empty_groups(name: str, named: bool) -> None:
    """First, between or last, with names or without: the others train as if it were not there."""

    def group(i: int, **more: Any) -> dict[str, Any]:
        p = parameter(float(i))
        return {"params": [(f"p{i}", p) if named else p], **more}

    empty = {"params": []}
    alone = BUILD[name]([group(1), group(2, lr=0.1)])
    for groups in (
        [empty, group(1), group(2, lr=0.1)],
        [group(1), empty, group(2, lr=0.1)],
        [{**empty, "param_names": []}, group(1), empty, group(2, lr=0.1), empty],
    ):
        optimizer = BUILD[name]([dict(g) for g in groups])
        optimizer.add_param_group(dict(empty))
        for _ in range(2):
            step(optimizer)
        again = copy.deepcopy(optimizer)
        again.load_state_dict(optimizer.state_dict())
        step(again)
        assert len(again.param_groups) == len(groups) + 1
        assert {("param_names" in g) for g in again.param_groups} == {named}
        rates = [g["lr"] for g in again.param_groups if g["params"]]
        assert rates == [0.5, 0.1]
    for _ in range(3):
        step(alone)
    weights = [[p for g in o.param_groups for p in g["params"]] for o in (alone, again)]
    assert all(torch.equal(p, q) for p, q in zip(*weights, strict=True))


@pytest.mark.parametrize("name", BUILD)
def test_the_callers_dict_is_the_group(name: str) -> None:
    """As in torch.optim: what the caller sets in the dict that was passed holds."""
    first, added = {"params": [parameter()]}, {"params": [parameter()]}
    optimizer = BUILD[name]([first])
    optimizer.add_param_group(added)
    assert optimizer.param_groups[0] is first and optimizer.param_groups[1] is added
    before = [p.detach().clone() for g in (first, added) for p in g["params"]]
    first["lr"] = added["lr"] = 0.0
    first["weight_decay"] = added["weight_decay"] = 0.0
    step(optimizer)
    after = [p.detach() for g in (first, added) for p in g["params"]]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", BUILD)
def test_a_refused_group_leaves_nothing(name: str) -> None:
    """Neither in the optimizer nor in the dict."""
    kept = parameter()
    optimizer = BUILD[name]([kept])
    known = set(optimizer.shards._names)  # type: ignore[attr-defined]
    for bad in (
        {"params": [parameter(), torch.nn.Parameter(torch.ones(2, dtype=torch.cfloat))]},
        {"params": [("named", parameter())]},
        {"params": [kept]},
        {"params": [parameter() * 2]},
        *([] if name == "MatrixViews" else [{"params": [parameter()], "lr": -1}]),
    ):
        before = dict(bad)
        with pytest.raises((ValueError, TypeError)):
            optimizer.add_param_group(bad)
        assert bad == before
        assert len(optimizer.param_groups) == 1
        assert set(optimizer.shards._names) == known  # type: ignore[attr-defined]
        assert len(optimizer.shards.recorded) == 1  # type: ignore[attr-defined]
    step(optimizer)
    assert len(optimizer.state_dict()["param_groups"]) == 1


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("cls", [Adafactor, AdamW])
def test_copies_of_matrix_views(
    how: Callable[[Any], Any], cls: type[torch.optim.Optimizer]
) -> None:
    """A copy goes on as the original does, by itself; before the first step too."""
    for steps in (0, 2):
        groups = [
            {"params": [("w", parameter())]},
            {"params": [("e", parameter())], "vectors": True},
        ]
        optimizer = MatrixViews(cls, groups, vectors=AdamW, scope="matrix")
        for _ in range(steps):
            step(optimizer)
        other = how(optimizer)
        assert other.shards.settings == optimizer.shards.settings
        pairs = list(zip(optimizer.param_groups, other.param_groups, strict=True))
        assert all(a["params"][0] is not b["params"][0] for a, b in pairs)
        step(other)
        assert not any(torch.equal(a["params"][0], b["params"][0]) for a, b in pairs)
        step(optimizer)
        assert all(torch.equal(a["params"][0], b["params"][0]) for a, b in pairs)
