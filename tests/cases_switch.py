# SPDX-License-Identifier: Apache-2.0
"""A run that goes from AdamW to Adapprox, or back, loses nothing. Run by test_universal.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import adapprox_ds
from adapprox_ds.checkpoint import convert, load_universal
from adapprox_ds.checkpoint.moments import Adam
from adapprox_ds.lowrank.moment import LowRankMoment
from tests.cases_stages import adapprox_of

BEFORE, AFTER = 60, 40
VOCABULARY, WIDTH, BATCH = 64, 32, 64
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": BATCH,
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
}
SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0.01}


class Bigram(nn.Module):
    """Predicts a Markov chain's next symbol."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.hidden = nn.Linear(WIDTH, 4 * WIDTH)
        self.out = nn.Linear(4 * WIDTH, VOCABULARY)

    def forward(self, symbols: Tensor, following: Tensor) -> Tensor:
        hidden = torch.tanh(self.hidden(self.embedding(symbols)))
        return cross_entropy(self.out(hidden), following)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The same on every rank."""
    chain = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1000 + step)
    # Rare symbols too: their second moments are small, as in language.
    symbols = (VOCABULARY * torch.rand(BATCH, generator=g).square()).long()
    following = torch.multinomial((3 * chain).softmax(1)[symbols], 1, generator=g).view(-1)
    return symbols, following


def start(name: str, stage: int, **more: Any) -> Any:
    torch.manual_seed(0)
    model = Bigram()
    config = {**CONFIG, "zero_optimization": {"stage": stage}, **more}
    if name == "adamw":
        optimizer: Any = torch.optim.AdamW(model.parameters(), **SETTINGS)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    params = {**SETTINGS, "rank_init": 8, "rank_max": 8}
    config["optimizer"] = {"type": "Adapprox", "params": params}
    parameters = list(model.parameters())
    return adapprox_ds.initialize(model=model, model_parameters=parameters, config=config)[0]


def train(engine: Any, first: int, last: int) -> Tensor:
    losses = []
    for step in range(first, last):
        loss = engine(*batch(step))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return torch.tensor(losses)


def noise() -> float:
    """The spread of the loss over batches, of a model that stands still."""
    torch.manual_seed(0)
    model = Bigram()
    with torch.no_grad():
        return float(torch.stack([model(*batch(step)) for step in range(50)]).std())


def before(name: str, stage: int, folder: Path) -> Tensor:
    """Train, save and convert; the losses of the run that goes on."""
    engine = start(name, stage)
    train(engine, 0, BEFORE)
    engine.save_checkpoint(str(folder / "run"), tag="s")
    unbroken = train(engine, BEFORE, BEFORE + AFTER)
    engine.destroy()
    if torch.distributed.get_rank() == 0:
        convert(
            folder / "run" / "s",
            folder / "run" / "s_universal",
            workers=1,
            second_moment="as-saved" if name == "adamw" else "dense",
        )
    torch.distributed.barrier()
    return unbroken


def require_no_jump(switched: Tensor, unbroken: Tensor) -> None:
    """Batch by batch the two losses differ by less than batches do."""
    excess = switched - unbroken
    bound = noise()
    assert float(excess[:10].mean()) < bound / 2, f"{excess[:10]}, noise {bound}"
    assert float(excess.max()) < bound, f"{excess.max()}, noise {bound}"
    assert float(excess.mean()) < bound / 2, f"{excess.mean()}, noise {bound}"


def to_adapprox(stage: int, new_stage: int, folder: Path) -> None:
    unbroken = before("adamw", stage, folder)
    engine = start("adapprox", new_stage)
    load_universal(engine, folder / "run")
    moments = [s["exp_avg_sq"] for s in adapprox_of(engine).state.values()]
    assert all(isinstance(m, LowRankMoment) for m in moments)
    group = adapprox_of(engine).param_groups[0]
    assert tuple(group["betas"]) == SETTINGS["betas"]
    require_no_jump(train(engine, BEFORE, BEFORE + AFTER), unbroken)
    engine.destroy()
    with patch.object(Adam, "to_updates", lambda _, first, __: first):
        engine = start("adapprox", new_stage)
        load_universal(engine, folder / "run")
    with pytest.raises(AssertionError, match="noise"):
        require_no_jump(train(engine, BEFORE, BEFORE + AFTER), unbroken)
    engine.destroy()


def to_adamw(stage: int, folder: Path) -> None:
    unbroken = before("adapprox", stage, folder)
    engine = start("adamw", stage, checkpoint={"load_universal": True})
    path, _ = engine.load_checkpoint(str(folder / "run"))
    assert path is not None
    require_no_jump(train(engine, BEFORE, BEFORE + AFTER), unbroken)
    engine.destroy()
    # With the first moment as it is, AdamW does jump: the measure sees what it should.
    if torch.distributed.get_rank() == 0:
        for p in (folder / "run" / "s_universal" / "zero").glob("*/exp_avg.pt"):
            second = torch.load(p.with_name("exp_avg_sq.pt"))["param"]
            content = torch.load(p)
            content["param"] = content["param"] / (second.sqrt() + 1e-8)
            torch.save(content, p)
    torch.distributed.barrier()
    engine = start("adamw", stage, checkpoint={"load_universal": True})
    engine.load_checkpoint(str(folder / "run"))
    with pytest.raises(AssertionError, match="noise"):
        require_no_jump(train(engine, BEFORE, BEFORE + AFTER), unbroken)
    engine.destroy()


CASES: dict[str, Callable[[Path], None]] = {
    "adamw_z1_to_adapprox_z1": partial(to_adapprox, 1, 1),
    "adamw_z1_to_adapprox_z3": partial(to_adapprox, 1, 3),
    "adamw_z3_to_adapprox_z2": partial(to_adapprox, 3, 2),
    "adapprox_z2_to_adamw": partial(to_adamw, 2),
    "adapprox_z3_to_adamw": partial(to_adamw, 3),
}
