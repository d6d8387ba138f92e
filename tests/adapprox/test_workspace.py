# SPDX-License-Identifier: Apache-2.0
"""What a default step needs beside the state: little memory, and no look at values on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adapprox_ds import Adapprox, MicroAdam
from tests.adapprox.operations import Operations, peak_bytes

WORKSPACE_BYTES = 64 * 2**20


@pytest.mark.parametrize("cls", [Adapprox, MicroAdam])
def test_transient_memory_of_the_largest_matrix(cls: type[Any]) -> None:
    """GPT-2's embedding, 50257 x 768, of 147 MB: V and X, or accumulators, are never whole."""
    p = torch.nn.Parameter(torch.randn(50257, 768) * 0.02)
    p.grad = torch.randn_like(p) * 1e-3
    optimizer = cls([p])
    optimizer.step()
    peak = peak_bytes(optimizer.step)
    assert 0 < peak <= WORKSPACE_BYTES, f"{peak / 2**20:.1f} MB"


@pytest.mark.parametrize(
    ("cls", "knobs", "reads"), [(Adapprox, {"rank_max": 4}, 4), (MicroAdam, {}, 4)]
)
def test_a_step_reads_nothing_but_its_count(
    cls: type[Any], knobs: dict[str, Any], reads: int
) -> None:
    """One read a tensor: the step count, which lives on the host; ranks come a step late.

    And one more for all: whether gradients are finite (core/nonfinite.py).
    """
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((40, 30), (30, 20), (20,))]
    optimizer = cls(params, **knobs)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        with Operations(lambda func: func is torch.ops.aten._local_scalar_dense.default) as counted:
            optimizer.step()
    assert counted.count == reads


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("choice", ["torch", "triton", "MicroAdam"])
def test_a_step_never_waits_for_the_device(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After warm-up; what sets the ranks is last step's, and its copy has ended long since.

    But for the check of gradients, whose event is waited for: with Adapprox's first pass under way,
    before MicroAdam's.
    """
    if choice != "MicroAdam":
        monkeypatch.setenv("ADAPPROX_KERNELS", choice)
    shapes = ((512, 384), (384, 512), (512, 384), (384,), (3, 5))
    params = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in shapes]
    optimizer: Any = MicroAdam(params) if choice == "MicroAdam" else Adapprox(params, rank_max=4)
    for step in range(5):
        for p in params:
            p.grad = torch.randn_like(p)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(p.isfinite().all() for p in params)
