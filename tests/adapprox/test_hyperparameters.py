# SPDX-License-Identifier: Apache-2.0
"""Arguments: ranges, refusals that name the remedy, presets, per-group values, signature."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapprox_ds import Adapprox, MicroAdam
from adapprox_ds.adapprox.hyperparameters import FIELD_NAMES, Hyperparameters
from adapprox_ds.core.rules import GroupSettings
from adapprox_ds.micro_adam.hyperparameters import MICRO_FIELD_NAMES, MicroHyperparameters
from tests.knobs import BAD, CASES, GOOD, MICRO_BAD, MICRO_GOOD, PAPER
from tests.settings_table import agrees, documented

Optimizer = type[Adapprox] | type[MicroAdam]


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(8, 8))


def group_of(cls: Optimizer = Adapprox, **settings: Any) -> dict[str, Any]:
    """The parameter group that an optimizer with these arguments has."""
    return cls([parameter()], **settings).param_groups[0]


def differences(group: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    return {name: group[name] for name, value in expected.items() if group[name] != value}


def test_every_knob_has_cases() -> None:
    """A new knob must come with values that it refuses and takes."""
    assert set(BAD) == set(GOOD) == set(FIELD_NAMES)
    assert set(MICRO_BAD) == set(MICRO_GOOD) == set(MICRO_FIELD_NAMES)


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    CASES,
    ids=lambda v: v.__name__ if isinstance(v, type) else str(v).replace(" ", ""),
)
@pytest.mark.parametrize("place", ["constructor", "group", "added", "scheduled"])
def test_bad_values_raise(cls: Optimizer, name: str, value: Any, place: str) -> None:
    """In the constructor, in a group and, set by a scheduler, at the step: key, value, allowed."""
    p = parameter()
    with pytest.raises(ValueError) as caught:
        if place == "constructor":
            cls([p], **{name: value})
        elif place == "group":
            cls([{"params": [p], name: value}])
        else:
            optimizer = cls([p])
            if place == "added":
                optimizer.add_param_group({"params": [parameter()], name: value})
            else:
                optimizer.param_groups[0][name] = value
                p.grad = torch.ones_like(p)
                optimizer.step()
    text = str(caught.value)
    # A bound between two ranks may be reported by either.
    related = ["rank_init"] if name.startswith("rank_m") else []
    related += ["block_size"] if name == "quant_block_size" else []
    assert any(f"{cls.__name__}: {key}=" in text for key in (name, *related)), text
    assert name in text and f"{value!r}" in text
    assert "allowed: " in text and text.split("allowed: ")[1]
    assert torch.equal(p, torch.ones(8, 8))


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [
        (cls, n, v)
        for cls, good in ((Adapprox, GOOD), (MicroAdam, MICRO_GOOD))
        for n, values in good.items()
        for v in values
    ],
    ids=str,
)
def test_limits_are_allowed(cls: Optimizer, name: str, value: Any) -> None:
    """The ends of every range."""
    held = group_of(cls, **{name: value})[name]
    if value is not None:
        assert held == (tuple(value) if name == "betas" else value)


COLD = {"warm_start": False}


@pytest.mark.parametrize(
    ("name", "given", "allowed"),
    [
        ("rank_init", {"rank_init": 9, "rank_max": 8}, "<= 8"),
        ("rank_init", {"rank_init": 2, "rank_min": 3}, "3 <="),
        ("rank_policy", {"rank_policy": "expand"}, "warm_start"),
        ("power_iterations", {"power_iterations": 5}, "warm_start"),
        ("momentum", {"momentum": "gradient", **COLD}, "warm_start"),
        ("nesterov", {"nesterov": True, **COLD}, "warm_start"),
        ("bias_correction", {"bias_correction": True, **COLD}, "warm_start"),
        ("guidance", {"guidance": "cosine", **COLD}, "warm_start"),
        ("scope", {"scope": "matrix", **COLD}, "warm_start"),
        ("floor", {"floor": 0.3, **COLD}, "warm_start"),
    ],
)
def test_values_that_exclude_each_other(name: str, given: dict[str, Any], allowed: str) -> None:
    """The message names the knob, its value and the one that it depends on."""
    with pytest.raises(ValueError, match=f"Adapprox: {name}={given[name]!r} is not.*{allowed}"):
        group_of(**given)


@pytest.mark.parametrize(
    ("given", "derived"),
    [
        ({}, {"nesterov": True, "momentum": "gradient", "floor": 0.1, "power_iterations": 1}),
        (COLD, {"nesterov": False, "momentum": "update", "floor": 0.0, "power_iterations": 5}),
        ({**COLD, "power_iterations": 50}, {"power_iterations": 50, "bias_correction": False}),
        ({"momentum": "update"}, {"floor": 0.0, "clip_threshold": 1.0, "nesterov": True}),
        ({"rank_max": 40}, {"rank_init": 40, "rank_step": 1}),
    ],
)
def test_derived_defaults(given: dict[str, Any], derived: dict[str, Any]) -> None:
    """What is not given follows from what is, in the constructor and in a group alike."""
    assert not differences(group_of(**given), given | derived)
    grouped = Adapprox([{"params": [parameter()], **given}]).param_groups[0]
    assert not differences(grouped, given | derived)


@pytest.mark.parametrize(
    ("name", "closest"),
    [
        ("rank_maximum", "rank_max"),
        ("beta", "betas"),
        ("weightdecay", "weight_decay"),
        ("clip_treshold", "clip_threshold"),
        ("presets", "preset"),
        ("zzz", None),
    ],
)
def test_unknown_names_raise(name: str, closest: str | None) -> None:
    """With the closest known name, if any is close, and all that are allowed."""
    with pytest.raises(TypeError) as caught:
        group_of(**{name: 7})
    text = str(caught.value)
    assert f"{name}=7" in text
    assert (f"did you mean {closest!r}" in text) if closest else ("did you mean" not in text)
    listed = text.split("allowed: ")[1].split(", ")
    assert set(listed) == {*FIELD_NAMES, "preset"}


REFUSED = {
    "fused": "leave it out",
    "foreach": "leave it out",
    "capturable": "leave it out",
    "differentiable": r"torch\.optim\.AdamW",
    "amsgrad": r"torch\.optim\.AdamW",
    "max_grad_norm": "gradient_clipping",
    "rank": "rank_init",
    "factor": "warm_start; leave it out",
}


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        *((Adapprox, name) for name in REFUSED),
        *((MicroAdam, name) for name in REFUSED if name not in ("rank", "factor")),
    ],
)
def test_refused_arguments(cls: Optimizer, name: str) -> None:
    """Arguments of torch or DeepSpeed that cannot be honoured name the remedy; unset ones pass."""
    value = 1.0 if name == "max_grad_norm" else 8 if name == "rank" else True
    with pytest.raises(ValueError, match=f"{name}={value!r} is not supported.*{REFUSED[name]}"):
        group_of(cls, **{name: value})
    assert name not in group_of(cls, **{name: False})
    assert name not in group_of(cls, **{name: None})


def test_paper_preset() -> None:
    """Literally the paper's settings."""
    assert not differences(group_of(preset="paper"), PAPER)
    assert set(PAPER) == set(FIELD_NAMES) - {"seed", "maximize", "rank_interval", "weight_rounding"}


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ({"lr": 1e-3}, {"lr": 1e-3}),
        ({"betas": (0.0, 0.95), "eps": 0.0}, {"betas": (0.0, 0.95), "eps": 0.0}),
        ({"weight_decay": 0.0}, {"weight_decay": 0.0}),
        ({"rank_max": 32}, {"rank_max": 32, "rank_init": 32, "rank_step": 1}),
        ({"rank_max": 100, "rank_init": 7}, {"rank_max": 100, "rank_init": 7, "rank_step": 2}),
        ({"rank_max": 32, "rank_step": 4}, {"rank_max": 32, "rank_init": 32, "rank_step": 4}),
        ({"rank_init": 8}, {"rank_init": 8}),
        ({"rank_min": 2}, {"rank_min": 2}),
        ({"rank_policy": "expand"}, {"rank_policy": "expand", "rank_init": 1}),
    ],
)
def test_explicit_wins_over_preset(given: dict[str, Any], changed: dict[str, Any]) -> None:
    """And a lower rank_max lowers rank_init and the derived rank_step; nothing else changes."""
    assert not differences(group_of(preset="paper", **given), PAPER | changed)


def test_none_means_not_given() -> None:
    """None takes the preset's value or the default, as an absent key in a JSON would."""
    nothing = dict.fromkeys(FIELD_NAMES)
    assert not differences(group_of(preset="paper", **nothing), PAPER)
    absent = group_of()
    assert not differences(group_of(preset=None, **nothing), {n: absent[n] for n in FIELD_NAMES})


def test_groups_refuse_what_they_would_ignore() -> None:
    """Arguments of torch.optim and a preset, in a group: named, with the remedy."""
    p = torch.nn.Parameter(torch.zeros(4, 4))
    for key, value in (("fused", True), ("preset", "paper"), ("amsgrad", True)):
        with pytest.raises(ValueError, match=rf"{key}="):
            Adapprox([{"params": [p], key: value}])
    Adapprox([{"params": [p], "fused": False, "moe": True}])


@pytest.mark.parametrize(
    ("cls", "key", "near"),
    [
        (Adapprox, "rankmax", "rank_max"),
        (Adapprox, "first_momnt", "first_moment"),
        (MicroAdam, "weight_deacy", "weight_decay"),
        (MicroAdam, "quant_bit", "quant_bits"),
    ],
)
def test_groups_refuse_a_misspelt_setting(cls: Optimizer, key: str, near: str) -> None:
    """By its name; what schedulers, DeepSpeed and users keep in groups passes."""
    p = torch.nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(TypeError, match=rf"unknown key '{key}'=1 .*did you mean '{near}'"):
        cls([{"params": [p], key: 1}])
    own = ("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "name", "lr_scale")
    optimizer = cls([{"params": [p], **dict.fromkeys(own, 1)}])
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=3, cycle_momentum=False)


@pytest.mark.parametrize("preset", ["papers", "", 3, True, ["paper"]], ids=str)
def test_unknown_preset_raises(preset: Any) -> None:
    """Naming the known ones."""
    with pytest.raises(ValueError) as caught:
        group_of(preset=preset)
    assert f"preset={preset!r} is not allowed; allowed: " in str(caught.value)
    assert "'paper'" in str(caught.value).split("allowed: ")[1]


@given(st.integers(1, 1_000_000))
def test_default_rank_step(rank_max: int) -> None:
    """max(ceil(0.02 k_max), 1), in exact arithmetic."""
    assert Hyperparameters(rank_max=rank_max).rank_step == max((rank_max + 49) // 50, 1)


def test_groups_override_the_constructor() -> None:
    """Each group has its own values, the others the constructor's, also for groups added later."""
    common: dict[str, Any] = {
        "lr": 5e-3,
        "rank_max": 64,
        "rank_init": 16,
        "rank_step": 3,
        "seed": 9,
    }
    optimizer = Adapprox(
        [
            {"params": [parameter()]},
            {"params": [parameter()], "weight_decay": 0.0, "lr": 1e-4, "betas": [0.5, 0.9]},
            {"params": [parameter()], "rank_max": 32},
        ],
        **common,
    )
    optimizer.add_param_group({"params": [parameter()], "rank_max": 200, "maximize": True})
    first, second, third, added = optimizer.param_groups
    assert not differences(first, common)
    override = {"weight_decay": 0.0, "lr": 1e-4, "betas": (0.5, 0.9)}
    assert not differences(second, common | override)
    assert not differences(third, common | {"rank_max": 32})
    ranks = {"rank_max": 200, "maximize": True}
    assert not differences(added, common | ranks)


def test_alpha_is_refused_where_no_error_is_left() -> None:
    """In the constructor, in a group whose density is another, and, set by a scheduler, in a step.

    MicroAdam's own; with a density of 1 a step leaves nothing to apply a part of.
    """
    message = r"MicroAdam: alpha=0\.1 is not allowed; allowed: 0 where density is 1"
    with pytest.raises(ValueError, match=message):
        MicroAdam([parameter()], alpha=0.1, density=1)
    with pytest.raises(ValueError, match=message):
        MicroAdam([{"params": [parameter()], "density": 1.0}], alpha=0.1)
    optimizer = MicroAdam([parameter()], density=1.0)
    optimizer.param_groups[0]["alpha"] = 0.1
    with pytest.raises(ValueError, match=message):
        optimizer.step()


def test_values_from_json() -> None:
    """What a DeepSpeed config's "params" give: lists for tuples, numbers of either kind."""
    text = '{"lr": 1, "betas": [0.8, 0.99], "eps": 1e-6, "weight_decay": 0, "maximize": true}'
    group = group_of(**json.loads(text))
    assert group["betas"] == (0.8, 0.99) and isinstance(group["betas"], tuple)
    assert (group["lr"], group["weight_decay"], group["maximize"]) == (1, 0, True)


def test_lr_tensor_is_read_at_every_step() -> None:
    """The tensor itself is kept, so that changing it in place changes the next step."""
    lr = torch.tensor(0.25)
    p = parameter()
    optimizer = Adapprox([p], lr=lr, betas=(0.0, 0.999), weight_decay=0.0)
    assert optimizer.param_groups[0]["lr"] is lr
    moved = []
    for value in (0.25, 0.0, 0.5):
        lr.fill_(value)
        before = p.detach().clone()
        p.grad = torch.ones_like(p)
        optimizer.step()
        moved.append(float((before - p.detach()).square().mean().sqrt()))
    # Of gradients that are 1 always the corrected moments are 1, so that an update is lr.
    assert moved == pytest.approx([0.25, 0.0, 0.5], rel=1e-5)


def test_settings_cannot_be_changed_unvalidated() -> None:
    """The dataclass is frozen and keyword-only."""
    settings = Hyperparameters()
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.lr = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        Hyperparameters(1e-3)  # type: ignore[call-arg]


@pytest.mark.parametrize(("cls", "more"), [(Adapprox, {"preset"}), (MicroAdam, set())])
def test_constructor_has_every_knob(cls: Optimizer, more: set[str]) -> None:
    """Its names and types: params, the settings in their order and preset.

    All are documented in that order, with the defaults that the fields have.
    """
    parameters = dict(inspect.signature(cls).parameters)
    unsupported = parameters.pop("unsupported")
    assert unsupported.kind is inspect.Parameter.VAR_KEYWORD
    known = cls.settings_class.declared()
    assert [n for n in parameters if n not in more] == ["params", *known]
    said = documented(cls)
    assert list(said) == list(parameters)
    for name, one in known.items():
        assert parameters[name].default is None
        assert agrees(said[name][1], one), name
        kind = (GroupSettings.__annotations__ | cls.settings_class.__annotations__)[name]
        assert parameters[name].annotation == f"{kind.removesuffix(' | None')} | None"


@pytest.mark.parametrize("cls", [Adapprox, MicroAdam])
def test_shares_adamw_signature(cls: Optimizer) -> None:
    """Names and positions of torch.optim.AdamW's arguments, so that it can take its place."""
    ours = inspect.signature(cls).parameters
    theirs = inspect.signature(torch.optim.AdamW).parameters
    positional = [n for n, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["params", "lr", "betas", "eps", "weight_decay"]
    assert positional == list(theirs)[: len(positional)]
    assert ours["maximize"].kind is theirs["maximize"].kind is inspect.Parameter.KEYWORD_ONLY
    refused = set(theirs) - set(ours)
    assert refused == {"amsgrad", "foreach", "capturable", "differentiable", "fused"}
    defaults = cls([parameter()], 1e-2, (0.8, 0.9), 1e-7, 0.3).param_groups[0]
    expected = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-7, "weight_decay": 0.3}
    assert not differences(defaults, expected)


@pytest.mark.parametrize("cls", [Adapprox, MicroAdam])
def test_defaults_are_adamws(cls: Optimizer) -> None:
    """Where AdamW has the knob, its default holds."""
    adamw = torch.optim.AdamW([parameter()]).defaults
    shared = {n: adamw[n] for n in ("lr", "betas", "eps", "weight_decay", "maximize")}
    assert not differences(group_of(cls), shared)


def as_numpy(value: Any) -> list[Any]:
    """What numpy's functions give in place of a Python number."""
    if isinstance(value, tuple):
        return [np.array(value), tuple(map(np.float32, value)), list(map(np.array, value))]
    if isinstance(value, bool):
        return [np.bool_(value)]
    if isinstance(value, int):
        return [np.int64(value), np.int16(value), np.array(value)]
    return [np.float64(value), np.float32(value), np.array(value, "float32")]


@pytest.mark.parametrize(
    ("cls", "settings"), [(Adapprox, Hyperparameters), (MicroAdam, MicroHyperparameters)]
)
def test_numbers_of_numpy(cls: Optimizer, settings: type) -> None:
    """As Python's, from the constructor, a group or a scheduler."""
    for field in dataclasses.fields(settings):
        if not isinstance(field.default, bool | int | float | tuple):
            continue
        for value in as_numpy(field.default):
            name = field.name
            held = group_of(cls, **{name: value})[name]
            several = isinstance(held, tuple)
            plain = [x.item() for x in value] if several else value.tolist()
            assert held == (tuple(plain) if several else plain), (name, value)
            # Checkpoints of plain numbers load with weights_only.
            assert {type(x) for x in (held if several else [held])} <= {bool, int, float}
            group = cls([{"params": [parameter()], name: value}]).param_groups[0]
            assert group[name] == held and type(group[name]) is type(held)
            runs = []
            for scheduled in (value, held):
                p = parameter()
                optimizer = cls([p])
                optimizer.param_groups[0][name] = scheduled
                p.grad = torch.ones(8, 8)
                optimizer.step()
                runs.append(p.detach())
            assert torch.equal(*runs), (name, value)


@pytest.mark.parametrize("value", [np.array([1e-3, 1e-3]), np.array([1e-3]), np.float32("nan")])
def test_what_numpy_holds_is_judged_alike(value: Any) -> None:
    with pytest.raises(ValueError, match=r"Adapprox: lr=.* is not allowed"):
        group_of(lr=value)
