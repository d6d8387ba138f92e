# SPDX-License-Identifier: Apache-2.0
"""The error feedback: the part of the accumulators that did not go to the window.

It is kept until the next step, which adds it to the gradient; in 4-bit codes, or in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.core import saved
from adapprox_ds.core.compact import TensorStore
from adapprox_ds.micro_adam.grid import Grid, Span, chunks, first_places, require_spans, saved_grid
from adapprox_ds.micro_adam.quantize import dequantize, quantize

#: The version of the serialised form. It is raised when fields or codes change meaning.
FORMAT_VERSION = 2

#: The allowed bits of an element: 4 for codes, 32 for the values themselves.
BITS = (4, 32)

#: The allowed dtypes of ``codes`` for each of ``BITS``.
_DTYPES = {4: [torch.uint8], 32: [torch.float32, torch.float64]}

#: The name of the state in error messages.
_OWNER = "FeedbackError"


@dataclass(frozen=True, slots=True)
class ErrorRows:
    """The error of one span, as views of the store's tensors.

    Attributes:
        codes: the packed codes of each block, (blocks, bytes) uint8; with 32 bits the values,
            (blocks, cols).
        low, high: the minimum and the maximum of each group, (blocks, groups) fp32; with 32 bits
            there are no groups.
    """

    codes: Tensor
    low: Tensor
    high: Tensor

    def __getitem__(self, rows: slice) -> ErrorRows:
        """The error of some of the blocks, as views."""
        return ErrorRows(self.codes[rows], self.low[rows], self.high[rows])


@dataclass(slots=True)
class ErrorStore(TensorStore):
    """The error of one flat tensor.

    Attributes:
        numel: the length of the flat tensor. Elements in no span are padding, and read as 0.
        grid: the sizes of blocks and groups.
        spans: the spans, in the order of their offsets.
        bits: one of ``BITS``.
        codes: the codes of all spans, end to end, 1-D. With 4 bits they are uint8, and those of
            each block begin with a new byte; with 32 bits they are the values themselves.
        low, high: the minimum and the maximum of each group, 1-D, fp32.
    """

    kept = ("codes", "low", "high")

    numel: int
    grid: Grid
    spans: tuple[Span, ...]
    bits: int
    codes: Tensor
    low: Tensor
    high: Tensor
    _first_code: tuple[int, ...] = field(init=False, repr=False)
    _first_group: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        require_spans(self.spans, self.numel, _OWNER)
        shapes = [_shapes(span, self.grid, self.bits) for span in self.spans]
        pairs = zip(self.spans, shapes, strict=True)
        self._first_code, codes = first_places(s.rows * n for s, (n, _) in pairs)
        pairs = zip(self.spans, shapes, strict=True)
        self._first_group, groups = first_places(s.rows * n for s, (_, n) in pairs)
        dtypes = _DTYPES[self.bits]
        self.codes = saved.tensor(self.codes, f"{_OWNER}: codes", (codes,), dtypes)
        self.low = saved.tensor(self.low, f"{_OWNER}: low", (groups,), [torch.float32])
        self.high = saved.tensor(self.high, f"{_OWNER}: high", (groups,), [torch.float32])

    @classmethod
    def zeros(
        cls,
        numel: int,
        grid: Grid,
        spans: Sequence[Span],
        bits: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> ErrorStore:
        """An error of 0.

        Args:
            numel: the length of the flat tensor.
            grid: the sizes of blocks and groups.
            spans: the spans, in the order of their offsets.
            bits: one of ``BITS``.
            dtype: the dtype of the values, with 32 bits.
            device: the device of its tensors.
        """
        shapes = [(span.rows, *_shapes(span, grid, bits)) for span in spans]
        codes, groups = (sum(s[0] * s[i] for s in shapes) for i in (1, 2))
        kind = torch.uint8 if bits == 4 else dtype
        held = torch.zeros(codes, dtype=kind, device=device)
        low, high = (torch.zeros(groups, dtype=torch.float32, device=device) for _ in range(2))
        return cls(numel, grid, tuple(spans), bits, held, low, high)

    def bytes_between(self, begin: int, end: int) -> int:
        """The bytes of the spans whose offsets are in [begin, end)."""
        inside = [s for s in self.spans if begin <= s.offset < end]
        shapes = [(s.rows, *_shapes(s, self.grid, self.bits)) for s in inside]
        return sum(n * (c * self.codes.element_size() + 8 * g) for n, c, g in shapes)

    def rows(self, i: int) -> ErrorRows:
        """The error of span ``i``, as views."""
        span, (c, g) = self.spans[i], _shapes(self.spans[i], self.grid, self.bits)
        codes = slice(self._first_code[i], self._first_code[i] + span.rows * c)
        groups = slice(self._first_group[i], self._first_group[i] + span.rows * g)
        low, high = (t[groups].view(span.rows, g) for t in (self.low, self.high))
        return ErrorRows(self.codes[codes].view(span.rows, c), low, high)

    def read(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Elements [begin, end) of the flat tensor, as a new dense 1-D tensor."""
        out = torch.zeros(end - begin, dtype=dtype, device=self.device)
        for i, span in enumerate(self.spans):
            for a, b, at in chunks(span, begin, end):
                cells = self._load(i, slice(a, b), dtype).reshape(-1)
                x, y = max(begin, at), min(end, at + cells.numel())
                out[x - begin : y - begin].copy_(cells[x - at : y - at])
        return out

    def write_span(self, i: int, values: Tensor) -> None:
        """Replace the error of span ``i`` by ``values``, (numel of the span,)."""
        span = self.spans[i]
        for a, b, at in chunks(span, span.offset, span.end):
            first = at - span.offset
            cells = values[first : first + (b - a) * span.cols].view(b - a, span.cols)
            self._keep(i, slice(a, b), cells.to(self.device))

    def _load(self, i: int, rows: slice, dtype: torch.dtype) -> Tensor:
        """The values of some blocks of span ``i``, (blocks, cols)."""
        held, span = self.rows(i)[rows], self.spans[i]
        if self.bits == 32:
            return held.codes.to(dtype)
        place = span.place(self.grid)
        codes = held.codes.new_zeros(len(held.codes), place.width // 2)
        codes[:, slice(*place.code_bytes(span.cols))] = held.codes
        wide = torch.promote_types(dtype, torch.float32)
        cells = dequantize(codes, held.low, held.high, self.grid.group, wide)
        return cells[:, place.left : place.left + span.cols].to(dtype)

    def _keep(self, i: int, rows: slice, cells: Tensor) -> None:
        """Replace the error of some blocks of span ``i`` by ``cells``, (blocks, cols)."""
        held, span = self.rows(i)[rows], self.spans[i]
        if self.bits == 32:
            held.codes.copy_(cells)
            return
        place = span.place(self.grid)
        inside = slice(place.left, place.left + span.cols)
        wide = torch.promote_types(cells.dtype, torch.float32)
        frame = torch.zeros(len(cells), place.width, dtype=wide, device=cells.device)
        frame[:, inside] = cells
        outside = torch.ones_like(frame, dtype=torch.bool)
        outside[:, inside] = False
        codes, low, high = quantize(frame, self.grid.group, outside)
        held.codes.copy_(codes[:, slice(*place.code_bytes(span.cols))])
        held.low.copy_(low)
        held.high.copy_(high)

    def to_payload(self) -> dict[str, Any]:
        """The store as plain containers and tensors, loadable with ``weights_only=True``."""
        return {
            "version": FORMAT_VERSION,
            "numel": self.numel,
            "grid": (self.grid.block, self.grid.group),
            "spans": [(s.offset, s.start, s.rows, s.cols) for s in self.spans],
            "bits": self.bits,
            "codes": self.codes,
            "low": self.low,
            "high": self.high,
        }

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> ErrorStore:
        """The inverse of :meth:`to_payload`.

        Raises:
            ValueError: the payload has another format version, or its parts do not fit together.
        """
        names = ("numel", "grid", "spans", "bits", "codes", "low", "high")
        held = saved.fields(payload, _OWNER, FORMAT_VERSION, names)
        grid, spans = saved_grid(held, _OWNER)
        numel, bits = saved.integer(held["numel"], f"{_OWNER}: numel"), held["bits"]
        if type(bits) is not int or bits not in BITS:
            raise ValueError(f"{_OWNER}: bits is {bits!r}; allowed: {BITS}")
        return cls(numel, grid, spans, bits, held["codes"], held["low"], held["high"])


def _shapes(span: Span, grid: Grid, bits: int) -> tuple[int, int]:
    """The lengths of ``codes`` and of ``low`` for each block of a span."""
    if bits == 32:
        return span.cols, 0
    place = span.place(grid)
    first, last = place.code_bytes(span.cols)
    return last - first, place.groups
