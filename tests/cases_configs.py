# SPDX-License-Identifier: Apache-2.0
"""Every file of ds_configs/ is loaded as it is and trains a small GPT-2. Run by test_configs.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import adapprox_ds
from adapprox_ds.lowrank.moment import LowRankMoment
from adapprox_ds.sparse.tensors import WindowSquare

FOLDER = Path(__file__).resolve().parent.parent / "ds_configs"
STEPS = 12


def trains(path: Path, folder: Path) -> None:
    """The loss on one repeated batch falls, and the state is compact."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=16)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = GPT2LMHeadModel(config)
    batch = torch.arange(64).reshape(4, 16) % 97
    engine = adapprox_ds.initialize(model=model, config=str(path))[0]
    losses = []
    for _ in range(STEPS):
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0], losses
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
    engine.destroy()


CASES: dict[str, Callable[[Path], None]] = {
    path.stem: partial(trains, path) for path in sorted(FOLDER.glob("*.json"))
}
