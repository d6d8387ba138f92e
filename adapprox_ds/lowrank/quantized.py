# SPDX-License-Identifier: Apache-2.0
"""QuantizedMoment: a first moment that is 8-bit codes physically and a tensor logically.

A flat tensor is covered by row-major matrices, its *spans*; a dense run is a matrix of one row. A
group is ``GROUP`` consecutive elements of one row, the last group of a row perhaps fewer. Each
element has an int8 code c in [-127, 127], each group an fp32 scale, and the element reads as

    scale * sign(c) * (c / 127)^2,

which is finest near zero, where most entries of a moment lie. A group's scale is its largest
absolute value, so that an element differs from what it reads as by at most 1/127 of it; of the
value read at a code c other than 0, the difference is at most (|c| + 1/4) / c^2, about 1/|c|. An
element takes 1 + 4 / GROUP = 1.03125 bytes where GROUP divides the columns.

Quantising what was read in fp32 gives the same codes and scales, bit for bit. Groups that hold
NaN or infinity read as NaN; those whose scale would be below ``SMALLEST_SCALE`` read as 0.

The 8-bit states of torchao and bitsandbytes cut a tensor into groups by its flat index: a group
crosses the rows of matrices and the cuts of ZeRO, and in torchao sizes must be multiples of it.
With groups inside rows, any range of whole rows is a range of whole groups, which another
partition takes over without quantising anew.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.lowrank import saved
from adapprox_ds.lowrank.compact import CompactTensor

#: Version of the serialised form; raised when its fields or the codes change meaning.
FORMAT_VERSION = 1

#: What errors name.
_OWNER = "QuantizedMoment"

#: Elements that share a scale.
GROUP = 128

#: The largest code.
_LEVELS = 127

#: Groups of smaller scales are taken as 0. Above it all elements with a code other than 0, and what
#: they read as, are normal numbers (at least 2^-126, as (1/2 / 127)^2 > 2^-16). Subnormal ones lie
#: on so coarse a grid that codes would change when quantised again, and some devices flush them.
SMALLEST_SCALE = 2.0**-110

#: A multiplication rounds alike on every device, while a division by a constant is a
#: multiplication on some; 127^2 times this is exactly 1 in fp32.
_INVERSE_SQUARE = 1.0 / _LEVELS**2

#: Elements made dense at a time where a range or a whole tensor is read or quantised: 16 MB. A
#: multiple of GROUP.
_CHUNK = 1 << 22

#: (offset in the flat tensor, rows, cols) of a row-major matrix.
Span = tuple[int, int, int]


def group_count(cols: int) -> int:
    """Groups in a row of ``cols`` elements."""
    return -(-cols // GROUP)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """The codes and scales of a matrix.

    Args:
        x: (rows, cols), any float dtype; taken as fp32.

    Returns:
        codes (rows, cols) int8 and scales (rows, group_count(cols)) fp32.
    """
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = x.new_empty((x.shape[0], group_count(x.shape[1])), dtype=torch.float32)
    _quantize_into(x, codes, scales)
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What codes and scales stand for: a new (rows, cols) tensor; the arithmetic is in fp32.

    Args:
        codes: (rows, cols) int8.
        scales: (rows, group_count(cols)) fp32.
        dtype: of the result.
    """
    signed_squares = codes.abs().to(torch.int16).mul_(codes)
    values = signed_squares.to(torch.float32).mul_(_INVERSE_SQUARE)
    for part, scale in _groups(values, scales):
        part.mul_(scale)
    return values.to(dtype)


def _quantize_into(x: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Write the codes and scales of ``x``, which :func:`quantize` describes."""
    pairs = zip(_groups(x.to(torch.float32), scales), _groups(codes, scales), strict=True)
    for (part, scale), (code, _) in pairs:
        size = part.abs()
        torch.amax(size, dim=-1, keepdim=True, out=scale)
        scale.masked_fill_(scale < SMALLEST_SCALE, 0.0).masked_fill_(scale == math.inf, math.nan)
        # 0 / 0, x / 0 and x / NaN: the code is 0 and the scale tells which it was.
        size.div_(scale).nan_to_num_(nan=0.0, posinf=0.0)
        code.copy_(size.sqrt_().mul_(_LEVELS).round_().copysign_(part))


def _groups(cells: Tensor, scales: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The full groups of all rows, and the short ones at their ends, where there are any.

    Yields:
        Views: cells as (rows, groups, width) and their scales as (rows, groups, 1).
    """
    full, rest = divmod(cells.shape[1], GROUP)
    if full:
        part = cells[:, : full * GROUP].unflatten(1, (full, GROUP))
        yield part, scales[:, :full].unsqueeze(-1)
    if rest:
        yield cells[:, full * GROUP :].unsqueeze(1), scales[:, full:].unsqueeze(-1)


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """One span of a store; shares its memory.

    Attributes:
        codes: (rows, cols) int8.
        scales: (rows, group_count(cols)) fp32.
    """

    codes: Tensor
    scales: Tensor

    def __len__(self) -> int:
        """The number of rows, as of a 2-D tensor."""
        return len(self.codes)

    def load(self, a: int, b: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows [a, b), (b - a, cols), as a new tensor."""
        return dequantize(self.codes[a:b], self.scales[a:b], dtype)

    def store_rows(self, a: int, values: Tensor) -> None:
        """Quantise ``values``, (b - a, cols), into rows [a, b)."""
        b = a + values.shape[0]
        _quantize_into(values, self.codes[a:b], self.scales[a:b])


@dataclass(slots=True)
class QuantizedStore:
    """The physical first moment of one flat tensor.

    Attributes:
        numel: length of the flat tensor; elements in no span are padding and read as 0.
        spans: the matrices that cover it.
        codes: (numel,) int8, in the order of the flat tensor; 0 in padding.
        scales: fp32, in the order of spans, their rows, and the groups of a row.
    """

    numel: int
    spans: tuple[Span, ...]
    codes: Tensor
    scales: Tensor
    _first_scales: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        end = 0
        for offset, rows, cols in sorted(self.spans):
            if offset < end or offset + rows * cols > self.numel:
                raise ValueError(
                    f"{_OWNER}: the span of {rows} x {cols} at {offset} overlaps its neighbour or "
                    f"leaves the tensor: allowed is [{end}, {self.numel})"
                )
            end = offset + rows * cols
        counts = (rows * group_count(cols) for _, rows, cols in self.spans)
        *first, total = itertools.accumulate(counts, initial=0)
        self.codes = saved.tensor(self.codes, f"{_OWNER}: codes", (self.numel,), [torch.int8])
        scales = saved.tensor(self.scales, f"{_OWNER}: scales", (total,), [torch.float32])
        self.scales = scales
        self._first_scales = tuple(first)

    @classmethod
    def zeros(
        cls, numel: int, spans: Iterable[Span], device: torch.device | str = "cpu"
    ) -> QuantizedStore:
        """A first moment of 0.

        Args:
            numel: length of the flat tensor.
            spans: (offset, rows, cols) of the matrices in it; in any order, without overlaps.
            device: where it lives.

        Raises:
            ValueError: spans overlap or leave the tensor.
        """
        spans = tuple(spans)
        groups = sum(rows * group_count(cols) for _, rows, cols in spans)
        codes = torch.zeros(numel, dtype=torch.int8, device=device)
        return cls(numel, spans, codes, torch.zeros(groups, dtype=torch.float32, device=device))

    @classmethod
    def from_dense(cls, flat: Tensor, spans: Iterable[Span]) -> QuantizedStore:
        """Quantise a dense tensor, taken as 1-D; what it holds in no span is dropped."""
        flat = flat.reshape(-1)
        store = cls.zeros(flat.numel(), spans, flat.device)
        for i, (offset, rows, cols) in enumerate(store.spans):
            matrix = store.matrix(i)
            x = flat[offset : offset + rows * cols].view(rows, cols)
            for row, column in _tiles(0, rows * cols, cols):
                groups = slice(column.start // GROUP, group_count(column.stop))
                _quantize_into(
                    x[row, column], matrix.codes[row, column], matrix.scales[row, groups]
                )
        return store

    @property
    def device(self) -> torch.device:
        """Where codes and scales live."""
        return self.codes.device

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def bytes_between(self, begin: int, end: int) -> int:
        """Bytes of the codes [begin, end) and of the scales of the spans that begin there."""
        inside = (s for s in self.spans if begin <= s[0] < end)
        return end - begin + sum(4 * rows * group_count(cols) for _, rows, cols in inside)

    def matrix(self, span_index: int) -> QuantizedMatrix:
        """One span's codes and scales as views."""
        offset, rows, cols = self.spans[span_index]
        first, groups = self._first_scales[span_index], group_count(cols)
        return QuantizedMatrix(
            self.codes[offset : offset + rows * cols].view(rows, cols),
            self.scales[first : first + rows * groups].view(rows, groups),
        )

    def read(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Elements [begin, end) of the logical flat tensor, as a new dense 1-D tensor."""
        out = torch.zeros(end - begin, dtype=dtype, device=self.device)
        for i, (offset, rows, cols) in enumerate(self.spans):
            lo, hi = max(offset, begin), min(offset + rows * cols, end)
            if lo >= hi:
                continue
            matrix, at = self.matrix(i), lo - begin
            for row, column in _tiles(lo - offset, hi - offset, cols):
                groups = slice(column.start // GROUP, group_count(column.stop))
                skip = groups.start * GROUP
                codes = matrix.codes[row, skip : column.stop]
                values = dequantize(codes, matrix.scales[row, groups])
                values = values[:, column.start - skip :]
                out[at : at + values.numel()].view(values.shape).copy_(values)
                at += values.numel()
        return out

    def write(self, begin: int, values: Tensor) -> None:
        """Quantise ``values``, (n,), into the elements from ``begin`` on."""
        end = begin + len(values)
        for i, (offset, rows, cols) in enumerate(self.spans):
            lo, hi = max(offset, begin), min(offset + rows * cols, end)
            if lo < hi:
                first, last = (lo - offset) // cols, -(-(hi - offset) // cols)
                origin, matrix = offset + first * cols, self.matrix(i)
                cells = matrix.load(first, last)
                cells.view(-1)[lo - origin : hi - origin] = values[lo - begin : hi - begin]
                matrix.store_rows(first, cells)

    def map(self, change: Callable[[Tensor], Tensor]) -> QuantizedStore:
        """A new store with ``change`` applied to each tensor (clone, move to a device...)."""
        return QuantizedStore(self.numel, self.spans, change(self.codes), change(self.scales))

    def to_payload(self) -> dict[str, Any]:
        """Plain containers and tensors, loadable with ``weights_only=True``."""
        return {
            "version": FORMAT_VERSION,
            "numel": self.numel,
            "spans": list(self.spans),
            "codes": self.codes,
            "scales": self.scales,
        }

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> QuantizedStore:
        """The inverse of :meth:`to_payload`.

        Raises:
            ValueError: the payload has another format version, or its parts do not fit together.
        """
        held = saved.fields(payload, _OWNER, FORMAT_VERSION, ("numel", "spans", "codes", "scales"))
        numel = saved.integer(held["numel"], f"{_OWNER}: numel")
        spans = tuple(
            saved.triple(span, f"{_OWNER}: span {i}")
            for i, span in enumerate(saved.items(held["spans"], f"{_OWNER}: spans"))
        )
        return cls(numel, spans, held["codes"], held["scales"])


def _tiles(begin: int, end: int, cols: int) -> Iterator[tuple[slice, slice]]:
    """Cut elements [begin, end) of a row-major matrix into rectangles of at most a chunk.

    Yields:
        Their rows and columns, in order; several rows only of all columns. From begin = 0 on each
        holds whole groups.
    """
    while begin < end:
        row, column = divmod(begin, cols)
        whole = min((end - begin) // cols, _CHUNK // cols)
        if column or not whole:
            stop = min(cols, column + end - begin, column + _CHUNK)
            yield slice(row, row + 1), slice(column, stop)
            begin += stop - column
        else:
            yield slice(row, row + whole), slice(0, cols)
            begin += whole * cols


def _rebuild_quantized(*held: Any) -> QuantizedMoment:
    return QuantizedMoment.restore(QuantizedStore, *held)


class QuantizedMoment(CompactTensor):
    """The logical dense first moment over a :class:`QuantizedStore`, or a lazy piece of it."""

    store: QuantizedStore
    no_writes = (
        "{} would write into a quantised first moment; to replace it, assign a dense tensor to "
        "state['exp_avg'] (the next step quantises it), or copy_ one to it or to a slice of it"
    )

    @property
    def rebuild(self) -> Callable[..., CompactTensor]:
        """From a payload, a shape, a dtype and their seal."""
        return _rebuild_quantized

    def write(self, values: Tensor) -> None:
        """Replace the piece's elements; they are quantised at once."""
        self.store.write(self.start, values)

    def describe(self) -> str:
        """The number of matrices."""
        return f"spans={len(self.store.spans)}"


torch.serialization.add_safe_globals([_rebuild_quantized])
