# SPDX-License-Identifier: Apache-2.0
"""Faults of DeepSpeed 0.19.8 and of configurations: survived, repaired or refused.

Run by test_faults.py on three ranks. Faults that other suites cover: the wrong `_hp_mapping` under
round_robin_gradients (cases_stages, "round_robin"), states linked after the first group only
(cases_stages reads every group's state after the first step).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch

import adapprox_ds
from adapprox_ds import Adapprox, MicroAdam
from adapprox_ds.core.shards import ShardTable
from adapprox_ds.zero import discover, unattached
from tests.models import Cell, KnownGradients, start_value
from tests.zero.cases_stages import (
    CPU,
    Z2,
    Z3,
    Case,
    adapprox_of,
    check,
    config_of,
    oracles,
    start,
    train,
)

#: Weights and their states in bf16 alone.
BF16_MASTERS = {
    "enabled": True,
    "bf16_master_weights_and_grads": True,
    "bf16_optimizer_states": True,
}


class Sometimes(KnownGradients):
    """Uses parameter "unused" at even steps only."""

    def forward(self, step: int, factor: float) -> torch.Tensor:
        total = super().forward(step, factor)
        if step % 2 == 0:
            total = total + self.cells["unused"](factor * self.coefficient("unused", step))
        return total


def stale_gradients(case: Case, stale: bool) -> None:
    """DeepSpeed re-applies the last gradient of a parameter unused in this step (`stale`).

    Nothing an optimizer could know of; ours sees what any optimizer sees, and leaves `.grad`
    unchanged.
    """
    plain = KnownGradients.forward
    KnownGradients.forward = Sometimes.forward  # type: ignore[method-assign]
    try:
        engine, model = start(case)
        naive = oracles(case, torch.distributed.get_world_size())
        optimizer = adapprox_of(engine)
        before: list[torch.Tensor] = []

        def remember(*_: Any) -> None:
            before[:] = [p.grad.clone() for g in optimizer.param_groups for p in g["params"]]

        def compare(*_: Any) -> None:
            now = [p.grad for g in optimizer.param_groups for p in g["params"]]
            # Padding may hold NaN.
            pairs = zip(before, now, strict=True)
            assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in pairs)

        optimizer.register_step_pre_hook(remember)
        optimizer.register_step_post_hook(compare)
        last = torch.zeros(())
        for step in range(4):
            # `super()` in the patched method needs an instance of the subclass.
            model.__class__ = Sometimes
            KnownGradients.forward = plain  # type: ignore[method-assign]
            train(engine, case, step)
            for n, parts in naive.items():
                g = case.coefficient(n, step)
                if n == "unused" and step % 2:
                    g = last if stale else g * 0.0
                last = g if n == "unused" else last
                for part, piece in zip(
                    parts, g.reshape(-1).split([p.w.numel() for p in parts]), strict=True
                ):
                    part.step(piece)
            check(case, engine, model, naive, moments=2e-4)
    finally:
        KnownGradients.forward = plain  # type: ignore[method-assign]


def stale_zero2(folder: Path, method: str = "default") -> None:
    """ZeRO-2 gives zeros."""
    stale_gradients(Case(Z2, method=method), stale=False)


def stale_zero3(folder: Path, method: str = "default") -> None:
    """ZeRO-3 gives the last gradient again."""
    stale_gradients(Case(Z3, method=method), stale=True)


def shared_step_tensor(folder: Path, method: str = "default") -> None:
    """The stock universal loader gives all sub-groups of ZeRO-3 one `step` tensor object."""
    case = Case({**Z3, "sub_group_size": 200}, method=method)
    engine, _ = start(case)
    train(engine, case, 0)
    states = [s for s in adapprox_of(engine).state.values() if s]
    assert len(states) > 2
    for state in states:
        state["step"] = states[0]["step"]
    train(engine, case, 1)
    assert [float(s["step"]) for s in states] == [2.0] * len(states)


def universal_load_mixes_groups(folder: Path) -> None:
    """Stage 3's stock universal loader gives every group the first one's settings: refused."""
    case = Case(Z3, extra={"checkpoint": {"load_universal": True}})
    with pytest.raises(ValueError, match=r"load_universal.*weight_decay differs.*0\.1, 0\.0"):
        start(case)


def universal_load_of_windows(folder: Path) -> None:
    """The stock universal loader makes windows dense, at any stage: refused."""
    for zero in (Z2, Z3):
        for how in ("initialize", "instance"):
            extra = {"checkpoint": {"load_universal": True}}
            case = Case(zero, method="micro", how=how, extra=extra)
            message = r"MicroAdam: checkpoint\.load_universal=true is not"
            with pytest.raises(ValueError, match=message):
                adapprox_ds.attach(start(case)[0])


def universal_load_of_parts(folder: Path) -> None:
    """The stock universal loader gives ranks dense parts of what they factor together: refused."""
    for zero in ({"stage": 1}, Z2, Z3):
        for how in ("initialize", "instance"):
            case = Case(
                zero,
                how=how,
                knobs={"scope": "matrix", "weight_decay": 0.0},
                extra={"checkpoint": {"load_universal": True}},
            )
            message = r"load_universal=true with scope='matrix'.*call adapprox_ds\.load_universal"
            with pytest.raises(ValueError, match=message):
                adapprox_ds.attach(start(case)[0])


def universal_load_of_padding(folder: Path) -> None:
    """Stages 1 and 2's stock universal loader cannot index a padding-only shard: refused."""
    model = torch.nn.ModuleDict({"a": Cell((8, 8)), "b": Cell((2,))})
    config = config_of(Case({"stage": 1}, extra={"checkpoint": {"load_universal": True}}))
    groups = [{"params": model["a"].parameters()}, {"params": model["b"].parameters()}]
    groups = [{"params": list(g["params"])} for g in groups]
    with pytest.raises(ValueError, match=r"group 1 of 2 elements leaves a rank of 3 with padding"):
        adapprox_ds.initialize(model=model, model_parameters=groups, config=config)


def padding_only_shards(folder: Path, method: str = "default") -> None:
    """A rank whose shard of a group is padding only trains, saves and loads, attached or not."""
    cls = Case(method=method).cls
    knobs: dict[str, Any] = {"lr": 1e-2, **({"density": 1.0} if cls is MicroAdam else {})}
    for how in ("attached", "found"):
        model = torch.nn.ModuleDict({"a": Cell((8, 8)), "b": Cell((2,))})
        with torch.no_grad():
            for cell in model.values():
                cell.weight.fill_(1.0)
        groups = [{"params": [model["a"].weight]}, {"params": [model["b"].weight]}]
        config = config_of(Case(Z2, how="instance"))
        if how == "attached":
            config["optimizer"] = {"type": cls.__name__, "params": knobs}
            engine = adapprox_ds.initialize(model=model, model_parameters=groups, config=config)[0]
        else:
            engine = deepspeed.initialize(
                model=model, optimizer=cls(groups, **knobs), config=config
            )[0]
        for _ in range(2):
            engine.backward(sum(cell(torch.ones(())) for cell in model.values()))
            engine.step()
        engine.save_checkpoint(str(folder / how))
        engine.load_checkpoint(str(folder / how))
        engine.backward(sum(cell(torch.ones(())) for cell in model.values()))
        engine.step()
        # Gradient 1, no clipping needed after the first step: -lr a step, decay aside.
        assert float((model["b"].weight - model["b"].weight[0]).abs().max()) == 0
        assert 0.9 < float(model["b"].weight[0]) < 1.0
        assert adapprox_of(engine).metrics().step == 3


def poisoned_padding(folder: Path, method: str = "default") -> None:
    """ZeRO-3's slots end in uninitialised memory: NaN there stays there."""
    case = Case(Z3, method=method)
    engine, model = start(case)
    naive = oracles(case, torch.distributed.get_world_size())
    optimizer = adapprox_of(engine)
    pads = 0
    for flat, layout in optimizer.shards.layouts.items():
        padding = torch.ones(flat.numel(), dtype=torch.bool)
        for part in layout.fragments:
            f = part.fragment
            padding[f.offset : f.offset + f.numel] = False
        pads += int(padding.sum())
        flat.data[padding] = float("nan")
    total = torch.tensor(pads)
    torch.distributed.all_reduce(total)
    assert total > 0, "no padding in this world"
    for step in range(3):
        train(engine, case, step)
        for n, parts in naive.items():
            g = case.coefficient(n, step) * (0.0 if n == "unused" else 1.0)
            sizes = [p.w.numel() for p in parts]
            for part, piece in zip(parts, g.reshape(-1).split(sizes), strict=True):
                part.step(piece)
        check(case, engine, model, naive)


def no_decay_in_dummy_step(folder: Path, method: str = "default") -> None:
    """Stage 0 in bf16 steps with zero gradients inside initialize: no decay, no step counted."""
    for how in ("initialize", "instance"):
        engine, model = start(Case(precision="bf16", how=how, method=method))
        pairs = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
        known = {id(c.weight): n for n, c in model.cells.items()}
        for params, masters in pairs:
            for p, master in zip(params, masters, strict=True):
                assert torch.equal(master.detach(), start_value(known[id(p)]))
        assert adapprox_of(engine).metrics().step == 0


def foreign_optimizer(folder: Path) -> None:
    """An engine whose optimizer was swapped for another: attach says so and names the remedy."""
    model = KnownGradients()
    model.set_start_values()
    config = config_of(Case(Z2, how="instance"))
    engine = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config
    )[0]
    with pytest.raises(RuntimeError, match=r"is AdamW, not Adapprox.*zero_force_ds_cpu_optimizer"):
        adapprox_ds.attach(engine)


def moved_weights(folder: Path, method: str = "default") -> None:
    """Weights changed behind DeepSpeed's back: the self-check refuses before the first step."""
    for how in ("attached", "found"):
        case = Case(Z2, how="instance", method=method)
        engine, model = start(case)
        with torch.no_grad():
            model.cells["conv"].weight.mul_(2.0)
        refusal = rf"does not hold.*; {case.cls.__name__} will not train|no known order"
        with pytest.raises(RuntimeError, match=refusal):
            if how == "attached":
                adapprox_ds.attach(engine)
            else:
                train(engine, case, 0)


def refused_configurations(folder: Path, method: str = "default") -> None:
    """Each unsupported setting names its key and remedy, before an engine is built."""
    owner = Case(method=method).cls.__name__
    nvme = {"offload_optimizer": {"device": "nvme", "nvme_path": str(folder)}}
    refused: list[tuple[dict[str, Any], str]] = [
        ({"zero_optimization": {**Z3, **nvme}}, r'device="nvme".*use "cpu"'),
        ({"zero_optimization": {**Z2, "elastic_checkpoint": True}}, r"elastic_checkpoint=true"),
        ({"zero_optimization": {**Z2, "zenflow": {"topk_ratio": 0.1}}}, r"zenflow"),
        (
            {"zero_optimization": {**Z3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            r"ratio=0\.5",
        ),
        (
            {
                "zero_optimization": {
                    **Z3,
                    "offload_optimizer": {"device": "cpu", "super_offload": True},
                }
            },
            r"super_offload=true",
        ),
        (
            {"zero_optimization": {**Z3, **CPU}, "bf16": BF16_MASTERS},
            r"bf16_master_weights_and_grads=true with .*offload_optimizer.*leave one of the two",
        ),
        (
            {"bf16": {**BF16_MASTERS, "bf16_optimizer_states": False}},
            r"bf16_master_weights_and_grads=true without bf16\.bf16_optimizer_states=true.*both",
        ),
        (
            {"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}},
            r"fp16_master_weights_and_grads=true is not supported.*leave it out",
        ),
        ({"sparse_gradients": True}, r"sparse_gradients=true.*sparse=False"),
        (
            {"zero_optimization": {**Z2, **CPU}, "zero_force_ds_cpu_optimizer": True},
            r"zero_force_ds_cpu_optimizer=true.*use false",
        ),
        (
            {"torch_autocast": {"enabled": True, "dtype": "fp16"}, "gradient_clipping": 1.0},
            r'torch_autocast\.dtype="fp16".*gradient_clipping 0',
        ),
        (
            {
                "zero_optimization": {**Z2, "round_robin_gradients": True},
                "checkpoint": {"load_universal": True},
            },
            r"round_robin_gradients=true with checkpoint\.load_universal",
        ),
        (
            {"optimizer": {"type": "Adapprox", "params": {"rank_mx": 4}}},
            r"rank_mx=4; did you mean 'rank_max'",
        ),
        (
            {"optimizer": {"type": "Adapprox", "params": {"oversampling": -1}}},
            r"oversampling=-1 is not allowed; allowed: an integer >= 0",
        ),
        (
            {"optimizer": {"type": "MicroAdam", "params": {"windows": 4}}},
            r"MicroAdam: unknown parameter windows=4; did you mean 'window'",
        ),
    ]
    for extra, message in refused:
        model = KnownGradients()
        with pytest.raises((ValueError, TypeError), match=message):
            adapprox_ds.initialize(model=model, config={**config_of(Case(method=method)), **extra})
    for wrapper, message in (
        (SimpleNamespace(), "does not know DeepSpeed's SimpleNamespace"),
        (SimpleNamespace(swap_optimizer=True), "nvme"),
        (SimpleNamespace(elastic_checkpoint=True), "elastic_checkpoint"),
        (type("SuperOffloadOptimizer_Stage3", (), {})(), "super_offload"),
    ):
        with pytest.raises(RuntimeError, match=rf"^{owner}\b.*{message}"):
            discover.from_wrapper(wrapper, ShardTable(owner))
    with pytest.raises(RuntimeError, match=f"^{owner} was stepped with 1 tensors that are not the"):
        unattached.find(ShardTable(owner), [torch.ones(2)])


def config_sources(folder: Path) -> None:
    """One config, from a path, args or a dict; none or two is an error; other types pass."""
    path = folder / f"config{torch.distributed.get_rank()}.json"
    path.write_text(json.dumps(config_of(Case(Z2))))
    for source in ({"config": str(path)}, {"args": SimpleNamespace(deepspeed_config=str(path))}):
        engine = adapprox_ds.initialize(model=KnownGradients(), **source)[0]
        assert isinstance(adapprox_ds.attach(engine), Adapprox)
    with pytest.raises(ValueError, match="got none"):
        adapprox_ds.initialize(model=KnownGradients())
    with pytest.raises(ValueError, match="args.deepspeed_config', 'config'"):
        adapprox_ds.initialize(
            SimpleNamespace(deepspeed_config=str(path)), KnownGradients(), config=str(path)
        )
    adamw = {**config_of(Case(Z2)), "optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    engine = adapprox_ds.initialize(model=KnownGradients(), config=adamw)[0]
    assert isinstance(engine.optimizer.optimizer, torch.optim.AdamW)


def unscaled_fp16_warns(folder: Path) -> None:
    """Stage 0 in fp16: DeepSpeed divides by a scale it never applied; we say so."""
    config = {**config_of(Case(precision="fp16")), "fp16": {"enabled": True}}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapprox_ds.initialize(model=KnownGradients(), config=config)
    assert any("loss scale" in str(w.message) for w in caught)


CASES: dict[str, Callable[[Path], None]] = {
    function.__name__: function
    for function in (
        stale_zero2,
        stale_zero3,
        shared_step_tensor,
        universal_load_mixes_groups,
        universal_load_of_windows,
        universal_load_of_parts,
        universal_load_of_padding,
        padding_only_shards,
        poisoned_padding,
        no_decay_in_dummy_step,
        foreign_optimizer,
        moved_weights,
        refused_configurations,
        config_sources,
        unscaled_fp16_warns,
    )
}
CASES |= {
    f"micro_{function.__name__}": partial(function, method="micro")
    for function in (
        stale_zero2,
        stale_zero3,
        shared_step_tensor,
        padding_only_shards,
        poisoned_padding,
        no_decay_in_dummy_step,
        moved_weights,
        refused_configurations,
    )
}
