# SPDX-License-Identifier: Apache-2.0
"""How many launches a step gives to a GPU: Triton's kernels, and torch's operations beside them.

``python -m tests.adapprox.test_launches`` prints how long the host takes for a step of GPT-2 345M,
without the launches themselves.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adapprox_ds import Adapprox
from adapprox_ds.adapprox.factors import PendingErrors
from adapprox_ds.core import nonfinite
from adapprox_ds.core.kernels import backends
from adapprox_ds.report.model_shapes import load_shapes

#: What a step of one process may have; and what it has without the check of gradients.
MOST, TOTAL = 60, {"gpt2-345m": 48, "llama-3-8b": 54}


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


class Kernel:
    """In place of one of Triton's kernels: is counted, and does nothing."""

    def __init__(self, name: str, found: Counter[str]) -> None:
        self.name, self.found = name, found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert grid[0] > 0
        return lambda *given, **constants: self.found.update([self.name])


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often Triton's kernels are launched."""
    pytest.importorskip("triton")
    return counted_kernels(monkeypatch)


def counted_kernels(patch: pytest.MonkeyPatch) -> Counter[str]:
    """Count Triton's launches on the device "meta", where nothing is computed.

    What goes to the host and from it is left out.
    """
    from adapprox_ds.adapprox.kernels import triton_pass, triton_small_kernels, triton_tables

    found: Counter[str] = Counter()
    for module in (triton_pass, triton_small_kernels, triton_tables):
        for name in [x for x in vars(module) if x.endswith("_kernel")]:
            patch.setattr(module, name, Kernel(name, found))
    patch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    patch.setattr(PendingErrors, "start", lambda *_: None)
    patch.setattr(backends, "missing", lambda *_: None)
    patch.setenv(backends.VARIABLE, "triton")
    return found


def launches(
    model: str, layers: int, prefix: str, kernels: Counter[str], **knobs: Any
) -> Counter[str]:
    """Of the third step of a model of that many layers."""
    shapes = {
        name: shape
        for name, shape in load_shapes(model).items()
        if not name.startswith(prefix) or int(name.removeprefix(prefix).split(".")[0]) < layers
    }
    params = {n: torch.nn.Parameter(torch.empty(s, device="meta")) for n, s in shapes.items()}
    optimizer = Adapprox(list(params.items()), **knobs)
    for t in range(3):
        for p in params.values():
            p.grad = torch.empty_like(p)
        kernels.clear()
        with Launches() as counted:
            optimizer.step()
        assert all(int(state["step"]) == t + 1 for state in optimizer.state.values())
    return +counted.found + kernels


@pytest.mark.parametrize(
    ("model", "prefix", "layers", "most"),
    [("gpt2-345m", "transformer.h.", 24, 48), ("llama-3-8b", "model.layers.", 32, 54)],
)
def test_launches(model: str, prefix: str, layers: int, most: int, kernels: Counter[str]) -> None:
    """They depend on how many shapes there are, and not on how many layers.

    More layers need more room for the pass's projections, whose launches are bounded.
    """
    few, all_layers = (
        launches(model, n, prefix, kernels, nonfinite="propagate") for n in (2, layers)
    )
    assert all_layers.total() == TOTAL[model], all_layers
    of_pass = ("pass_kernel", "sum_kernel")
    for found in (few, all_layers):
        for name in of_pass:
            del found[name]
    assert few == all_layers


@pytest.mark.parametrize("model", ["gpt2-345m", "llama-3-8b"])
def test_launches_of_the_check(model: str) -> None:
    """With the norm of all gradients, and their copy to the host, a step has at most ``MOST``."""
    checked = [
        SimpleNamespace(g=torch.empty(shape, device="meta"))
        for shape in load_shapes(model).values()
    ]
    with Launches() as counted:
        nonfinite._largest(checked)
    assert counted.found.total() + 1 + TOTAL[model] <= MOST


def main() -> None:
    shapes = load_shapes("gpt2-345m")
    params = {n: torch.nn.Parameter(torch.empty(s, device="meta")) for n, s in shapes.items()}
    for p in params.values():
        p.grad = torch.empty_like(p)
    optimizer, times = Adapprox(list(params.items()), nonfinite="propagate"), []
    with pytest.MonkeyPatch.context() as patch:
        counted_kernels(patch)
        for _ in range(25):
            begin = time.process_time()
            optimizer.step()
            times.append(1e3 * (time.process_time() - begin))
    low, *_, high = kept = sorted(times[5:])
    print(f"{len(params)} parameters: {median(kept):.1f} ms of the host ({low:.1f} to {high:.1f})")


if __name__ == "__main__":
    main()
