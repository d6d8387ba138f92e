# SPDX-License-Identifier: Apache-2.0
"""scope="matrix": a small GPT-2 by number of ranks, traffic, faults. Run by test_scope.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, distributed
from transformers import GPT2Config, GPT2LMHeadModel

import adapprox_ds
from adapprox_ds import Adapprox

STEPS, BATCH, LENGTH, VOCABULARY = 100, 12, 16, 61
KNOBS = {"lr": 2e-3, "rank_max": 4, "weight_decay": 0.1, "eps": 1e-6}


def model() -> GPT2LMHeadModel:
    """Shapes that no number of ranks up to 4 divides by whole rows."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=30, n_layer=2, n_head=3, n_positions=LENGTH + 1,
        bos_token_id=None, eos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def batches(steps: int) -> list[Tensor]:
    """Counting in strides: learnable, and different at every step."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(steps):
        first = torch.randint(VOCABULARY, (BATCH, 1), generator=generator)
        stride = torch.randint(1, 5, (BATCH, 1), generator=generator)
        made.append((first + stride * torch.arange(LENGTH)) % VOCABULARY)
    return made


def rate(step: int) -> float:
    """Warm-up over ten steps."""
    return KNOBS["lr"] * min(1.0, (step + 1) / 10)


def reference(steps: int = STEPS) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights of plain torch on full matrices."""
    net = model()
    optimizer = Adapprox(list(net.named_parameters()), **KNOBS)
    losses = []
    for step, batch in enumerate(batches(steps)):
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.zero_grad()
        loss = net(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in net.named_parameters()}


def start(stage: int, **knobs: Any) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": BATCH // distributed.get_world_size(),
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "Adapprox", "params": {**KNOBS, **knobs}},
    }
    net = model()
    return adapprox_ds.initialize(
        model=net, model_parameters=list(net.parameters()), config=config
    )[0]


def train(engine: Any, steps: int, first: int = 0) -> list[float]:
    """Mean losses over the ranks."""
    world, rank = distributed.get_world_size(), distributed.get_rank()
    losses = []
    for step, batch in list(enumerate(batches(first + steps)))[first:]:
        engine.optimizer.param_groups[0]["lr"] = rate(step)
        mine = batch[rank * BATCH // world : (rank + 1) * BATCH // world]
        loss = engine(input_ids=mine, labels=mine).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        distributed.all_reduce(mean)
        losses.append(mean.item() / world)
    return losses


def weights(engine: Any) -> dict[str, Tensor]:
    """Whole fp32 weights."""
    return {
        n: safe_get_full_fp32_param(p).detach().clone() for n, p in engine.module.named_parameters()
    }


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Over all weights, relative."""
    total = sum(float(w.square().sum()) for w in theirs.values())
    gaps = (float((ours[n].view_as(w) - w).square().sum()) for n, w in theirs.items())
    return (sum(gaps) / total) ** 0.5


def trajectory(stage: int, folder: Path) -> None:
    """100 steps end where plain torch on full matrices ends; per partition they do not."""
    losses, expected = reference()
    found = {}
    for scope in ("matrix", "partition"):
        engine = start(stage, scope=scope)
        own = train(engine, STEPS)
        found[scope] = distance(weights(engine), expected)
        if scope == "matrix":
            gap = max(abs(a - b) for a, b in zip(own, losses, strict=True))
            everyone: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(everyone, weights(engine))
            assert all(distance(w, everyone[0]) == 0.0 for w in everyone[1:])
        engine.destroy()
    print("DIST", stage, distributed.get_world_size(), found, gap, losses[0], losses[-1])
    assert found["matrix"] < 1e-4


CASES: dict[str, Callable[[Path], None]] = {
    **{f"trajectory_z{stage}": partial(trajectory, stage) for stage in (1, 2, 3)},
}
