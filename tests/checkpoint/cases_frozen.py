# SPDX-License-Identifier: Apache-2.0
"""Frozen parameters, left out or not, and modules of two names. Run by test_universal.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

import adapprox_ds
from adapprox_ds.checkpoint import load_universal
from adapprox_ds.checkpoint.inspect import inspect
from tests.checkpoint.cases_switch import convert_on_rank_0
from tests.zero.cases_stages import adapprox_of


class Noted(nn.Linear):
    """A linear layer with a buffer."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__(n, m)
        self.register_buffer("seen", torch.zeros(3))


class Partly(nn.Module):
    """One frozen and one trained module, both under two names of one parent, and one more."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.base = self.same = Noted(24, 16)
        self.base.requires_grad_(False)
        self.shared = self.again = Noted(16, 16)
        self.late = Noted(16, 40)
        with torch.no_grad():
            for t in (*self.parameters(), *self.buffers()):
                t.copy_(torch.linspace(-fill, fill, t.numel()).view(t.shape))

    def forward(self, x: Tensor) -> Tensor:
        x = self.base(x) + self.same(2 * x)
        x = self.again(torch.tanh(self.shared(x)))
        return self.late(x).square().mean()


def start(stage: int, fill: float = 0.3, **knobs: Any) -> Any:
    model = Partly(fill)
    settings = {"lr": 1e-2, "rank_init": 2, "rank_max": 4, **knobs}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 20},
        "optimizer": {"type": "Adapprox", "params": settings},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2}},
    }
    parameters = list(model.parameters())
    return adapprox_ds.initialize(model=model, model_parameters=parameters, config=config)[0]


def train(engine: Any, steps: int) -> None:
    for _ in range(steps):
        x = torch.linspace(-1, 1, 24).view(1, 24) * (1 + torch.distributed.get_rank())
        engine.backward(engine(x))
        engine.step()


def held(engine: Any) -> dict[str, Tensor]:
    """Everything by name, whole, on every rank."""
    found = {f"buffer {n}": b.clone() for n, b in engine.module.named_buffers()}
    for name, p in engine.module.named_parameters():
        sharded = hasattr(p, "ds_id")
        with deepspeed.zero.GatheredParameters([p], enabled=sharded):
            found[f"low {name}"] = p.detach().clone()
        if name.startswith("base") or not any(adapprox_of(engine).state.values()):
            continue
        trains = p.requires_grad
        p.requires_grad_(True)  # DeepSpeed gives no state of others
        found[f"fp32 {name}"] = safe_get_full_fp32_param(p).clone()
        for key in ("exp_avg", "exp_avg_sq"):
            found[f"{key} {name}"] = safe_get_full_optimizer_state(p, key).clone()
        p.requires_grad_(trains)
    return found


def partly(stage: int, new_stage: int, exclude: bool, folder: Path) -> None:
    """What was left out keeps the model's values; what was frozen late is still a state's."""
    engine = start(stage)
    train(engine, 2)
    engine.module.late.requires_grad_(False)
    saved = held(engine)
    engine.save_checkpoint(str(folder / "run"), tag="s", exclude_frozen_parameters=exclude)
    engine.destroy()
    convert_on_rank_0(folder / "run", "as-saved")
    report = inspect(folder / "run" / "s_universal")
    # DeepSpeed leaves a parameter out by its first name; stages 1 and 2 keep the other.
    left_out = exclude and stage == 3
    assert report.frozen == (0 if left_out else 2)
    assert {row.name.split(".")[0] for row in report.rows} == {"shared", "late"}
    for late in (False, True):
        engine = start(new_stage, fill=0.7)
        own = held(engine)
        engine.module.late.requires_grad_(not late)
        load_universal(engine, folder / "run")
        found = held(engine)
        for name, value in saved.items():
            kept = left_out and name.startswith("low base")
            expected = own[name] if kept else value
            if not name.startswith("exp_avg_sq"):
                assert torch.equal(found[name], expected), name
            else:
                torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-6)
        if not late:
            train(engine, 1)
            assert {int(s["step"]) for s in adapprox_of(engine).state.values()} == {3}
        engine.destroy()


CASES: dict[str, Callable[[Path], None]] = {
    "frozen_z1_to_z3": partial(partly, 1, 3, True),
    "frozen_z2_to_z1": partial(partly, 2, 1, False),
    "frozen_z3_to_z2": partial(partly, 3, 2, False),
    "frozen_z3_to_z3": partial(partly, 3, 3, True),
}
