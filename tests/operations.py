# SPDX-License-Identifier: Apache-2.0
"""Counts torch's operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._ops import OpOverload
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
