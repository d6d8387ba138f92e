# SPDX-License-Identifier: Apache-2.0
"""QuantizedMoment: a first moment that looks like a tensor, and is stored in codes of 8 or 4 bits.

A flat tensor is covered by row-major matrices, its *spans*; a dense run is a matrix of one row. A
group is ``GROUP`` consecutive elements of a row; the last group of a row may be shorter. Each group
has an fp32 scale, its largest absolute value, and each element has a code c, which stands for

    8 bits, c in [-127, 127]     scale * sign(c) * (c / 127)^2
    4 bits, c in [-7, 7]         scale * sign(c) * (|c| / 7)^1.5

These values are densest near zero, as are the elements of a moment. With 8 bits the error is at
most 1/127 of the scale, and at a code c other than 0 at most (|c| + 1/4) / c^2 of the value, which
is about 1/|c|. If GROUP divides the number of columns, an element takes 1.03125 bytes with 8 bits,
and 0.53125 with 4, as two codes share a byte.

A step rounds to nearest with 8 bits, and stochastically with 4. Between so few values, rounding to
nearest would err in the same direction at every step, and a mean adds up such errors.
examples/paper/four_bits.py compares powers, roundings and the map of Li, Chen and Zhu ("Memory
efficient optimizers with 4-bit states", 2023).

If codes are read in fp32 and quantised again, they are the same to the bit with either rounding. A
group with NaN or infinity reads as NaN, and one with a scale below ``SMALLEST_SCALE`` as 0.

torchao and bitsandbytes group the elements of 8-bit states by their flat index, so that a group
crosses rows and ZeRO's cuts, and torchao's sizes must be multiples of a group. Here a group never
crosses the end of a row. Whole rows are therefore whole groups, and move to another partition
without being quantised again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.core import saved
from adapprox_ds.core.compact import CompactTensor, TensorStore
from adapprox_ds.core.rounding import noise_from, round_stochastically

#: The version of the serialised form. It is raised when its fields or the codes change meaning.
FORMAT_VERSION = 2

#: The name of the state in error messages.
_OWNER = "QuantizedMoment"

#: The number of elements that share a scale.
GROUP = 128

#: The largest code of 8 bits.
_LEVELS = 127

#: What the 4-bit codes 0 to 7 stand for, (c / 7)^1.5 as fp32 numbers; the middles between each two
#: of them, above which the larger one is nearer; and the distances between each two.
_LEVELS_4 = torch.arange(8, dtype=torch.float64, device="cpu").div_(7).pow_(1.5).float()
LEVELS_4: tuple[float, ...] = tuple(_LEVELS_4.tolist())
MIDDLES_4: tuple[float, ...] = tuple(_LEVELS_4[1:].add(_LEVELS_4[:-1]).div_(2).tolist())
GAPS_4: tuple[float, ...] = (*_LEVELS_4.diff().tolist(), math.inf)

#: The dtype of codes, by their bits. Two codes of 4 bits share an unsigned byte. Kernels tell the
#: width by the dtype, so that another width needs a dtype of its own.
_KINDS = {8: torch.int8, 4: torch.uint8}
_BITS = {kind: bits for bits, kind in _KINDS.items()}

#: Groups with a smaller scale are taken as 0. With it, all elements with a code other than 0, and
#: the values of their codes, are normal numbers (at least 2^-126, as (1/2 / 127)^2 > 2^-16).
#: Subnormal ones are so coarse that codes would not be stable, and some devices flush them to 0.
SMALLEST_SCALE = 2.0**-110

#: It is multiplied by, since a product is rounded alike on every device, while some make a division
#: by a constant a product. 127^2 times this is exactly 1 in fp32.
_INVERSE_SQUARE = 1.0 / _LEVELS**2

#: The number of elements that are made dense at a time when a range is read or quantised: 16 MB.
#: It is a multiple of GROUP.
_CHUNK = 1 << 22

#: (offset in the flat tensor, rows, cols) of a row-major matrix.
Span = tuple[int, int, int]


def group_count(cols: int) -> int:
    """The number of groups in a row of ``cols`` elements."""
    return -(-cols // GROUP)


def code_bytes(cols: int, bits: int) -> int:
    """The bytes of the codes of a row of ``cols`` elements."""
    return -(-cols * bits // 8)


def quantize(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """The codes and scales of a matrix.

    Args:
        x: a matrix (rows, cols) of any float dtype, which is converted to fp32.
        bits: the bits of a code, 8 or 4.

    Returns:
        The codes, (rows, cols) int8, or (rows, ceil(cols / 2)) uint8, with the code of an even
        column in the low half of a byte and that of the next column in the high half; and the
        scales, (rows, group_count(cols)) fp32.
    """
    rows, cols = x.shape
    codes = torch.empty((rows, code_bytes(cols, bits)), dtype=_KINDS[bits], device=x.device)
    scales = x.new_empty((rows, group_count(cols)), dtype=torch.float32)
    _quantize_into(x, codes, scales)
    return codes, scales


def dequantize(
    codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32, cols: int | None = None
) -> Tensor:
    """The values of codes and scales, computed in fp32, as a new (rows, cols) tensor.

    Args:
        codes: the codes, as from :func:`quantize`.
        scales: the scales, (rows, group_count(cols)) fp32.
        dtype: the dtype of the result.
        cols: the number of columns; None for as many as there are codes.
    """
    if codes.dtype == torch.int8:
        signed_squares = codes.abs().to(torch.int16).mul_(codes)
        values = signed_squares.to(torch.float32).mul_(_INVERSE_SQUARE)
    else:
        pairs = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)
        values = _table_4(codes.device)[pairs[:, :cols].int()]
    for part, scale in _groups(values, scales):
        part.mul_(scale)
    return values.to(dtype)


@cache
def _table_4(device: torch.device) -> Tensor:
    """The values of the 4-bit codes 0 to 7, and of -8, which does not occur, to -1."""
    levels = (*LEVELS_4, -1.0, *(-x for x in reversed(LEVELS_4[1:])))
    return torch.tensor(levels, dtype=torch.float32, device=device)


def _quantize_into(x: Tensor, codes: Tensor, scales: Tensor, noise: Tensor | None = None) -> None:
    """Write the codes and scales of ``x``, which :func:`quantize` describes.

    Args:
        x: the matrix, (rows, cols).
        codes: receives the codes.
        scales: receives the scales.
        noise: 16 random bits for each element, int32 of the shape of ``x``, by which 4-bit codes
            are rounded; None to round to nearest.
    """
    whole = codes
    if codes.dtype == torch.uint8:
        whole = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    cells = (x.to(torch.float32), whole, *(() if noise is None else (noise,)))
    for (part, scale), (code, _), *chance in zip(
        *(_groups(of, scales) for of in cells), strict=True
    ):
        size = part.abs()
        torch.amax(size, dim=-1, keepdim=True, out=scale)
        scale.masked_fill_(scale < SMALLEST_SCALE, 0.0).masked_fill_(scale == math.inf, math.nan)
        if whole is codes:
            # The code of 0 / 0, x / 0 and x / NaN is 0; the scale tells which it was.
            size.div_(scale).nan_to_num_(nan=0.0, posinf=0.0)
            code.copy_(size.sqrt_().mul_(_LEVELS).round_().copysign_(part))
            continue
        # In a group that reads as 0 or NaN, no element reaches a value of a code other than 0.
        most = scale.masked_fill(scale == 0, math.inf)
        count = torch.zeros_like(code)
        if not chance:
            for middle in MIDDLES_4:
                count += size > most * middle
        else:
            below, gap = torch.zeros_like(size), (most * GAPS_4[0]).expand_as(size)
            for level, wide in zip(LEVELS_4[1:], GAPS_4[1:], strict=True):
                reached = size >= most * level
                count += reached
                below = torch.where(reached, most * level, below)
                gap = torch.where(reached, most * wide, gap)
            count += chance[0][0].float() * 2.0**-16 * gap < size - below
        code.copy_(torch.where(part < 0, -count, count))
    if whole is not codes:
        odd = x.shape[1] % 2
        nibbles = torch.nn.functional.pad(whole, (0, odd)) if odd else whole
        nibbles = (nibbles & 15).to(torch.uint8)
        codes.copy_(nibbles[:, ::2] | nibbles[:, 1::2] << 4)


def _groups(cells: Tensor, scales: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the full groups of all rows, and the short ones at the ends of rows, if any.

    Yields:
        Views of the cells, (rows, groups, width), and of their scales, (rows, groups, 1).
    """
    full, rest = divmod(cells.shape[1], GROUP)
    if full:
        part = cells[:, : full * GROUP].unflatten(1, (full, GROUP))
        yield part, scales[:, :full].unsqueeze(-1)
    if rest:
        yield cells[:, full * GROUP :].unsqueeze(1), scales[:, full:].unsqueeze(-1)


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """The codes and scales of one span, as views of the store's.

    Attributes:
        codes: (rows, cols) int8, or (rows, ceil(cols / 2)) uint8.
        scales: (rows, group_count(cols)) fp32.
        cols: the number of elements of a row.
    """

    codes: Tensor
    scales: Tensor
    cols: int

    @classmethod
    def of(cls, x: Tensor, bits: int) -> QuantizedMatrix:
        """Quantise a matrix."""
        return cls(*quantize(x, bits), x.shape[1])

    @property
    def bits(self) -> int:
        """The bits of a code."""
        return _BITS[self.codes.dtype]

    def part(self, rows: slice, first: int, last: int) -> QuantizedMatrix:
        """Columns [first, last) of some rows, as views; a group begins at ``first``."""
        columns = slice(code_bytes(first, self.bits), code_bytes(last, self.bits))
        groups = slice(first // GROUP, group_count(last))
        return QuantizedMatrix(self.codes[rows, columns], self.scales[rows, groups], last - first)

    def __len__(self) -> int:
        """The number of rows, as of a 2-D tensor."""
        return len(self.codes)

    def load(self, a: int, b: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows [a, b) as a new tensor, (b - a, cols)."""
        return dequantize(self.codes[a:b], self.scales[a:b], dtype, self.cols)

    def store_rows(self, a: int, values: Tensor, index: int = 0, salt: int | None = None) -> None:
        """Quantise ``values``, (b - a, cols), into rows [a, b).

        Args:
            a: the index of the first row.
            values: the values, contiguous.
            index: the index in the flattened parameter of their first element.
            salt: the salt by which 4-bit codes are rounded stochastically; None to round to
                nearest.
        """
        b, noise = a + values.shape[0], None
        if self.bits == 4 and salt is not None:
            noise = noise_from(index, values.numel(), salt, values.device).view(values.shape)
        _quantize_into(values, self.codes[a:b], self.scales[a:b], noise)


@dataclass(slots=True)
class QuantizedStore(TensorStore):
    """The first moment of one flat tensor, as it is stored.

    Attributes:
        numel: the length of the flat tensor; elements in no span are padding and read as 0.
        spans: the matrices that cover it.
        codes: with 8 bits (numel,) int8, in the order of the flat tensor, 0 in padding; with 4 bits
            uint8, in the order of the spans and of their rows, each of which begins a new byte.
        scales: fp32, in the order of the spans, of their rows, and of the groups of a row.
        bits: the bits of a code.
    """

    kept = ("codes", "scales")

    numel: int
    spans: tuple[Span, ...]
    codes: Tensor
    scales: Tensor
    bits: int = 8
    _first_scales: tuple[int, ...] = field(init=False, repr=False)
    _first_codes: tuple[int, ...] = field(init=False, repr=False)

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
        sizes = (rows * code_bytes(cols, self.bits) for _, rows, cols in self.spans)
        *starts, size = itertools.accumulate(sizes, initial=0)
        if self.bits == 8:
            starts, size = [offset for offset, _, _ in self.spans], self.numel
        kind = [_KINDS[self.bits]]
        self.codes = saved.tensor(self.codes, f"{_OWNER}: codes", (size,), kind)
        scales = saved.tensor(self.scales, f"{_OWNER}: scales", (total,), [torch.float32])
        self.scales = scales
        self._first_scales, self._first_codes = tuple(first), tuple(starts)

    @classmethod
    def zeros(
        cls,
        numel: int,
        spans: Iterable[Span],
        device: torch.device | str = "cpu",
        bits: int = 8,
    ) -> QuantizedStore:
        """A first moment of 0.

        Args:
            numel: the length of the flat tensor.
            spans: (offset, rows, cols) of the matrices in it; in any order, without overlaps.
            device: the device of its tensors.
            bits: the bits of a code, 8 or 4.

        Raises:
            ValueError: spans overlap or leave the tensor.
        """
        spans = tuple(spans)
        groups = sum(rows * group_count(cols) for _, rows, cols in spans)
        size = numel
        if bits != 8:
            size = sum(rows * code_bytes(cols, bits) for _, rows, cols in spans)
        codes = torch.zeros(size, dtype=_KINDS[bits], device=device)
        scales = torch.zeros(groups, dtype=torch.float32, device=device)
        return cls(numel, spans, codes, scales, bits)

    @classmethod
    def from_dense(cls, flat: Tensor, spans: Iterable[Span], bits: int = 8) -> QuantizedStore:
        """Quantise a dense tensor, taken as 1-D; elements in no span are dropped."""
        flat = flat.reshape(-1)
        store = cls.zeros(flat.numel(), spans, flat.device, bits)
        for i, (offset, rows, cols) in enumerate(store.spans):
            matrix = store.matrix(i)
            x = flat[offset : offset + rows * cols].view(rows, cols)
            for row, column in _tiles(0, rows * cols, cols):
                part = matrix.part(row, column.start, column.stop)
                _quantize_into(x[row, column], part.codes, part.scales)
        return store

    def bytes_between(self, begin: int, end: int) -> int:
        """The bytes of the spans that begin in [begin, end), and of the padding there."""
        inside = [s for s in self.spans if begin <= s[0] < end]
        codes = end - begin
        if self.bits != 8:
            codes = sum(rows * code_bytes(cols, self.bits) for _, rows, cols in inside)
        return codes + sum(4 * rows * group_count(cols) for _, rows, cols in inside)

    def matrix(self, span_index: int) -> QuantizedMatrix:
        """The codes and scales of one span, as views."""
        _, rows, cols = self.spans[span_index]
        first, groups = self._first_scales[span_index], group_count(cols)
        at, width = self._first_codes[span_index], code_bytes(cols, self.bits)
        return QuantizedMatrix(
            self.codes[at : at + rows * width].view(rows, width),
            self.scales[first : first + rows * groups].view(rows, groups),
            cols,
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
                skip = column.start // GROUP * GROUP
                part = matrix.part(row, skip, column.stop)
                values = part.load(0, len(part))[:, column.start - skip :]
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

    def to_payload(self) -> dict[str, Any]:
        """The store as plain containers and tensors, loadable with ``weights_only=True``."""
        return {
            "version": FORMAT_VERSION,
            "numel": self.numel,
            "spans": list(self.spans),
            "codes": self.codes,
            "scales": self.scales,
            "bits": self.bits,
        }

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> QuantizedStore:
        """The inverse of :meth:`to_payload`.

        Raises:
            ValueError: the payload has another format version, or its parts do not fit together.
        """
        names = ("numel", "spans", "codes", "scales", "bits")
        held = saved.fields(payload, _OWNER, FORMAT_VERSION, names)
        bits = saved.integer(held["bits"], f"{_OWNER}: bits")
        if bits not in _KINDS:
            raise ValueError(f"{_OWNER}: bits is {bits}; allowed: {sorted(_KINDS)}")
        numel = saved.integer(held["numel"], f"{_OWNER}: numel")
        spans = tuple(
            saved.triple(span, f"{_OWNER}: span {i}")
            for i, span in enumerate(saved.items(held["spans"], f"{_OWNER}: spans"))
        )
        return cls(numel, spans, held["codes"], held["scales"], bits)


def _tiles(begin: int, end: int, cols: int) -> Iterator[tuple[slice, slice]]:
    """Cut elements [begin, end) of a row-major matrix into rectangles of at most ``_CHUNK`` ones.

    Yields:
        The rows and the columns of each rectangle, in order. One with several rows has all columns.
        If ``begin`` is 0, each consists of whole groups.
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


class QuantizedMoment(CompactTensor):
    """A first moment that looks dense, over a :class:`QuantizedStore`, or a lazy piece of one."""

    store: QuantizedStore
    store_class = QuantizedStore
    no_writes = (
        "{} would write into a quantised first moment; to replace it, assign a dense tensor to "
        "state['exp_avg'] (the next step quantises it), or copy_ one to it or to a slice of it"
    )

    def write(self, values: Tensor) -> None:
        """Replace the piece's elements; they are quantised at once."""
        self.store.write(self.start, values)

    def describe(self) -> str:
        """The number of matrices."""
        return f"spans={len(self.store.spans)}"


def load_rows(m: Tensor | QuantizedMatrix, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Rows [first, last) in ``dtype``: a view if the moment has that dtype, else a new tensor."""
    if isinstance(m, QuantizedMatrix):
        return m.load(first, last, dtype)
    return m[first:last].to(dtype)


def keep_rows(m: Tensor | QuantizedMatrix, first: int, rows: Tensor, index: int, salt: int) -> None:
    """Write rows of :func:`load_rows`, which were updated since, back to the first moment.

    Args:
        m: the first moment, (m, n). bf16 and 4-bit codes are rounded stochastically, all else to
            nearest.
        first: the index of the first row.
        rows: the rows, (r, n).
        index: the index in the flattened parameter of their first element. With ``salt`` it
            determines the random bits, which depend neither on tiles nor on ZeRO's cuts.
        salt: the salt of the random bits.
    """
    if isinstance(m, QuantizedMatrix):
        m.store_rows(first, rows, index, salt)
    elif m.dtype == torch.bfloat16:
        here = m[first : first + len(rows)]
        here.copy_(round_stochastically(rows.float(), index, salt))
    elif m.dtype != rows.dtype:
        m[first : first + len(rows)].copy_(rows)
