# SPDX-License-Identifier: Apache-2.0
"""What DeepSpeed's own tests and users expect of any optimizer. Run by test_features.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import (
    is_moe_param,
    split_params_into_different_moe_groups_for_optimizer,
)
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_get_local_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from torch import nn

import adapprox_ds
from adapprox_ds import Adapprox, MicroAdam
from adapprox_ds.core.nonfinite import NonfiniteGradientError
from tests.zero.cases_stages import CPU, Z2, Z3, adapprox_of


def settings(zero: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    """A DeepSpeed config without an optimizer."""
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, **more}
    return config if zero is None else {**config, "zero_optimization": zero}


class Mixture(nn.Module):
    """Dense layers around mixtures of four experts, one for each number of ranks that share it."""

    def __init__(self, *ep_sizes: int) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.before = nn.Linear(16, 24)
        self.mixtures = nn.ModuleList(
            MoE(24, nn.Linear(24, 24), num_experts=4, ep_size=n, capacity_factor=4.0, use_rts=False)
            for n in ep_sizes
        )
        self.after = nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        for mixture in self.mixtures:
            x = x + mixture(x)[0]
        return self.after(x).square().mean()


def step(engine: Any, seed: int) -> None:
    """Each rank has tokens of its own."""
    generator = torch.Generator().manual_seed(2 * seed + torch.distributed.get_rank())
    dtype = next(engine.module.parameters()).dtype
    engine.backward(engine(torch.randn(32, 16, generator=generator).to(dtype)))
    engine.step()


def parameters(model: nn.Module, how: str) -> Any:
    """The model's parameters, in each of the forms that the JSON's optimizer takes."""
    named = list(model.named_parameters())
    decayed = [pair for pair in named if pair[1].dim() > 1]
    others = [pair for pair in named if pair[1].dim() <= 1]
    if how == "apart":  # a group that holds nothing but experts
        decayed = [pair for pair in named if is_moe_param(pair[1])]
        others = [pair for pair in named if not is_moe_param(pair[1])]
    if how == "none":
        return None
    if how == "list":
        return [p for _, p in named]
    if how in ("groups", "apart"):
        return [
            {"params": [p for _, p in decayed], "rank_max": 2},
            {"params": [p for _, p in others], "weight_decay": 0.0},
        ]
    if how == "named":
        return [
            {"params": decayed, "rank_max": 2, "name": "decayed"},
            {"params": others, "weight_decay": 0.0, "name": "others"},
        ]
    assert how == "names"
    return [
        {
            "params": [p for _, p in pairs],
            "param_names": [n for n, _ in pairs],
            **({"rank_max": 2} if pairs is decayed else {"weight_decay": 0.0}),
        }
        for pairs in (decayed, others)
    ]


#: The forms that give the same groups, by the one that the others are compared with.
FORMS = {"list": ("none", "list"), "groups": ("groups", "named", "names"), "apart": ("apart",)}


def by_hand(model: nn.Module, form: str) -> Adapprox:
    """Adapprox with the groups that DeepSpeed's documentation asks users to make."""
    given = parameters(model, form)
    groups = [{"params": given}] if form == "list" else given
    groups = [{**g, "name": str(i)} for i, g in enumerate(groups)]
    split = split_params_into_different_moe_groups_for_optimizer(groups)
    names = {id(p): name for name, p in model.named_parameters()}
    return Adapprox(
        [{**g, "params": [(names[id(p)], p) for p in g["params"]]} for g in split if g["params"]],
        lr=0.01,
    )


def experts(folder: Path) -> None:
    """By the JSON's name expert groups are made as for any optimizer of DeepSpeed's."""
    bf16 = {"bf16": {"enabled": True}}
    places: list[tuple[tuple[int, ...], dict[str, Any], dict[str, Any], list[str]]] = [
        ((2, 1), {"stage": 1}, {}, ["list", "groups", "apart"]),
        ((1,), Z2, bf16, ["list"]),
        ((2,), Z2, bf16, ["list"]),
        ((2,), {**Z2, **CPU}, {}, ["groups"]),
    ]
    for ep_sizes, zero, more, kinds in places:
        config = settings(zero, **more)
        for kind in kinds:
            reference = trained(by_hand_engine(Mixture(*ep_sizes), kind, config), ep_sizes)
            for form in FORMS[kind] if len(kinds) > 1 else FORMS[kind][:1]:
                engine = by_name(Mixture(*ep_sizes), form, config)
                assert engine.optimizer_name() == "Adapprox"
                assert engine.optimizer_params() == {"lr": 0.01}
                assert same(reference, trained(engine, ep_sizes)), (ep_sizes, zero, form)
                if form == "none":
                    resumes(engine, by_name(Mixture(*ep_sizes), form, config), folder)
                engine.destroy()


def by_name(model: nn.Module, form: str, config: dict[str, Any]) -> Any:
    """An engine of the JSON's optimizer; its groups of experts come in one order."""
    config = {**config, "optimizer": {"type": "adapprox", "params": {"lr": 0.01}}}
    given = parameters(model, form)
    engine = adapprox_ds.initialize(model=model, model_parameters=given, config=config)[0]
    marked = [g["name"] for g in adapprox_of(engine).param_groups if g.get("moe")]
    assert marked == sorted(marked)
    return engine


def by_hand_engine(model: nn.Module, form: str, config: dict[str, Any]) -> Any:
    config = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, **config}
    optimizer = by_hand(model, form)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    adapprox_ds.attach(engine)
    return engine


def trained(engine: Any, ep_sizes: tuple[int, ...]) -> list[torch.Tensor]:
    """The weights after three steps, in which each has changed."""
    marked = {g["name"] for g in adapprox_of(engine).param_groups if g.get("moe")}
    assert marked == {f"ep_size_{n}" for n in ep_sizes}
    before = weights(engine)
    for seed in range(3):
        step(engine, seed)
    after = weights(engine)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return after


def resumes(engine: Any, again: Any, folder: Path) -> None:
    """A new engine that loads what the first one saved goes on as that does."""
    engine.save_checkpoint(str(folder), tag="moe")
    again.load_checkpoint(str(folder), tag="moe")
    for each in (engine, again):
        step(each, 3)
    assert same(weights(engine), weights(again))
    again.destroy()


#: Weights, gradients and moments in bf16 alone.
BF16 = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}


class Adapted(nn.Module):
    """A layer, and an adapter that was added in fp32 once the layer had been partitioned."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        with deepspeed.zero.Init(config_dict_or_path=settings(Z3, bf16={"enabled": True})):
            self.base = nn.Linear(16, 24)
        self.base.requires_grad_(False)  # DeepSpeed wants all that is trained in one dtype
        self.adapter = nn.Linear(24, 10)
        self.base.weight.convert_to_zero_parameters(list(self.adapter.parameters()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.base(x.to(self.base.weight.dtype))
        return self.adapter(x.to(self.adapter.weight.dtype)).square().mean()


class Plain(nn.Module):
    """A layer and a vector, each with rows for every rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layer = nn.Linear(16, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).square().mean()


def build(
    model: nn.Module, config: dict[str, Any], how: str, cls: Any = Adapprox, **knobs: Any
) -> Any:
    """An engine in one of three ways: by the JSON, attached afterwards, or left to its step."""
    if how == "json":
        block = {"type": cls.__name__, "params": {"lr": 0.01, **knobs}}
        return adapprox_ds.initialize(model=model, config={**config, "optimizer": block})[0]
    config = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, **config}
    optimizer = cls(list(model.named_parameters()), lr=0.01, **knobs)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    if how == "attached":
        adapprox_ds.attach(engine)
    return engine


def weights(engine: Any) -> list[torch.Tensor]:
    """Whole weights."""
    found = []
    for p in engine.module.parameters():
        with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
            found.append(p.detach().float().clone())
    return found


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def masters_below_their_parameters(folder: Path) -> None:
    """A master weight of less precision than its parameter is recognised, and trained."""
    results = []
    for how in ("json", "attached", "found"):
        engine = build(Adapted(), settings(Z3, bf16=BF16), how)
        assert {p.dtype for p in engine.module.parameters()} == {torch.bfloat16, torch.float32}
        before = weights(engine)
        for seed in range(2):
            step(engine, seed)
        results.append(weights(engine))
        pairs = list(zip(before, results[-1], strict=True))
        assert [torch.equal(a, b) for a, b in pairs] == [True, True, False, False]
        engine.destroy()
    assert same(results[0], results[1]) and same(results[0], results[2])
    engine = build(Adapted(), settings(Z3, bf16=BF16), "none")
    with torch.no_grad():
        engine.module.adapter.weight.ds_tensor.mul_(1.01)
    with pytest.raises(RuntimeError, match="does not hold"):
        adapprox_ds.attach(engine)


#: Wrappers whose states can be set: (zero_optimization, more, first_moment).
SET: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "z1": ({"stage": 1}, {}, "int8"),
    "z2_offload": ({**Z2, **CPU}, {"bf16": {"enabled": True}}, "fp32"),
    "bf16_optimizer": (
        {"stage": 1},
        {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
        "fp32",
    ),
    "z3": (Z3, {}, "int8"),
    "z3_sub_groups": ({**Z3, **CPU, "sub_group_size": 200}, {"bf16": {"enabled": True}}, "fp32"),
}


def values_like(p: Any, seed: int) -> torch.Tensor:
    """A second moment of one rank, as large as Adam's."""
    shape = tuple(getattr(p, "ds_shape", p.shape))
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.rand(n, generator=generator) + 0.5 for n in shape]
    root = parts[0] if len(parts) == 1 else torch.outer(*parts)
    return (root * 0.01).square()


def states_are_set(folder: Path) -> None:
    """DeepSpeed's functions set exp_avg_sq: it reads so, and the next step factors it."""
    for name, (zero, more, momentum) in SET.items():
        engine = build(Plain(), settings(zero, **more), "json", first_moment=momentum)
        step(engine, 0)
        optimizer = adapprox_of(engine)
        states = [s for s in optimizer.state.values() if s]
        compact = optimizer.metrics().state_bytes
        stores = [s["exp_avg_sq"].store for s in states]
        new = {p: values_like(p, i) for i, p in enumerate(engine.module.parameters())}
        for turn in (2, 1):  # what is set twice takes no more memory
            for p, values in new.items():
                for key in ("exp_avg", "exp_avg_sq"):
                    safe_set_full_optimizer_state(p, values * turn, key)
                read = safe_get_full_optimizer_state(p, "exp_avg_sq")
                assert torch.equal(read, values * turn), name
                mean = safe_get_full_optimizer_state(p, "exp_avg")
                bound = 0.0 if momentum == "fp32" else float(values.max()) * turn / 127
                assert float((mean - values * turn).abs().max()) <= bound, name
        if zero["stage"] == 3:
            for p, values in new.items():
                local = safe_get_local_optimizer_state(p, "exp_avg_sq")
                safe_set_local_optimizer_state(p, local / 2, "exp_avg_sq")
                new[p] = values / 2
        held = optimizer.metrics().state_bytes
        dense = sum(4 * s["exp_avg_sq"].numel() for s in states)
        assert compact <= held <= compact + dense
        engine.save_checkpoint(str(folder / name), tag="set")
        # Of which a step without gradients leaves 0.999, in factors.
        hook = optimizer.register_step_pre_hook(zero_gradients)
        step(engine, 1)
        hook.remove()
        assert [s["exp_avg_sq"].store for s in states] == stores
        assert optimizer.metrics().state_bytes == compact, name
        for p, values in new.items():
            read = safe_get_full_optimizer_state(p, "exp_avg_sq").reshape(-1)
            error = float((read - 0.999 * values.reshape(-1)).norm() / values.norm())
            assert error < 1e-3, (name, error)
        again = build(Plain(), settings(zero, **more), "json", first_moment=momentum)
        again.load_checkpoint(str(folder / name), tag="set")
        adapprox_of(again).register_step_pre_hook(zero_gradients)
        step(again, 1)
        pairs = zip(weights(engine), weights(again), strict=True)
        assert max(float((a - b).abs().max()) for a, b in pairs) < 1e-5
        again.destroy()
        engine.destroy()


def zero_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad.zero_()


def states_that_cannot_be_set(folder: Path) -> None:
    """What no step could take in is refused, and the message says what its caller can do."""
    for stage in (2, 3):
        zero = {"stage": stage}
        for cls, knobs, message in (
            (MicroAdam, {}, "Leave them out of the call; or train with Adapprox"),
            (Adapprox, {"scope": "matrix"}, "Leave exp_avg_sq of matrices out of the call"),
        ):
            engine = build(Plain(), settings(zero), "json", cls, **knobs)
            step(engine, 0)
            weight, bias = engine.module.parameters()
            with pytest.raises((NotImplementedError, RuntimeError), match=message):
                safe_set_full_optimizer_state(weight, values_like(weight, 0), "exp_avg_sq")
            if cls is Adapprox:
                safe_set_full_optimizer_state(bias, values_like(bias, 0), "exp_avg_sq")
                read = safe_get_full_optimizer_state(bias, "exp_avg_sq")
                assert torch.equal(read, values_like(bias, 0))
            step(engine, 1)
            engine.destroy()
        engine = build(Plain(), settings(zero), "json")
        step(engine, 0)
        p = engine.module.layer.weight  # of which each rank has a part
        for bad in (-1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match="allowed: finite numbers >= 0"):
                safe_set_full_optimizer_state(p, values_like(p, 0) + bad, "exp_avg_sq")
        engine.destroy()


def unchecked_gradients(folder: Path) -> None:
    """Who told DeepSpeed not to be stopped by infinity is not stopped, unless told us otherwise."""
    for stage in (1, 2):
        for cls in (Adapprox, MicroAdam):
            for how in ("json", "attached"):
                for checks, mode in ((False, None), (False, "raise"), (True, None)):
                    bf16 = {"enabled": True, "check_grad_overflow": checks}
                    knobs = {} if mode is None else {"nonfinite": mode}
                    engine = build(
                        Plain(), settings({"stage": stage}, bf16=bf16), how, cls, **knobs
                    )
                    before = weights(engine)
                    x = torch.full((4, 16), math.inf, dtype=torch.bfloat16)
                    engine.backward(engine(x))
                    if mode == "raise":
                        with pytest.raises(NonfiniteGradientError, match="hold NaN, infinity"):
                            engine.step()
                        continue  # DeepSpeed leaves param_groups at the group that raised
                    engine.step()
                    assert adapprox_of(engine).skipped == 0
                    assert same(before, weights(engine)) == checks
    # Where DeepSpeed does not check, but for another reason.
    engine = build(Plain(), settings({"stage": 1, "compute_grad_norm": False}), "json")
    engine.backward(engine(torch.full((4, 16), 1e25)))
    with pytest.raises(NonfiniteGradientError, match="leave fp32"):
        engine.step()


def all_but_the_state_is_offloaded(folder: Path) -> None:
    """At stage 3 DeepSpeed moves the rest to the host and back, and the run goes on as it would."""
    rest = ("lp_params", "lp_grads", "contiguous_grad_buffer")
    results = []
    for moved in (False, True):
        engine = build(Plain(), settings(Z3, bf16={"enabled": True}), "json")
        for seed in range(3):
            step(engine, seed)
            if moved:
                with pytest.raises(AssertionError, match="only for DeepSpeed FusedAdam"):
                    engine.offload_states()
                include = [OffloadStateTypeEnum[name] for name in rest]
                engine.offload_states(include=include, pin_memory=False)
                engine.reload_states()
        results.append(weights(engine))
        engine.destroy()
    assert same(*results)


CASES: dict[str, Callable[[Path], None]] = {
    f.__name__: f
    for f in (
        experts,
        masters_below_their_parameters,
        states_are_set,
        states_that_cannot_be_set,
        unchecked_gradients,
        all_but_the_state_is_offloaded,
    )
}
