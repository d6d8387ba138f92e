# SPDX-License-Identifier: Apache-2.0
"""torch.distributed.checkpoint saves and loads both optimizers' compact state, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint

from adapprox_ds import Adapprox, MicroAdam

KINDS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "fp32": (Adapprox, {}),
    "int8": (Adapprox, {"first_moment": "int8"}),
    "int4, bf16 factors": (Adapprox, {"first_moment": "int4", "factor_dtype": "bf16"}),
    "paper": (Adapprox, {"preset": "paper"}),
    "MicroAdam": (MicroAdam, {}),
}


def start(kind: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 48)
    cls, settings = KINDS[kind]
    return model, cls(model.named_parameters(), lr=1e-2, **settings)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, *batches: int) -> None:
    for batch in batches:
        inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(batch))
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on(kind: str, tmp_path: Path) -> None:
    """What is loaded replaces another state in place; dense values would be factored anew."""
    model, optimizer = start(kind)
    train(model, optimizer, 0, 1, 2)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoint.save(saved, checkpoint_id=tmp_path)
    train(model, optimizer, 3, 4)

    resumed, other = start(kind)
    train(resumed, other, 7)
    read = {"model": resumed.state_dict(), "optimizer": other.state_dict()}
    checkpoint.load(read, checkpoint_id=tmp_path)
    resumed.load_state_dict(read["model"])
    other.load_state_dict(read["optimizer"])
    train(resumed, other, 3, 4)
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
