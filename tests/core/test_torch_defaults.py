# SPDX-License-Identifier: Apache-2.0
"""A program's default dtype and device: the optimizers' tensors have their own."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from adapprox_ds import Adapprox, MicroAdam

SHAPES = ((24, 16), (8, 6, 3, 3), (11,), (), (1, 40))
SMALL = {"block_size": 64, "quant_block_size": 16, "density": 0.1, "window": 3}
MADE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "default": lambda ps: Adapprox(ps, rank_max=4),
    "compact": lambda ps: Adapprox(
        ps, rank_max=4, first_moment="int8", factor_dtype="bf16", guidance="cosine"
    ),
    "clipped": lambda ps: Adapprox(ps, rank_max=4, clip_threshold=0.5),
    "paper": lambda ps: Adapprox(ps, preset="paper", rank_max=4),
    "micro": lambda ps: MicroAdam(ps, **SMALL),
    "micro_full": lambda ps: MicroAdam(ps, quant_bits=32),
}
DEFAULTS = ["bf16", "fp64", "meta"]


@contextmanager
def default(kind: str) -> Iterator[None]:
    """Another default dtype, or the device "meta", on which nothing has a value."""
    before = torch.get_default_dtype()
    try:
        if kind == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype({"bf16": torch.bfloat16, "fp64": torch.float64}[kind])
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


def trained(method: str, kind: str | None, backend: str) -> list[Tensor]:
    """Weights and state after four steps, with a save and a load between; of a default, or none."""
    random = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=random) for shape in SHAPES]
    grads = [[torch.randn(s, generator=random) for s in SHAPES] for _ in range(4)]
    params = [torch.nn.Parameter(x) for x in values]

    def run() -> torch.optim.Optimizer:
        optimizer = MADE[method](params)
        for t, step in enumerate(grads):
            for p, g in zip(params, step, strict=True):
                p.grad = g
            optimizer.step()
            if t == 1:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                optimizer = MADE[method](params)
                optimizer.load_state_dict(torch.load(file, map_location="cpu"))
        optimizer.metrics()
        return optimizer

    if kind is None:
        optimizer = run()
    else:
        with default(kind):
            optimizer = run()
    held = [x for p in params for _, x in sorted(optimizer.state[p].items())]
    assert {x.device.type for x in held} == {"cpu"}
    steps = {(int(state["step"]), state["step"].dtype) for state in optimizer.state.values()}
    assert steps == {(4, torch.float32)}
    return [*(p.detach() for p in params), *(x + 0.0 for x in held)]


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("method", MADE)
def test_defaults_change_nothing(
    method: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits whatever the defaults."""
    monkeypatch.setenv("ADAPPROX_KERNELS", backend)
    expected = trained(method, None, backend)
    for kind in DEFAULTS:
        assert all(map(torch.equal, expected, trained(method, kind, backend))), kind


@pytest.mark.parametrize("cls", [Adapprox, MicroAdam])
def test_steps_are_counted_beyond_256(cls: type[Any]) -> None:
    """Which bf16 cannot."""
    p = torch.nn.Parameter(torch.ones(3))
    with default("bf16"):
        optimizer = cls([p])
        p.grad = torch.ones(3, dtype=torch.float32)
        for _ in range(260):
            optimizer.step()
    assert int(optimizer.state[p]["step"]) == 260
