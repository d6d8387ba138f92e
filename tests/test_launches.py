# SPDX-License-Identifier: Apache-2.0
"""How many operations a step gives to a device, beside the pass over the elements."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adapprox_ds import Adapprox
from adapprox_ds.adapprox import kernels, step
from adapprox_ds.adapprox.factors import PendingErrors
from adapprox_ds.adapprox.kernels.interface import Passed, Reduced, Runs, Stack, StepScalars
from adapprox_ds.report.model_shapes import load_shapes

#: Of one wave: sketches and balance of each of 5 stacks, their products, and one solution for all.
MOST = 750


class Launches(TorchDispatchMode):
    """Counts operations that a device would launch: not views, allocations, or work of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket)
        touched = [x for x in tree_leaves((made, args)) if isinstance(x, torch.Tensor)]
        there = any(x.is_meta for x in touched)
        self.found[name] += there and not (func.is_view or "empty" in name or "view" in name)
        return made


def passes(stacks: list[Stack], runs: Runs | None, s: StepScalars, write: bool) -> Passed:
    """Results of a pass of the right sizes, on the device that holds nothing."""
    made = []
    for x in stacks:
        new, wide = x.q.new_empty, {"dtype": torch.float64}
        width, tests = (0 if of is None else of.shape[2] for of in (x.x, x.z))
        blocks = len(x.g)
        y, p = new(blocks, x.rows, width), new(blocks, tests, x.cols)
        made.append(Reduced(y, p, new(blocks, x.rows, **wide), new(blocks, **wide)))
    count = 0 if runs is None else len(runs.g)
    return Passed(made, torch.empty(count, dtype=torch.float64, device="meta"))


def launches(layers: int, **knobs: Any) -> Counter[str]:
    """Of the third step of a GPT-2 345M of that many layers."""
    shapes = {
        name: shape
        for name, shape in load_shapes("gpt2-345m").items()
        if not name.startswith("transformer.h.") or int(name.split(".")[2]) < layers
    }
    params = {n: torch.nn.Parameter(torch.empty(s, device="meta")) for n, s in shapes.items()}
    optimizer = Adapprox(list(params.items()), nonfinite="propagate", **knobs)
    for t in range(3):
        for p in params.values():
            p.grad = torch.empty_like(p)
        with Launches() as counted:
            optimizer.step()
        assert all(int(state["step"]) == t + 1 for state in optimizer.state.values())
    return counted.found


def test_launches_of_gpt2_345m(monkeypatch: pytest.MonkeyPatch) -> None:
    """They depend on how many shapes there are, and not on how many layers."""
    pytest.importorskip("transformers")
    # On the device "meta" nothing is computed; what goes to the host and from it is left out.
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(PendingErrors, "start", lambda *_: None)
    monkeypatch.setattr(kernels, "run", passes)
    monkeypatch.setattr(step, "_WAVE_BYTES", 1 << 40)  # a wave, whatever the model
    found = {layers: launches(layers) for layers in (6, 12, 24)}
    assert found[6] == found[12] == found[24]
    assert found[24].total() <= MOST
