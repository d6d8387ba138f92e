# SPDX-License-Identifier: Apache-2.0
"""What the package gives to collectives, by NCCL's rules. Run by test_nccl.py on two ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, distributed
from torch.optim import AdamW, Muon

import adapprox_ds
from adapprox_ds import Adapprox
from adapprox_ds.checkpoint.files import CheckpointError
from adapprox_ds.checkpoint.load import _on_all_processes
from adapprox_ds.core.kernels import backends
from adapprox_ds.core.shards import Shard, ShardTable
from adapprox_ds.zero import MatrixViews, handshake
from adapprox_ds.zero.discover import Recorded, all_processes, fragments_between
from adapprox_ds.zero.norms import norm_of_groups
from tests.zero import pretended

KNOBS = {"lr": 1e-2, "rank_max": 3, "scope": "matrix", "nonfinite": "skip"}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(12, 17), torch.nn.Tanh(), torch.nn.Linear(17, 30))


def trained(stage: int, **knobs: Any) -> list[Tensor]:
    """Weights after some steps of an engine."""
    zero = {"stage": stage, **(OFFLOAD if stage == 3 else {})}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        # So that ranks have to ask each other about the gradients.
        "compute_grad_norm": False,
        "zero_optimization": {**zero, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "Adapprox", "params": {**KNOBS, **knobs}},
    }
    net = model()
    engine = adapprox_ds.initialize(
        model=net, model_parameters=list(net.parameters()), config=config
    )[0]
    random = torch.Generator().manual_seed(distributed.get_rank())
    for _ in range(3):
        x = torch.randn(4, 12, generator=random)
        engine.backward(engine(x).square().mean())
        engine.step()
    optimizer = adapprox_ds.attach(engine)
    assert optimizer.metrics(synchronize=True).mean_error < 1 and optimizer.shards.agreed
    return [safe_get_full_fp32_param(p).detach().clone() for p in net.parameters()]


def check_engine(stage: int, folder: Path, **knobs: Any) -> None:
    """The shards of an engine lie on the CPU, as with CPU offload; sums are what they were."""
    plain = trained(stage, **knobs)
    began: list[tuple[int, bool]] = []
    with (
        pretended.accelerator() as seen,
        mock.patch.object(
            get_accelerator(), "set_device", lambda i: began.append((i, bool(seen.sites)))
        ),
    ):
        found = trained(stage, **knobs)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    # Else the first collective of every rank would be on the device of the first.
    assert began[0] == (int(os.environ["LOCAL_RANK"]), False)
    note(folder, seen)


def viewed() -> list[Tensor]:
    """Weights after some steps of MatrixViews on whole matrices, with CPU offload."""
    net = model()
    zero = {"stage": 3, **OFFLOAD, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    views = partial(MatrixViews, Muon, vectors=AdamW, scope="matrix")
    engine = adapprox_ds.initialize(
        model=net, optimizer=views, model_parameters=list(net.parameters()), config=config
    )[0]
    for step in range(2):
        engine.backward(engine(torch.full((4, 12), 0.1 + step)).square().mean())
        engine.step()
    return [safe_get_full_fp32_param(p).detach().clone() for p in net.parameters()]


def check_views(folder: Path) -> None:
    """What MatrixViews brings to other processes and back, from shards on the CPU."""
    plain = viewed()
    with pretended.accelerator() as seen:
        found = viewed()
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    assert "matrix_views.gather.swap" in seen.sites
    note(folder, seen)


def flats(device: str, **knobs: Any) -> tuple[Adapprox, list[Tensor]]:
    """An optimizer whose shard of three parameters is this rank's half, and those parameters."""
    params = [(n, p.detach()) for n, p in model().named_parameters()]
    optimizer = Adapprox([(n, torch.nn.Parameter(p)) for n, p in params], **KNOBS, **knobs)
    group = optimizer.param_groups[0]
    whole = torch.cat([p.flatten() for _, p in params])
    offsets, at = [], 0
    for _, p in params:
        offsets.append(at)
        at += p.numel()
    size = -(-at // 2)
    whole = torch.nn.functional.pad(whole, (0, 2 * size - at))
    first = size * distributed.get_rank()
    flat = whole[first : first + size].to(device)
    sources = fragments_between(group["params"], offsets, first, size, Recorded(optimizer.shards))
    optimizer.shards.adopt([Shard.of(flat, 0, sources, process_group=distributed.group.WORLD)])
    optimizer.shards.agree = partial(handshake.any_process, group=distributed.group.WORLD)
    group["params"] = [flat]
    return optimizer, [flat]


def stepped(device: str, **knobs: Any) -> Tensor:
    """The shard after some steps."""
    optimizer, (flat,) = flats(device, **knobs)
    random = torch.Generator().manual_seed(1)
    with mock.patch.dict(os.environ, {backends.VARIABLE: "torch"}):
        for _ in range(3):
            g = torch.randn(2, flat.numel(), generator=random)[distributed.get_rank()]
            flat.grad = g.to(device)
            optimizer.step()
        optimizer.metrics(synchronize=True)
    return flat.cpu()


def check_device(folder: Path, **knobs: Any) -> None:
    """Shards lie on the accelerator."""
    plain = stepped("cpu", **knobs)
    with pretended.accelerator() as seen:
        found = stepped(pretended.KIND, **knobs)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)
    note(folder, seen)


def check_agreements(folder: Path) -> None:
    """What ranks ask each other beside steps."""
    rank = distributed.get_rank()
    world = distributed.group.WORLD
    with pretended.accelerator() as seen:
        with pytest.raises(RuntimeError, match="not started alike: a is 1 on rank 1"):
            handshake.require_alike({"a": str(rank)}, world, "x")
        assert all_processes(True, world) and not all_processes(rank == 0, None)
        for flag in (torch.tensor(float(rank)), torch.tensor(float(rank)).to(pretended.KIND)):
            assert handshake.any_process(flag, world).item() == 1.0
        with pytest.raises(CheckpointError):
            _on_all_processes(partial(int, "x" if rank else "1"))
        table = ShardTable("x")
        given = {0: [torch.full((3,), 2.0 + rank)]}
        assert norm_of_groups({**given, 1: None}, table, world)().item() == pytest.approx(27**0.5)
    note(folder, seen)


def note(folder: Path, seen: Any) -> None:
    """For the test that asks whether every collective was looked at."""
    if distributed.get_rank() == 0:
        (folder / "sites.json").write_text(json.dumps(sorted(seen.sites)))


REPLICATED = {"right_factor": "replicated"}
CASES: dict[str, Callable[[Path], None]] = {
    "z2": partial(check_engine, 2),
    "z3_offload": partial(check_engine, 3),
    "device": check_device,
    "device_replicated": partial(check_device, **REPLICATED),
    "views": check_views,
    "agreements": check_agreements,
}
