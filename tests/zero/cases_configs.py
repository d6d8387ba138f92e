# SPDX-License-Identifier: Apache-2.0
"""Configs train a small GPT-2: every file of ds_configs/, and what ``configure`` writes.

And the code of docs/faults.md, with one of them. Run by test_configs.py.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel

import adapprox_ds
from adapprox_ds.__main__ import main
from adapprox_ds.adapprox.moment import LowRankMoment
from adapprox_ds.micro_adam.tensors import WindowSquare
from adapprox_ds.report.estimate import estimate
from adapprox_ds.report.model_shapes import load_shapes
from tests import ROOT

FOLDER = ROOT / "ds_configs"
STEPS = 12


def small(pieces: int) -> GPT2Config:
    config = GPT2Config(vocab_size=pieces, n_embd=32, n_layer=2, n_head=2, n_positions=16)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    config.architectures = ["GPT2LMHeadModel"]
    return config


def trains(path: Path, folder: Path, pieces: int = 97) -> int:
    """The loss on one repeated batch falls, and the state is compact; returns its bytes."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(small(pieces))
    batch = torch.arange(64).reshape(4, 16) % 97
    engine = adapprox_ds.initialize(model=model, config=str(path))[0]
    losses = []
    for _ in range(STEPS):
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0], losses
    size = 0
    kind = {"Adapprox": LowRankMoment, "MicroAdam": WindowSquare}.get(
        json.loads(path.read_text())["optimizer"]["type"]
    )
    if kind is not None:
        optimizer = adapprox_ds.attach(engine)
        moments = [state["exp_avg_sq"] for state in optimizer.state.values()]
        assert moments
        assert all(isinstance(moment, kind) for moment in moments)
        metrics = optimizer.metrics()
        assert metrics.step > 0
        assert metrics.state_bytes < metrics.adamw_state_bytes
        size = metrics.state_bytes
    engine.destroy()
    return size


#: With so many pieces the embedding is cut at stage 3 instead of being kept whole.
PIECES = 4096
USERS: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2}},
    "zero_optimization": {"stage": 1, "overlap_comm": False},
    "bf16": {"enabled": True},
}
#: By name: memory, base, and what is then chosen.
WRITTEN: dict[str, tuple[str, bool, tuple[int, str, str]]] = {
    "smaller_moment": ("1.3MB", False, (2, "none", "int8")),
    "cut_weights": ("1.25MB", False, (3, "none", "bf16")),
    "masters": ("1.1MB", False, (2, "none", "int8")),
    "offload": ("0.5MB", False, (2, "cpu", "fp32")),
    "from": ("1.45MB", True, (1, "none", "int8")),
}


def written(name: str, folder: Path) -> None:
    """A config of ``configure`` is what fits, trains, and holds the state that was promised."""
    memory, from_base, expected = WRITTEN[name]
    mine = folder / f"rank{dist.get_rank()}"
    small(PIECES).save_pretrained(mine)
    base, output = mine / "base.json", mine / "written.json"
    base.write_text(json.dumps(USERS))
    arguments = ["--model", str(mine), "--gpus", "2", "--memory", memory, "--activations", "1KB"]
    arguments += ["--from", str(base)] if from_base else []
    assert main(["configure", *arguments, "-o", str(output)]) == 0
    config = json.loads(output.read_text())
    zero = config["zero_optimization"]
    offload = zero.get("offload_optimizer", {}).get("device", "none")
    first_moment = config["optimizer"]["params"]["first_moment"]
    assert (zero["stage"], offload, first_moment) == expected, config
    if from_base:
        assert {**config, "optimizer": None} == {**USERS, "optimizer": None}
    size = trains(output, folder, PIECES)
    compensated = config["optimizer"]["params"].get("weight_rounding") == "compensated"
    assert compensated == (name == "masters")
    promised = estimate(
        load_shapes(str(mine)),
        stage=zero["stage"],
        world=2,
        first_moment=first_moment,
        masters="compensated" if compensated else "fp32",
    )
    assert size == promised.adapprox[8].state[dist.get_rank()]


def resumes(folder: Path) -> None:
    """The code of docs/faults.md: from the last checkpoint that is whole, not the latest."""
    (code,) = re.findall(
        r"```python\n(.*?)```", (FOLDER.parent / "docs/faults.md").read_text(), re.DOTALL
    )
    torch.manual_seed(0)
    path = str(FOLDER / "ds_adapprox.json")
    engine = adapprox_ds.initialize(model=GPT2LMHeadModel(small(97)), config=path)[0]
    batch = torch.arange(64).reshape(4, 16) % 97
    os.chdir(folder)
    for _ in range(2):
        engine.backward(engine(input_ids=batch, labels=batch).loss)
        engine.step()
        engine.save_checkpoint("checkpoints")
    dist.barrier()
    if dist.get_rank() == 0:
        (left,) = Path("checkpoints/global_step2").glob("*zero_pp_rank_1_*optim_states.pt")
        left.unlink()
    dist.barrier()
    exec(code, {"engine": engine})
    assert Path("checkpoints/latest").read_text() == "global_step2"
    assert engine.global_steps == 1
    engine.destroy()
    os.chdir(FOLDER.parent)


CASES: dict[str, Callable[[Path], object]] = {
    **{path.stem: partial(trains, path) for path in sorted(FOLDER.glob("*.json"))},
    **{f"written_{name}": partial(written, name) for name in WRITTEN},
    "faults_page": resumes,
}
