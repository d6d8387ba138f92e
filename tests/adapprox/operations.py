# SPDX-License-Identifier: Apache-2.0
"""Counts torch's operations and the bytes that they allocate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._ops import OpOverload
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Counts the operations that are dispatched within it.

    Args:
        which: says of an operation whether it counts.
    """

    def __init__(self, which: Callable[[OpOverload], bool]) -> None:
        super().__init__()
        self.which, self.count = which, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += self.which(func)
        return func(*args, **(kwargs or {}))


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most that a call holds on the CPU at a time, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
