# SPDX-License-Identifier: Apache-2.0
"""The window: the largest entries of each block's accumulators in the last steps.

It is a ring buffer of one row for each of the last W steps: row r has the entries of the latest
step t with (t - 1) mod W = r. The moments are computed from the rows whenever they are needed
(AdamStats of the paper, here without bias correction), where V is a row and its age the number of
steps since it was written::

    m = (1 - beta_1) sum over rows of beta_1^age V
    v = (1 - beta_2) sum over rows of beta_2^age V^2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.core import saved
from adapprox_ds.core.compact import TensorStore
from adapprox_ds.micro_adam.grid import (
    Grid,
    Span,
    chunks,
    first_places,
    require_spans,
    saved_grid,
    slots_of,
)

#: The version of the serialised form. It is raised when fields change meaning.
FORMAT_VERSION = 1

#: The name of the state in error messages; both moments have the window as their store.
_OWNER = "WindowMean or WindowSquare"


def row_ages(step: int, window: int) -> list[int]:
    """The ages of the rows of the ring: how many steps before ``step`` each was written.

    Args:
        step: the number of steps done.
        window: the number of rows.
    """
    return [(step - 1 - row) % window for row in range(window)]


@dataclass(slots=True)
class WindowStore(TensorStore):
    """The window of one flat tensor.

    Attributes:
        numel: the length of the flat tensor. Elements in no span are padding, and read as 0.
        grid: the size of blocks.
        spans: the spans, in the order of their offsets.
        slots: for each span the number of entries that a step writes for each of its blocks.
        indices: the entries' indices in their blocks, (window, entries) int16, in the order of
            spans, their blocks, and the blocks' slots.
        values: the entries' values, of the same shape, bf16; 0 for entries that were never written.
        betas: the decay rates of the first and of the second moment.
        step: the number of steps done.
    """

    kept = ("indices", "values")

    numel: int
    grid: Grid
    spans: tuple[Span, ...]
    slots: tuple[int, ...]
    indices: Tensor
    values: Tensor
    betas: tuple[float, float]
    step: int = 0
    _first: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        require_spans(self.spans, self.numel, _OWNER)
        sizes = (s.rows * k for s, k in zip(self.spans, self.slots, strict=True))
        self._first, total = first_places(sizes)
        rows = max(1, saved.matrix_shape(self.indices, f"{_OWNER}: indices")[0])
        shape = (rows, total)
        self.indices = saved.tensor(self.indices, f"{_OWNER}: indices", shape, [torch.int16])
        self.values = saved.tensor(self.values, f"{_OWNER}: values", shape, [torch.bfloat16])

    @classmethod
    def zeros(
        cls,
        numel: int,
        grid: Grid,
        spans: Sequence[Span],
        *,
        window: int,
        density: float,
        betas: tuple[float, float],
        device: torch.device | str = "cpu",
    ) -> WindowStore:
        """An empty window.

        Args:
            numel: the length of the flat tensor.
            grid: the size of blocks.
            spans: the spans, in the order of their offsets.
            window: the number of rows of the ring.
            density: the part of a block's elements that a step moves to the window.
            betas: the decay rates of the moments.
            device: the device of its tensors.
        """
        slots = tuple(slots_of(span, density) for span in spans)
        entries = sum(span.rows * k for span, k in zip(spans, slots, strict=True))
        indices = torch.zeros(window, entries, dtype=torch.int16, device=device)
        values = torch.zeros(window, entries, dtype=torch.bfloat16, device=device)
        store = cls(numel, grid, tuple(spans), slots, indices, values, betas)
        for i, span in enumerate(spans):
            # Every index must lie in its part, also that of an entry that was never written.
            store.entries(i)[0].fill_(span.start % grid.block)
        return store

    @property
    def window(self) -> int:
        """The number of rows of the ring."""
        return self.indices.shape[0]

    def entries_between(self, begin: int, end: int) -> int:
        """The number of entries that a step writes for the spans with offsets in [begin, end)."""
        inside = zip(self.spans, self.slots, strict=True)
        return sum(s.rows * k for s, k in inside if begin <= s.offset < end)

    def bytes_between(self, begin: int, end: int) -> int:
        """The bytes of the entries of the spans with offsets in [begin, end)."""
        per_entry = self.indices.element_size() + self.values.element_size()
        return per_entry * self.window * self.entries_between(begin, end)

    def entries(self, i: int) -> tuple[Tensor, Tensor]:
        """The indices and the values of span ``i`` as views, (window, blocks, slots)."""
        rows, k = self.spans[i].rows, self.slots[i]
        here = slice(self._first[i], self._first[i] + rows * k)
        shape = (self.window, rows, k)
        return self.indices[:, here].view(shape), self.values[:, here].view(shape)

    def read(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Elements [begin, end) of the first moment, as a new dense 1-D tensor."""
        return self.read_moment(begin, end, dtype, 1)

    def read_moment(self, begin: int, end: int, dtype: torch.dtype, power: int) -> Tensor:
        """Elements [begin, end) of a moment, as a new dense 1-D tensor.

        Args:
            begin: the index in the flat tensor of the first element.
            end: one past the index of the last.
            dtype: the dtype of the result.
            power: 1 for the first moment, 2 for the second.
        """
        out = torch.zeros(end - begin, dtype=dtype, device=self.device)
        wide = torch.promote_types(dtype, torch.float32)
        beta = self.betas[power - 1]
        weights = [(1.0 - beta) * beta**age for age in row_ages(self.step, self.window)]
        for i, span in enumerate(self.spans):
            indices, values = self.entries(i)
            for a, b, at in chunks(span, begin, end):
                cells = torch.zeros(b - a, span.cols, dtype=wide, device=self.device)
                lead = span.start % self.grid.block
                add_rows(cells, indices[:, a:b], values[:, a:b], lead, weights, power)
                x, y = max(begin, at), min(end, at + cells.numel())
                out[x - begin : y - begin].copy_(cells.view(-1)[x - at : y - at])
        return out

    def to_payload(self) -> dict[str, Any]:
        """The store as plain containers and tensors, loadable with ``weights_only=True``."""
        return {
            "version": FORMAT_VERSION,
            "numel": self.numel,
            "grid": (self.grid.block, self.grid.group),
            "spans": [(s.offset, s.start, s.rows, s.cols) for s in self.spans],
            "slots": list(self.slots),
            "indices": self.indices,
            "values": self.values,
            "betas": tuple(float(beta) for beta in self.betas),
            "step": self.step,
        }

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> WindowStore:
        """The inverse of :meth:`to_payload`.

        Raises:
            ValueError: the payload has another format version, its parts do not fit together, or
                entries lie outside their blocks.
        """
        names = ("numel", "grid", "spans", "slots", "indices", "values", "betas", "step")
        held = saved.fields(payload, _OWNER, FORMAT_VERSION, names)
        grid, spans = saved_grid(held, _OWNER)
        slots = saved.integers(held["slots"], f"{_OWNER}: slots", len(spans), 1)
        for span, k in zip(spans, slots, strict=True):
            saved.integer(k, f"{_OWNER}: slots of blocks of {span.cols}", 1, span.cols)
        betas = saved.items(held["betas"], f"{_OWNER}: betas", 2)
        first, second = (saved.number(beta, f"{_OWNER}: betas", 0.0, 1.0) for beta in betas)
        step = saved.integer(held["step"], f"{_OWNER}: step")
        store = cls(
            saved.integer(held["numel"], f"{_OWNER}: numel"),
            grid,
            spans,
            slots,
            held["indices"],
            held["values"],
            (first, second),
            step,
        )
        store._require_places()
        return store

    def _require_places(self) -> None:
        """Raise unless all indices lie in their blocks, as a step uses them without a check."""
        if self.indices.is_meta:
            return
        for i, span in enumerate(self.spans):
            lead, (indices, _) = span.start % self.grid.block, self.entries(i)
            least, largest = (int(x) for x in indices.aminmax())
            if least < lead or largest >= lead + span.cols:
                raise ValueError(
                    f"{_OWNER} has entries at places {least} to {largest} of a block, where "
                    f"elements {lead} to {lead + span.cols - 1} are: the checkpoint is damaged"
                )


def add_rows(
    out: Tensor,
    indices: Tensor,
    values: Tensor,
    base: int | Tensor,
    weights: Sequence[float],
    power: int,
) -> None:
    """Add the weighted rows of a ring to dense blocks.

    The rows are added one after the other. Within a row no index occurs twice with a value other
    than 0, so sums are made in the same order on any device.

    Args:
        out: the dense blocks, (blocks, width); added to.
        indices: the entries' indices in their blocks, (window, blocks, slots).
        values: the entries' values, of the same shape.
        base: the index in its block of the first column of ``out``; a number, or (blocks, 1).
        weights: the weight of each row of the ring.
        power: the power of the values that is added, 1 or 2.
    """
    for places, entries, weight in zip(indices, values, weights, strict=True):
        x = entries.to(out.dtype)
        out.scatter_add_(1, places.to(torch.int64) - base, (x * x if power == 2 else x) * weight)
