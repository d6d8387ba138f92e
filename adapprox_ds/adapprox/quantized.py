# SPDX-License-Identifier: Apache-2.0
"""QuantizedMoment: a first moment that is codes of 8 or 4 bits physically and a tensor logically.

A flat tensor is covered by row-major matrices, its *spans*; a dense run is a matrix of one row. A
group is ``GROUP`` consecutive elements of one row, the last group of a row perhaps fewer. Each
group has an fp32 scale, its largest absolute value, and each element a code c, which reads as

    8 bits, c in [-127, 127]     scale * sign(c) * (c / 127)^2
    4 bits, c in [-7, 7]         scale * sign(c) * (|c| / 7)^1.5

Both are finest near zero, where most entries of a moment lie. With 8 bits an element differs from
what it reads as by at most 1/127 of the scale; of the value read at a code c other than 0, the
difference is at most (|c| + 1/4) / c^2, about 1/|c|. Where GROUP divides the columns an element
takes 1.03125 or, two codes to a byte, 0.53125 bytes.

A step rounds 8 bits to nearest and 4 bits at random, to one of the two values around, the nearer
one more often: between so few values the nearest one is wrong by as much at every step, and a mean
adds that up. examples/paper/four_bits.py compares powers, roundings and the map of Li, Chen and Zhu
("Memory efficient optimizers with 4-bit states", 2023).

Quantising what was read in fp32 gives the same codes and scales, bit for bit, either way. Groups
that hold NaN or infinity read as NaN; those whose scale would be below ``SMALLEST_SCALE`` as 0.

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
from functools import cache
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.core import saved
from adapprox_ds.core.compact import CompactTensor
from adapprox_ds.core.rounding import noise_from, round_stochastically

#: Version of the serialised form; raised when its fields or the codes change meaning.
FORMAT_VERSION = 2

#: What errors name.
_OWNER = "QuantizedMoment"

#: Elements that share a scale.
GROUP = 128

#: The largest code of 8 bits.
_LEVELS = 127

#: What the 4-bit codes 0 to 7 stand for, (c / 7)^1.5, exactly these fp32 numbers; and between each
#: two of them the middle, above which an element takes the larger, and the distance, in fp32 too.
_LEVELS_4 = torch.arange(8, dtype=torch.float64, device="cpu").div_(7).pow_(1.5).float()
LEVELS_4: tuple[float, ...] = tuple(_LEVELS_4.tolist())
MIDDLES_4: tuple[float, ...] = tuple(_LEVELS_4[1:].add(_LEVELS_4[:-1]).div_(2).tolist())
GAPS_4: tuple[float, ...] = (*_LEVELS_4.diff().tolist(), math.inf)

#: Kinds of codes by their dtype: 4-bit ones lie in pairs in bytes without a sign.
_KINDS = {8: torch.int8, 4: torch.uint8}

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


def code_bytes(cols: int, bits: int) -> int:
    """Bytes of the codes of a row of ``cols`` elements."""
    return cols if bits == 8 else -(-cols // 2)


def quantize(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """The codes and scales of a matrix.

    Args:
        x: (rows, cols), any float dtype; taken as fp32.
        bits: of a code, 8 or 4.

    Returns:
        codes, (rows, cols) int8, or (rows, ceil(cols / 2)) uint8 of which each holds the codes of
        an even column, in its low half, and of the next; and scales (rows, group_count(cols)) fp32.
    """
    rows, cols = x.shape
    codes = torch.empty((rows, code_bytes(cols, bits)), dtype=_KINDS[bits], device=x.device)
    scales = x.new_empty((rows, group_count(cols)), dtype=torch.float32)
    _quantize_into(x, codes, scales)
    return codes, scales


def dequantize(
    codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32, cols: int | None = None
) -> Tensor:
    """What codes and scales stand for: a new (rows, cols) tensor; the arithmetic is in fp32.

    Args:
        codes: from :func:`quantize`.
        scales: (rows, group_count(cols)) fp32.
        dtype: of the result.
        cols: of the matrix; None for all that the codes have room for.
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
    """What 4-bit codes stand for, by their bits: 8 to 15 are -8, which does not occur, to -1."""
    levels = (*LEVELS_4, -1.0, *(-x for x in reversed(LEVELS_4[1:])))
    return torch.tensor(levels, dtype=torch.float32, device=device)


def _quantize_into(x: Tensor, codes: Tensor, scales: Tensor, noise: Tensor | None = None) -> None:
    """Write the codes and scales of ``x``, which :func:`quantize` describes.

    Args:
        x: (rows, cols).
        codes: taken; so are scales.
        scales: see above.
        noise: of ``x``'s shape, int32, 16 random bits each by which 4-bit codes are rounded; None
            to round to nearest.
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
            # 0 / 0, x / 0 and x / NaN: the code is 0 and the scale tells which it was.
            size.div_(scale).nan_to_num_(nan=0.0, posinf=0.0)
            code.copy_(size.sqrt_().mul_(_LEVELS).round_().copysign_(part))
            continue
        # Nothing reaches the values of a group that reads as 0 or NaN.
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
        codes: (rows, cols) int8, or (rows, ceil(cols / 2)) uint8.
        scales: (rows, group_count(cols)) fp32.
        cols: elements of a row.
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
        """Of a code."""
        return 8 if self.codes.dtype == torch.int8 else 4

    def part(self, rows: slice, first: int, last: int) -> QuantizedMatrix:
        """Columns [first, last) of some rows; ``first`` is that of a group."""
        columns = slice(code_bytes(first, self.bits), code_bytes(last, self.bits))
        groups = slice(first // GROUP, group_count(last))
        return QuantizedMatrix(self.codes[rows, columns], self.scales[rows, groups], last - first)

    def __len__(self) -> int:
        """The number of rows, as of a 2-D tensor."""
        return len(self.codes)

    def load(self, a: int, b: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows [a, b), (b - a, cols), as a new tensor."""
        return dequantize(self.codes[a:b], self.scales[a:b], dtype, self.cols)

    def store_rows(self, a: int, values: Tensor, index: int = 0, salt: int | None = None) -> None:
        """Quantise ``values``, (b - a, cols), into rows [a, b).

        Args:
            a: see above.
            values: contiguous.
            index: of their first element in its parameter; seeds random rounding.
            salt: by which 4-bit codes are rounded at random; None to nearest.
        """
        b, noise = a + values.shape[0], None
        if self.bits == 4 and salt is not None:
            noise = noise_from(index, values.numel(), salt, values.device).view(values.shape)
        _quantize_into(values, self.codes[a:b], self.scales[a:b], noise)


@dataclass(slots=True)
class QuantizedStore:
    """The physical first moment of one flat tensor.

    Attributes:
        numel: length of the flat tensor; elements in no span are padding and read as 0.
        spans: the matrices that cover it.
        codes: of 8 bits (numel,) int8, in the order of the flat tensor, 0 in padding; of 4 bits
            uint8, in the order of spans and of their rows, each of which begins with a byte.
        scales: fp32, in the order of spans, their rows, and the groups of a row.
        bits: of a code.
    """

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
            numel: length of the flat tensor.
            spans: (offset, rows, cols) of the matrices in it; in any order, without overlaps.
            device: where it lives.
            bits: of a code, 8 or 4.

        Raises:
            ValueError: spans overlap or leave the tensor.
        """
        spans = tuple(spans)
        groups = sum(rows * group_count(cols) for _, rows, cols in spans)
        size = numel
        if bits == 4:
            size = sum(rows * code_bytes(cols, bits) for _, rows, cols in spans)
        codes = torch.zeros(size, dtype=_KINDS[bits], device=device)
        scales = torch.zeros(groups, dtype=torch.float32, device=device)
        return cls(numel, spans, codes, scales, bits)

    @classmethod
    def from_dense(cls, flat: Tensor, spans: Iterable[Span], bits: int = 8) -> QuantizedStore:
        """Quantise a dense tensor, taken as 1-D; what it holds in no span is dropped."""
        flat = flat.reshape(-1)
        store = cls.zeros(flat.numel(), spans, flat.device, bits)
        for i, (offset, rows, cols) in enumerate(store.spans):
            matrix = store.matrix(i)
            x = flat[offset : offset + rows * cols].view(rows, cols)
            for row, column in _tiles(0, rows * cols, cols):
                part = matrix.part(row, column.start, column.stop)
                _quantize_into(x[row, column], part.codes, part.scales)
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
        """Bytes of the codes and scales of the spans that begin in [begin, end), and of padding."""
        inside = [s for s in self.spans if begin <= s[0] < end]
        codes = end - begin
        if self.bits == 4:
            codes = sum(rows * code_bytes(cols, self.bits) for _, rows, cols in inside)
        return codes + sum(4 * rows * group_count(cols) for _, rows, cols in inside)

    def matrix(self, span_index: int) -> QuantizedMatrix:
        """One span's codes and scales as views."""
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

    def map(self, change: Callable[[Tensor], Tensor]) -> QuantizedStore:
        """A new store with ``change`` applied to each tensor (clone, move to a device...)."""
        changed = change(self.codes), change(self.scales)
        return QuantizedStore(self.numel, self.spans, *changed, self.bits)

    def to_payload(self) -> dict[str, Any]:
        """Plain containers and tensors, loadable with ``weights_only=True``."""
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


class QuantizedMoment(CompactTensor):
    """The logical dense first moment over a :class:`QuantizedStore`, or a lazy piece of it."""

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
    """Rows [first, last) in ``dtype``: the moment's own where it has that, else a new tensor."""
    if isinstance(m, QuantizedMatrix):
        return m.load(first, last, dtype)
    return m[first:last].to(dtype)


def keep_rows(m: Tensor | QuantizedMatrix, first: int, rows: Tensor, index: int, salt: int) -> None:
    """Write ``rows``, from :func:`load_rows` and since updated, back to where they came from.

    Args:
        m: (m, n); bf16 and 4-bit codes are rounded at random, all else to nearest.
        first: the first row's index.
        rows: (r, n).
        index: of their first element in its parameter; with ``salt`` it seeds random rounding, so
            that bits depend neither on tiles nor on where ZeRO cuts a parameter.
        salt: of random rounding.
    """
    if isinstance(m, QuantizedMatrix):
        m.store_rows(first, rows, index, salt)
    elif m.dtype == torch.bfloat16:
        here = m[first : first + len(rows)]
        here.copy_(round_stochastically(rows.float(), index, salt))
    elif m.dtype != rows.dtype:
        m[first : first + len(rows)].copy_(rows)
