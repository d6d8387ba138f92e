# SPDX-License-Identifier: Apache-2.0
"""Groups and engines under DeepSpeed, matched by what they hold. Run by test_groups.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

import adapprox_ds
from adapprox_ds import Adapprox, MicroAdam
from adapprox_ds.checkpoint.universal import convert
from adapprox_ds.core.nonfinite import NonfiniteGradientError
from adapprox_ds.zero import MatrixViews
from tests.models import Cell
from tests.zero.cases_expectations import same, weights
from tests.zero.cases_stages import CPU, Z2, Z3, Case, adapprox_of, config_of

#: Every wrapper: (zero_optimization, precision).
WRAPPERS: dict[str, tuple[dict[str, Any] | None, str]] = {
    "z0": (None, "fp32"),
    "z0_bf16": (None, "bf16"),
    "bf16_optimizer": ({"stage": 1}, "bf16_fp32acc"),
    "z1_bf16": ({"stage": 1}, "bf16"),
    "z2": (Z2, "fp32"),
    "z2_offload": ({**Z2, **CPU}, "fp32"),
    "z3": (Z3, "fp32"),
}


class Pair(torch.nn.Module):
    """Two matrices, of groups of their own, and a vector that may be frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.v = Cell((24, 16)), Cell((40, 16)), Cell((7,))
        with torch.no_grad():
            for p in self.parameters():
                p.fill_(1.0)

    def forward(self, factor: float, poison: float = 0.0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        a, b = (torch.randn(n, 16, generator=generator) for n in (24, 40))
        b[-1, -1] += poison
        a, b = (x.to(self.a.weight.dtype) for x in (a, b))
        return self.a(a * factor) + self.b(b * factor) + self.v(torch.ones(()))


def config(zero: dict[str, Any] | None, precision: str) -> dict[str, Any]:
    return config_of(Case(zero, precision, how="instance"))


def step(engine: Any, factor: float = 1.0, poison: float = 0.0) -> None:
    engine.backward(engine(factor, poison))
    engine.step()


def groups_of(model: Pair, empties: bool) -> list[dict[str, Any]]:
    """Ranks 16 and 2; with empty groups of other settings before, between and after."""
    a = {"params": [model.a.weight], "rank_max": 16}
    b = {"params": [model.b.weight, model.v.weight], "rank_max": 2, "weight_decay": 0.0}
    if not empties:
        return [a, b]
    empty: dict[str, Any] = {"params": [], "rank_max": 5, "lr": 0.0}
    return [dict(empty), a, dict(empty), b, dict(empty)]


def build(name: str, how: str, empties: bool) -> Any:
    """An engine of Adapprox in one of three ways."""
    model, settings = Pair(), config(*WRAPPERS[name])
    groups = groups_of(model, empties)
    if how == "initialize":
        settings["optimizer"] = {"type": "Adapprox", "params": {"lr": 0.01}}
        engine = adapprox_ds.initialize(model=model, model_parameters=groups, config=settings)[0]
        assert all(any(g is own for own in groups) for g in adapprox_of(engine).param_groups)
        return engine
    names = {id(p): name for name, p in model.named_parameters()}
    named = [{**g, "params": [(names[id(p)], p) for p in g["params"]]} for g in groups]
    optimizer = Adapprox(named, lr=0.01)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    if how == "attach":
        adapprox_ds.attach(engine)
    return engine


def empty_groups(folder: Path) -> None:
    """Each parameter is trained, saved and moved with its own group's settings."""
    for name in ("z0_bf16", "bf16_optimizer", "z2_offload", "z3"):
        reference = build(name, "initialize", False)
        for _ in range(3):
            step(reference)
        for how in ("initialize", "attach", "found"):
            engine = build(name, how, True)
            for _ in range(2):
                step(engine)
            if how == "initialize":
                engine.save_checkpoint(str(folder / name), tag="one")
            step(engine)
            assert same(weights(reference), weights(engine)), (name, how)
            found, right = (adapprox_of(e).metrics() for e in (engine, reference))
            assert found.state_bytes == right.state_bytes, (name, how)
            assert [g["rank_max"] for g in adapprox_of(engine).param_groups] == [16, 2]
        # Loading with empty groups in other places, and before the first step.
        for how in ("initialize", "found"):
            engine = build(name, how, how == "found")
            engine.load_checkpoint(str(folder / name), tag="one")
            step(engine)
            assert same(weights(reference), weights(engine)), (name, how)
        if not name.startswith("z0"):
            if torch.distributed.get_rank() == 0:
                convert(folder / name / "one", folder / name / "universal", workers=1)
            torch.distributed.barrier()
            engine = build(name, "initialize", True)
            adapprox_ds.load_universal(engine, folder / name / "universal")
            step(engine)
            assert same(weights(reference), weights(engine)), name


def empty_groups_of_views(folder: Path) -> None:
    """MatrixViews too, and MicroAdam."""
    for cls in ("MicroAdam", "MatrixViews"):
        for name in ("z0_bf16", "z2", "z3"):
            results = []
            for empties in (False, True):
                model = Pair()
                groups = groups_of(model, empties)
                for group in groups:
                    group.pop("rank_max")
                optimizer: Any = (
                    MicroAdam(groups, lr=0.01)
                    if cls == "MicroAdam"
                    else MatrixViews(torch.optim.AdamW, groups, lr=0.01)
                )
                engine = adapprox_ds.initialize(
                    model=model, optimizer=optimizer, config=config(*WRAPPERS[name])
                )[0]
                for _ in range(2):
                    step(engine)
                results.append(weights(engine))
            assert same(*results), (cls, name)


#: The engine that held the module before, and the one that trains it now.
PAIRS = (
    ("z2_offload", "z2"),
    ("z2_offload", "z0"),
    ("z2_offload", "z2_offload"),
    ("z2_offload", "z1_bf16"),
    ("z2_offload", "z0_bf16"),
    ("z1_bf16", "bf16_optimizer"),
    ("bf16_optimizer", "z0_bf16"),
)


def second_engine(folder: Path) -> None:
    """What an earlier engine left on a module's parameters misleads no later one."""
    for cls, pairs in ((Adapprox, PAIRS), (MicroAdam, PAIRS[::3])):
        for first, second in pairs:
            results = []
            for how in ("fresh", "found", "initialize", "frozen"):
                model = Pair()
                if how != "fresh":
                    earlier = deepspeed.initialize(
                        model=model,
                        optimizer=cls(model.parameters(), lr=0.01),
                        config=config(*WRAPPERS[first]),
                    )[0]
                    if how == "frozen":
                        step(earlier)
                    earlier.destroy() if how == "initialize" else None
                    with torch.no_grad():
                        for p in model.parameters():
                            p.data, p.grad = torch.ones_like(p), None
                if how == "frozen":
                    model.v.weight.requires_grad = False
                named = list(model.named_parameters())
                begin = adapprox_ds if how == "initialize" else deepspeed
                engine = begin.initialize(
                    model=model, optimizer=cls(named, lr=0.01), config=config(*WRAPPERS[second])
                )[0]
                for _ in range(3):
                    step(engine)
                results.append(weights(engine))
                assert not any(torch.equal(w, torch.ones_like(w)) for w in results[-1][:2])
            for other in results[1:3]:
                assert same(results[0], other), (cls, first, second)
            assert torch.equal(results[3][2], torch.ones(7))


def another_engines_tensor(folder: Path) -> None:
    """One optimizer under two engines: an error, not weights that do not move."""
    for begin in (adapprox_ds, deepspeed):
        model, other = Pair(), Pair()
        optimizer = Adapprox(model.parameters(), lr=0.01)
        settings = config(*WRAPPERS["z2"])
        engine = begin.initialize(model=model, optimizer=optimizer, config=settings)[0]
        step(engine)
        optimizer.param_groups[0]["params"] = list(other.parameters())
        again = deepspeed.initialize(model=other, optimizer=optimizer, config=settings)[0]
        with pytest.raises(RuntimeError, match=r"of shape .* that is no parameter"):
            step(again)


#: Steps of which DeepSpeed lets NaN through.
LETS_THROUGH = {
    "z1_bf16": ({"stage": 1}, {"bf16": {"enabled": True, "check_grad_overflow": False}}),
    "no norm": ({**Z2, "compute_grad_norm": False}, {}),
    "no norm, bf16": (
        {"stage": 1, "compute_grad_norm": False},
        {"bf16": {"enabled": True, "check_grad_overflow": False}},
    ),
}


def nonfinite_in_another_group(folder: Path) -> None:
    """NaN in the second group: the first does not move either, whoever found the shards."""
    for label, (zero, more) in LETS_THROUGH.items():
        for how in ("found", "attach"):
            for mode in ("raise", "skip"):
                for bad_group in (0, 1):
                    model = Pair()
                    members = [[model.b.weight], [model.a.weight, model.v.weight]]
                    members = members if bad_group == 0 else members[::-1]
                    optimizer = Adapprox([{"params": m} for m in members], lr=0.01, nonfinite=mode)
                    settings = {**config(zero, "fp32"), **more}
                    engine = deepspeed.initialize(
                        model=model, optimizer=optimizer, config=settings
                    )[0]
                    if how == "attach":
                        adapprox_ds.attach(engine)
                    step(engine)
                    before = weights(engine)
                    if mode == "raise":
                        with pytest.raises(NonfiniteGradientError, match="weights and moments are"):
                            step(engine, 1.0, math.nan)
                    else:
                        step(engine, 1.0, math.nan)
                    steps = {float(s["step"]) for s in optimizer.state.values() if s}
                    assert steps == {1.0}, (label, how, mode, bad_group, steps)
                    assert same(before, weights(engine)), (label, how, mode, bad_group)
                    if mode == "raise":
                        continue  # DeepSpeed leaves param_groups at the group that raised
                    step(engine)
                    now = weights(engine)
                    assert not any(torch.equal(a, b) for a, b in zip(before, now, strict=True))


def attach_again(folder: Path) -> None:
    """A second call does not pass where the first one failed."""
    model = Pair()
    engine = deepspeed.initialize(
        model=model,
        optimizer=Adapprox(model.parameters(), lr=0.01),
        config=config(*WRAPPERS["z1_bf16"]),
    )[0]
    with torch.no_grad():
        model.b.weight.mul_(2.0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="does not hold"):
            adapprox_ds.attach(engine)
    with pytest.raises(RuntimeError, match="no known order"):
        step(engine)
    with torch.no_grad():
        model.b.weight.mul_(0.5)
    adapprox_ds.attach(engine)
    before = weights(engine)
    step(engine)
    assert not same(before, weights(engine))


CASES: dict[str, Callable[[Path], None]] = {
    function.__name__: function
    for function in (
        empty_groups,
        empty_groups_of_views,
        second_engine,
        another_engines_tensor,
        nonfinite_in_another_group,
        attach_again,
    )
}
