# SPDX-License-Identifier: Apache-2.0
"""Ranks that were started with different settings, models or releases. Two ranks."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
from deepspeed.pipe import PipelineModule

import adapprox_ds
from adapprox_ds import Adapprox
from adapprox_ds.zero import handshake
from tests.models import Cell, KnownGradients
from tests.zero.cases_stages import Z2, Z3, Case, adapprox_of, config_of, train


def rank() -> int:
    """This process's."""
    return torch.distributed.get_rank()


def known_model() -> KnownGradients:
    """All parameters filled."""
    model = KnownGradients()
    model.set_start_values()
    return model


def settings_of_config(folder: Path) -> None:
    """The JSON's params: refused before an engine is built, and alike ones train after it."""
    for method, knobs, message in (
        *(
            (
                method,
                {"lr": 1e-2 * (1 + rank())},
                rf'{owner}: .* "lr" of the optimizer\'s params is 0\.02 on rank 1 and 0\.01 on '
                r"rank 0\.",
            )
            for method, owner in (("default", "Adapprox"), ("micro", "MicroAdam"))
        ),
        (
            "default",
            {"lr": 1e-2} | ({"rank_max": 4} if rank() else {}),
            r'"rank_max" of the optimizer\'s params is 4 on rank 1 and absent on rank 0\.',
        ),
        (
            "default",
            {"seed": rank(), "betas": [0.9, 0.99 + 0.001 * rank()]},
            r'"seed" .* is 1 on rank 1 .*; "betas" .* is \[0\.9, 0\.991\] on rank 1 and \[0\.9, 0',
        ),
    ):
        config = config_of(Case(Z2, method=method, knobs=knobs))
        with pytest.raises(RuntimeError, match=message):
            adapprox_ds.initialize(model=known_model(), config=config)
    model = known_model()
    engine = adapprox_ds.initialize(model=model, config=config_of(Case(Z2)))[0]
    train(engine, Case(Z2), 0)
    assert adapprox_of(engine).metrics().step == 1


def models(folder: Path) -> None:
    """Names, shapes, what is trained: DeepSpeed's broadcast of the weights would hang or crash."""
    renamed, wider, frozen = known_model(), known_model(), known_model()
    longer, narrow = known_model(), known_model()
    if rank():
        renamed.cells["other"] = renamed.cells.pop("w2")
        wider.cells["w2"] = Cell((16, 10))
        frozen.cells["w2"].weight.requires_grad_(False)
        longer.cells["more"] = Cell((3,))
        narrow.cells["w2"].to(torch.bfloat16)
    place = r"parameter \d of the model is "
    for model, message in (
        (renamed, rf"{place}.*'cells\.unused\.weight' .* on rank 1 and 'cells\.w2\.weight' of"),
        (wider, rf"{place}'cells.w2.weight' of shape \(16, 10\), .* and .*\(16, 9\).* on rank 0"),
        (frozen, rf"{place}'cells.w2.weight' .* frozen on rank 1 and .* trained on rank 0"),
        (longer, r"parameter 10 of the model is 'cells\.more.* on rank 1 and absent on rank 0"),
        (narrow, rf"{place}.*torch\.bfloat16, trained on rank 1 and .*torch\.float32, trained on"),
    ):
        with pytest.raises(RuntimeError, match=message):
            adapprox_ds.initialize(model=model, config=config_of(Case(Z2)))


def releases(folder: Path) -> None:
    """Another version of the package on one rank."""
    with mock.patch.object(handshake, "__version__", f"9.{rank()}"):
        with pytest.raises(RuntimeError, match=r"adapprox_ds is 9\.1 on rank 1 and 9\.0 on rank 0"):
            adapprox_ds.initialize(model=known_model(), config=config_of(Case(Z2)))


def other_compression(folder: Path) -> None:
    """Another zlib on one rank: other bytes of the same facts; the details of others still come."""
    plain = zlib.compress
    level = 9 * rank()
    with mock.patch.object(handshake.zlib, "compress", lambda text: plain(text, level)):
        handshake.require_alike({"a": "x" * 1000}, None, "Adapprox")
        with pytest.raises(RuntimeError, match=r"b is 1 on rank 1 and 0 on rank 0"):
            handshake.require_alike({"a": "x" * 1000, "b": str(rank())}, None, "Adapprox")


def groups_of(model: KnownGradients, decay: float) -> list[dict[str, Any]]:
    """Matrices and the rest."""
    trained = [p for p in model.parameters() if p.requires_grad and p.numel()]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def settings_of_groups(folder: Path) -> None:
    """Of an instance: known after the engine is built, or at the first step where none attached."""
    message = r"weight_decay of group 0 is 0\.2 on rank 1 and 0\.1 on rank 0\. Start"
    for zero in (None, Z2, Z3):
        for ours in (True, False):
            if zero is None and not ours:
                continue  # no collective that ranks share: docs/faults.md
            model = known_model()
            case = Case(zero, how="instance")
            optimizer = Adapprox(groups_of(model, 0.1 * (1 + rank())), lr=1e-2)
            given = {"model": model, "optimizer": optimizer, "config": config_of(case)}
            if ours:
                with pytest.raises(RuntimeError, match=message):
                    adapprox_ds.initialize(**given)
                continue
            engine = deepspeed.initialize(**given)[0]
            with pytest.raises(RuntimeError, match=message):
                train(engine, case, 0)
            assert not any(optimizer.state.values())


def members_of_groups(folder: Path) -> None:
    """The same parameters in other groups: shards would be cut elsewhere, and DeepSpeed crash."""
    for zero in (Z2, Z3):
        model = known_model()
        groups = groups_of(model, 0.0)
        if rank():
            groups[1]["params"].append(groups[0]["params"].pop())
        message = r"parameters of group 0 is .* on rank 1 and .*unused\.weight on rank 0; "
        config = config_of(Case(zero))
        with pytest.raises(RuntimeError, match=message):
            adapprox_ds.initialize(model=model, model_parameters=iter(groups), config=config)


def compared_once(folder: Path) -> None:
    """A second ``attach`` is no collective: one rank alone may ask for its metrics."""
    for zero in (None, Z2):
        engine = adapprox_ds.initialize(model=known_model(), config=config_of(Case(zero)))[0]
        if rank():
            adapprox_ds.attach(engine).metrics()


class Grid:
    """What DeepSpeed asks of a Megatron-like ``mpu``: two ranks that hold parts of one model."""

    def __init__(self) -> None:
        self.alone = [torch.distributed.new_group([r]) for r in range(2)][rank()]
        self.all = torch.distributed.new_group([0, 1])

    def __getattr__(self, name: str) -> Callable[[], Any]:
        group = self.alone if "data_parallel" in name else self.all
        answers: dict[str, Callable[[], Any]] = {
            "group": lambda: group,
            "rank": lambda: torch.distributed.get_rank(group),
            "size": lambda: torch.distributed.get_world_size(group),
        }
        if name.startswith("get_") and "pipe" not in name and "sequence" not in name:
            return answers[name.rsplit("_", 1)[-1]]
        raise AttributeError(name)


def tensor_parallel_ranks_differ(folder: Path) -> None:
    """Ranks of one model-parallel group hold other shapes and groups, and are let be."""
    for zero in (None, Z2):
        model = torch.nn.Sequential(Cell((8 + rank(), 6)), *[Cell((4, 4))] * rank())
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(1.0)
        engine = adapprox_ds.initialize(model=model, mpu=Grid(), config=config_of(Case(zero)))[0]
        engine.backward(engine(torch.ones(())))
        engine.step()
        assert float(model[0].weight.detach().max()) < 1.0


def pipeline_stages_differ(folder: Path) -> None:
    """Each rank has layers of its own."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)]
    model = PipelineModule(layers, num_stages=2, loss_fn=torch.nn.functional.mse_loss)
    config = config_of(Case({"stage": 1}))
    engine = adapprox_ds.initialize(
        model=model, model_parameters=list(model.parameters()), config=config
    )[0]
    data = iter([(torch.ones(1, 6), torch.zeros(1, 3))] * 2)
    losses = [float(engine.train_batch(data)) for _ in range(2)]
    assert losses[1] < losses[0]


CASES: dict[str, Callable[[Path], None]] = {
    function.__name__: function
    for function in (
        settings_of_config,
        models,
        releases,
        other_compression,
        settings_of_groups,
        members_of_groups,
        compared_once,
        tensor_parallel_ranks_differ,
        pipeline_stages_differ,
    )
}
