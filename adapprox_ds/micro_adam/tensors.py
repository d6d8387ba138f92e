# SPDX-License-Identifier: Apache-2.0
"""The tensors of MicroAdam's state, which look dense to DeepSpeed but are compact.

The two moments share one window of sparse gradients, from which both are computed. The error
feedback is in codes. See :mod:`adapprox_ds.core.compact`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.core.compact import CompactTensor
from adapprox_ds.micro_adam.feedback import ErrorStore
from adapprox_ds.micro_adam.window import WindowStore

#: The message for a refused write to either moment.
_NO_WRITES = (
    "{} would write into a window of sparse gradients, of which MicroAdam's exp_avg and exp_avg_sq "
    "are made: they cannot be set. Leave them out of the call; or train with Adapprox or AdamW, "
    "whose moments can be; or begin anew, with a new engine"
)


class WindowMean(CompactTensor):
    """The first moment, without bias correction; its store is the window."""

    store: WindowStore
    store_class = WindowStore
    no_writes = _NO_WRITES

    def describe(self) -> str:
        """The number of rows of the ring, and that of the entries of each."""
        return f"window={self.store.window}, entries={self.store.values.shape[1]}"


@dataclass(slots=True)
class SquareStore:
    """The store of the second moment, which is that of the first moment.

    Attributes:
        window: the store of the first moment.
    """

    window: WindowStore

    @property
    def numel(self) -> int:
        """The length of the flat tensor."""
        return self.window.numel

    @property
    def device(self) -> torch.device:
        """The device of the window's tensors."""
        return self.window.device

    @property
    def allocated_bytes(self) -> int:
        """0, as the window is counted with the first moment."""
        return 0

    def read(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Elements [begin, end) of the second moment, without bias correction; a new tensor."""
        return self.window.read_moment(begin, end, dtype, 2)

    def map(self, change: Callable[[Tensor], Tensor]) -> SquareStore:
        """A store with a new window; ``tie`` (state.py) later lets the moments share one again."""
        return SquareStore(self.window.map(change))

    def to_payload(self) -> dict[str, Any]:
        """The payload of the window; ``torch.save`` writes the shared tensors only once."""
        return self.window.to_payload()

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> SquareStore:
        """The inverse of :meth:`to_payload`."""
        return cls(WindowStore.from_payload(payload))


class WindowSquare(CompactTensor):
    """The second moment, without bias correction; its store shares the first moment's window."""

    store: SquareStore
    store_class = SquareStore
    no_writes = _NO_WRITES

    @classmethod
    def of(cls, mean: WindowMean) -> WindowSquare:
        """The second moment that shares the window of ``mean``."""
        return cls(SquareStore(mean.store), mean.shape, mean.dtype)


class FeedbackError(CompactTensor):
    """The error feedback; its elements are the dense error."""

    store: ErrorStore
    store_class = ErrorStore
    no_writes = (
        "{} would write into a quantised error feedback, which steps alone may change: leave it "
        "out of the call"
    )

    def describe(self) -> str:
        """The bits of each element."""
        return f"bits={self.store.bits}"
