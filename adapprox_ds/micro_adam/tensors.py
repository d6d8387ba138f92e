# SPDX-License-Identifier: Apache-2.0
"""MicroAdam's state as tensors: what they physically are, and what they read as."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.core.compact import CompactTensor
from adapprox_ds.micro_adam.feedback import ErrorStore
from adapprox_ds.micro_adam.window import WindowStore

#: What a write to either moment is refused with.
_NO_WRITES = (
    "{} would write into a window of sparse gradients, of which MicroAdam's exp_avg and exp_avg_sq "
    "are made: they cannot be set. Leave them out of the call; or train with Adapprox or AdamW, "
    "whose moments can be; or begin anew, with a new engine"
)


class WindowMean(CompactTensor):
    """The window; reads as the first moment, without bias correction."""

    store: WindowStore
    store_class = WindowStore
    no_writes = _NO_WRITES

    def describe(self) -> str:
        """The rows of the ring and the entries of each."""
        return f"window={self.store.window}, entries={self.store.values.shape[1]}"


@dataclass(slots=True)
class SquareStore:
    """A window read as the second moment; holds nothing of its own.

    Attributes:
        window: the first moment's own store.
    """

    window: WindowStore

    @property
    def numel(self) -> int:
        """Length of the flat tensor."""
        return self.window.numel

    @property
    def device(self) -> torch.device:
        """Where the window lives."""
        return self.window.device

    @property
    def allocated_bytes(self) -> int:
        """0: the window is counted where the first moment is."""
        return 0

    def read(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Elements [begin, end) of the second moment, without bias correction; a new tensor."""
        return self.window.read_moment(begin, end, dtype, 2)

    def map(self, change: Callable[[Tensor], Tensor]) -> SquareStore:
        """Of a changed window, which a step replaces by the first moment's."""
        return SquareStore(self.window.map(change))

    def to_payload(self) -> dict[str, Any]:
        """That of the window; its tensors' memory is saved once with the first moment's."""
        return self.window.to_payload()

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> SquareStore:
        """The inverse of :meth:`to_payload`."""
        return cls(WindowStore.from_payload(payload))


class WindowSquare(CompactTensor):
    """The second moment that the first moment's window stands for, without bias correction."""

    store: SquareStore
    store_class = SquareStore
    no_writes = _NO_WRITES

    @classmethod
    def of(cls, mean: WindowMean) -> WindowSquare:
        """The one that shares a first moment's window."""
        return cls(SquareStore(mean.store), mean.shape, mean.dtype)


class FeedbackError(CompactTensor):
    """The error feedback; reads as the dense error."""

    store: ErrorStore
    store_class = ErrorStore
    no_writes = (
        "{} would write into a quantised error feedback, which steps alone may change: leave it "
        "out of the call"
    )

    def describe(self) -> str:
        """Bits an element."""
        return f"bits={self.store.bits}"
