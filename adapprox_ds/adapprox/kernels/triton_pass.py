# SPDX-License-Identifier: Apache-2.0
"""The pass in Triton: V, its root and X live in registers and nowhere else.

A launch takes all blocks of all shapes whose kernel is the same, as many as the workspace allows. A
program takes some rows of one block and walks over columns. What programs share is summed from
partial results, never by atomics: a step repeats bit by bit. Rows and columns are cut by the shape
alone, so that a block's bits do not depend on what else a launch takes. Nothing here waits for the
device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from adapprox_ds.adapprox.kernels.interface import Mean, Passed, Reduced, Runs, Stack, StepScalars
from adapprox_ds.adapprox.kernels.triton_kernels import GROUP, pass_kernel, run_kernel
from adapprox_ds.adapprox.kernels.triton_tables import Table, add_up, send, up, zeros_of
from adapprox_ds.adapprox.quantized import QuantizedMatrix, group_count

#: The most floats of projections, one for each chunk of rows, of a part of a block.
_PARTIALS = 1 << 25
#: A launch may have as many, or one for so many elements of the pass, if that is more: what does
#: not fit is left to the next launch.
_SHARE = 16
#: Columns that a program walks over, a multiple of every tile.
_WALK = 512
#: Elements of a tile's rows whose places fit 32 bits.
_LARGEST = (1 << 31) - (1 << 12)
#: The tile of the runs' kernel.
_RUN_ROWS = 8
_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}


def run(
    stacks: Sequence[Stack], runs: Runs | None, s: StepScalars, write: bool, long: bool = False
) -> Passed:
    """The pass over fp32 factors; as :func:`adapprox_ds.adapprox.kernels.tiles.run`.

    With ``long`` places take 64 bits in stacks that need no more than 32, too.
    """
    reduced = _outputs(stacks)
    room = max(_PARTIALS, sum(g.numel() for x in stacks for g in x.g) // _SHARE)
    launches: dict[tuple, list[list[_Part]]] = {}
    for stack, out in zip(stacks, reduced, strict=True):
        # Parts of one block add to the same results, and so are in launches of their own.
        after: dict[int, int] = {}
        for part in _parts(stack, out, s, write, long):
            alike = launches.setdefault(tuple(part.constants.items()), [])
            at = max(after.get(block, 0) for block in part.blocks)
            while at < len(alike) and sum(x.partials for x in alike[at]) + part.partials > room:
                at += 1
            alike.extend([] for _ in range(at + 1 - len(alike)))
            alike[at].append(part)
            after.update(dict.fromkeys(part.blocks, at + 1))
    _launch([parts for alike in launches.values() for parts in alike], s)
    none = torch.zeros(0, dtype=torch.float64, device="cpu")
    return Passed(reduced, none if runs is None else _run_runs(runs, s, write))


def _outputs(stacks: Sequence[Stack]) -> list[Reduced]:
    """Zeros to which launches add; of all stacks in one tensor of each dtype."""
    shapes, wide_shapes = [], []
    for x in stacks:
        width, tests = (0 if of is None else of.shape[2] for of in (x.x, x.z))
        blocks = len(x.g)
        shapes += [(blocks, x.rows, width), (blocks, tests, x.cols)]
        wide_shapes += [(blocks, x.rows), (blocks,)]
    if not stacks:
        return []
    zeros = zeros_of(stacks[0].q, torch.float32, shapes)
    wide = zeros_of(stacks[0].q, torch.float64, wide_shapes)
    return [
        Reduced(*of, *wide_of)
        for of, wide_of in zip(
            zip(zeros[::2], zeros[1::2], strict=True),
            zip(wide[::2], wide[1::2], strict=True),
            strict=True,
        )
    ]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Whole rows of a tile of a stack's blocks; its first element is ``first`` of each."""

    tile: int
    rows: slice
    cols: slice
    first: int
    skipped: int  # rows of the tile before


@dataclass(frozen=True, slots=True)
class _Part:
    """Pieces of some blocks, rows from the first piece's to the last's, and their kernel."""

    stack: Stack
    reduced: Reduced
    blocks: range
    pieces: list[_Piece]
    partials: int
    places: list[list[tuple[int, ...]]]
    constants: dict[str, Any]

    @property
    def programs(self) -> list[tuple[int, int]]:
        """For each piece, into how many chunks of rows and walks over columns it is cut."""
        tile, walk = self.constants["ROWS"], self.constants["COLS"] * self.constants["SPAN"]
        return [
            (
                up(x.rows.stop - x.rows.start, tile),
                up(x.cols.stop - x.cols.start, walk),
            )
            for x in self.pieces
        ]

    @property
    def height(self) -> int:
        """Rows from the first piece's to the last's."""
        return self.pieces[-1].rows.stop - self.pieces[0].rows.start

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Floats of partial results: of y, p, the row energies and the squares."""
        programs, count = self.programs, len(self.blocks)
        energies = max(walks for _, walks in programs) * count * self.height
        squares = sum(chunks * walks for chunks, walks in programs) * count
        return energies * self.reduced.y.shape[2], self.partials, energies, squares

    @property
    def whole(self) -> bool:
        """Whether programs write all partial results: where rows are cut, none has the rest."""
        return all(x.cols == slice(0, self.stack.cols) for x in self.pieces)


def _parts(
    stack: Stack, reduced: Reduced, s: StepScalars, write: bool, long: bool = False
) -> Iterator[_Part]:
    """Cut a stack so that each part's projections fit the workspace, where one chunk's do."""
    tile = tile_of(isinstance(stack.m[0][0], QuantizedMatrix) if stack.m and write else False)
    height = tile["ROWS"]
    most = room = max(1, _PARTIALS // max(1, reduced.p[0].numel()))
    found: list[list[_Piece]] = [[]]
    for number, (rows, cols, elements) in enumerate(stack.tiles):
        begin = rows.start
        while begin < rows.stop:
            if room == 0:
                found.append([])
                room = most
            end = min(rows.stop, begin + room * height)
            skipped = begin - rows.start
            first = elements.start + skipped * (cols.stop - cols.start)
            found[-1].append(_Piece(number, slice(begin, end), cols, first, skipped))
            room -= up(end - begin, height)
            begin = end
    for pieces in found:
        chunks = sum(up(x.rows.stop - x.rows.start, height) for x in pieces)
        size = chunks * reduced.p[0].numel()
        step = max(1, _PARTIALS // max(1, size))
        for i in range(0, len(stack.g), step):
            blocks = range(i, min(i + step, len(stack.g)))
            places = [[_place(stack, x, j, write) for j in blocks] for x in pieces]
            aligned = stack.cols % 16 == 0 and all(
                address % 16 == 0
                for x, of in zip(pieces, places, strict=True)
                for address in (x.cols.stop - x.cols.start, *(a for p in of for a in p[:3]))
            )
            constants = {**_constants(stack, s, write, aligned), **tile}
            constants["OFFSET"] = tl.int64 if long or is_long(stack) else tl.int32
            yield _Part(stack, reduced, blocks, pieces, len(blocks) * size, places, constants)


def is_long(stack: Stack) -> bool:
    """Whether places take 64 bits: of a tile's rows, or of the projection by the test sketch."""
    tests = 0 if stack.z is None else stack.z.shape[2]
    return max(tile_of(False)["ROWS"], tests) * stack.cols > _LARGEST


def tile_of(codes: bool) -> dict[str, int]:
    """Compile-time arguments, and how to compile: a tile of codes has whole groups."""
    # Four warps feed a Hopper tensor core 64 rows deep. Of 32 columns registers spill.
    rows, cols, warps = (32, GROUP.value, 8) if codes else (64, 16, 4)
    walk = {"SPAN": _WALK // cols}
    return {"ROWS": rows, "COLS": cols, **walk, "num_warps": warps, "num_stages": 1}


def slices_of(rank: int, width: int, tests: int) -> dict[str, int]:
    """Compile-time arguments: tl.dot takes powers of two, at least 16."""
    size = 16 if max(rank, width, tests) <= 16 else 32
    counts = (up(x, size) for x in (rank, width, tests))
    return {"SLICE": size, **dict(zip(("RANK", "SKETCH", "TESTS"), counts, strict=True))}


def _constants(stack: Stack, s: StepScalars, write: bool, aligned: bool) -> dict[str, Any]:
    width, tests = (0 if x is None else x.shape[2] for x in (stack.x, stack.z))
    mean = stack.m[0][0] if stack.m is not None else None
    rest = stack.compensation is not None
    return {
        **_kinds(stack.g[0], stack.w[0], mean, rest, s, write),
        "ALIGNED": aligned,
        **slices_of(stack.q.shape[2], width, tests),
        # AMD's matrix cores take fp32 as it is.
        "TF32": torch.version.hip is None,
    }


def _kinds(
    g: Tensor, w: Tensor, m: Mean | None, rest: bool, s: StepScalars, write: bool
) -> dict[str, Any]:
    """Compile-time arguments of both kernels; a pass that does not write has but gradients."""
    codes = m.codes if isinstance(m, QuantizedMatrix) else m
    return {
        "G": _TYPES[g.dtype],
        "W": _TYPES[w.dtype] if write else None,
        "M": _TYPES[codes.dtype] if write and codes is not None else None,
        "REST": tl.int8 if write and rest else None,
        "AT_RANDOM": write and s.weight_salt is not None and w.dtype != torch.float32,
        "OF_GRADIENTS": s.of_gradients and write,
        "WRITE": write,
    }


def _place(stack: Stack, piece: _Piece, block: int, write: bool) -> tuple[int, ...]:
    """Of a piece, where gradients, weights, first moments, scales and compensations lie.

    The last but one is its first index instead.
    """
    g, w = (x[block].data_ptr() + piece.first * x[block].itemsize for x in (stack.g, stack.w))
    m = scales = 0
    if stack.m is not None and write:
        m, scales = _mean_addresses(stack.m[block][piece.tile], piece.skipped)
    rest = 0
    if stack.compensation is not None and write:
        rest = stack.compensation[block].data_ptr() + piece.first
    return g, w if write else 0, m, scales, stack.first[block] + piece.first, rest


def _mean_addresses(m: Mean, row: int) -> tuple[int, int]:
    """Where a first moment lies from a row on, and the scales of codes."""
    if not isinstance(m, QuantizedMatrix):
        return m.data_ptr() + row * m.shape[1] * m.itemsize, 0
    scales = m.scales.data_ptr() + row * group_count(m.cols) * 4
    return m.codes.data_ptr() + row * m.codes.shape[1], scales


def _launch(launches: list[list[_Part]], s: StepScalars) -> None:
    """Blocks of any shapes that have a kernel in common; all launches' tables in one copy."""
    if not launches:
        return
    like = launches[0][0].stack.q
    sizes = [sum(sum(part.sizes) for part in parts) for parts in launches]
    are_whole = [all(part.whole for part in parts) for parts in launches]
    # One launch after another has the same room.
    shared = like.new_empty(max((n for n, x in zip(sizes, are_whole, strict=True) if x), default=0))
    tables: list[tuple[Table, Table]] = []
    places: list[tuple[int, ...]] = []
    held = [shared]
    for parts, size, whole in zip(launches, sizes, are_whole, strict=True):
        work = shared if whole else like.new_zeros(size)
        tables.append((Table(), Table()))
        at = work.data_ptr()
        for part in parts:
            held += [work, *_add_part(part, *tables[-1], places, at)]
            at += 4 * sum(part.sizes)
    sent = send(
        like.device, *(x for pair in tables for of in pair for x in of.tensors), more=places
    )
    with torch.cuda.device_of(like):
        for i, (parts, (table, sums)) in enumerate(zip(launches, tables, strict=True)):
            pieces, owners, *of_sums = sent[4 * i : 4 * i + 4]
            pass_kernel[(table.programs,)](
                pieces, sent[-1], owners,
                float(s.beta2**0.5), *_scalars(s, parts[0].stack.m is not None),
                **parts[0].constants,
            )  # fmt: skip
            add_up(sums, of_sums, tl.float32)
    del held  # what addresses in tables point to


def _add_part(
    part: _Part, table: Table, sums: Table, places: list[tuple[int, ...]], at: int
) -> list[Tensor]:
    """Tables' rows of a part whose partial results lie at an address, and the operands' copies."""
    stack, out, pieces, blocks = part.stack, part.reduced, part.pieces, part.blocks
    count, first, begin, height = len(blocks), blocks.start, pieces[0].rows.start, part.height
    (tests, cols), width = out.p.shape[1:], out.y.shape[2]
    y, p, energies, squares = (at + 4 * x for x in accumulate((0, *part.sizes[:3])))
    operands = [
        *(stack.q, stack.u, stack.x, stack.z),
        *(stack.col_squares, stack.floor_rows, stack.floor_cols, stack.clip),
    ]
    operands = [None if x is None else x[first:].contiguous() for x in operands]
    sides = (0, 1, 1, 0, 1, 0, 1)
    chunk = unit = 0
    for piece, of_blocks, (chunks, walks) in zip(pieces, part.places, part.programs, strict=True):
        rows, columns = piece.rows, piece.cols
        # Of a piece's first row or column; a clip is a block's.
        starts = (*((rows.start, columns.start)[side] for side in sides), 0)
        steps = (*(1 if x is None or x.dim() < 3 else x.shape[2] for x in operands),)
        table.add(
            chunks * walks * count,
            *(rows.stop - rows.start, columns.stop - columns.start, count),
            *(stack.rows, cols, height, stack.q.shape[2], width, tests, len(places)),
            *(
                0 if x is None else x.data_ptr() + 4 * start * step
                for x, start, step in zip(operands, starts, steps, strict=True)
            ),
            y + 4 * (rows.start - begin) * width,
            p + 4 * (chunk * count * tests * cols + columns.start),
            energies + 4 * (rows.start - begin),
            squares + 4 * unit * count,
        )
        places.extend(of_blocks)
        chunk, unit = chunk + chunks, unit + chunks * walks
    most = max(walks for _, walks in part.programs)
    size, own = height * width, stack.rows * width
    sums.add_sum(y, out.y[first, begin:], most, count * size, size, own)
    sums.add_sum(p, out.p[first:], chunk, count * tests * cols)
    sums.add_sum(
        energies, out.row_energies[first, begin:], most, count * height, height, stack.rows
    )
    if not part.constants["WRITE"]:
        sums.add_sum(squares, out.squares[first:], unit, count)
    return [x for x in operands if x is not None]


def _run_runs(runs: Runs, s: StepScalars, write: bool) -> Tensor:
    """All dense runs, those of the same dtypes in one launch."""
    like = runs.v[0]
    squares = like.new_zeros(len(runs.v), dtype=torch.float64)
    # By torch's dtypes: Triton's take long to compare.
    launches: dict[tuple, list[int]] = {}
    for i, (g, w) in enumerate(zip(runs.g, runs.w, strict=True)):
        mean = None if runs.m is None else runs.m[i]
        codes = mean.codes if isinstance(mean, QuantizedMatrix) else mean
        kept = None if codes is None else codes.dtype
        launches.setdefault((g.dtype, w.dtype, kept), []).append(i)
    clip = None if runs.clip is None else runs.clip.contiguous()
    rest = runs.compensation is not None
    for numbers in launches.values():
        first = numbers[0]
        mean = None if runs.m is None else runs.m[first]
        kinds = _kinds(runs.g[first], runs.w[first], mean, rest, s, write)
        table, sums = Table(), Table()
        units = [up(runs.v[i].numel(), _RUN_ROWS * GROUP.value) for i in numbers]
        work = like.new_empty(sum(units))
        for i, count in zip(numbers, units, strict=True):
            place = work.data_ptr() + 4 * table.programs
            means = (0, 0) if runs.m is None else _mean_addresses(runs.m[i], 0)
            table.add(
                count,
                runs.v[i].numel(),
                *(x[i].data_ptr() for x in (runs.g, runs.w, runs.v)),
                *means,
                runs.first[i],
                0 if clip is None else clip.data_ptr() + 4 * i,
                place,
                0 if runs.compensation is None else runs.compensation[i].data_ptr(),
            )
            if not write:
                sums.add_sum(place, squares[i:], count, 1)
        sent = send(like.device, *table.tensors, *sums.tensors)
        with torch.cuda.device_of(like):
            run_kernel[(table.programs,)](
                sent[0], sent[1], float(s.beta2), *_scalars(s, runs.m is not None),
                **kinds, ROWS=_RUN_ROWS,
            )  # fmt: skip
            add_up(sums, sent[2:4], tl.float32)
    return squares


def _scalars(s: StepScalars, has_mean: bool) -> tuple[float | int, ...]:
    """In the kernels' order; floats, as an integer would be compiled into the kernel."""
    numbers = (1.0 - s.beta2, s.correction, s.eps, s.largest, s.beta1, s.gain, *s.ahead)
    last = (1.0 - s.lr * s.weight_decay, s.rate(has_mean))
    # 32 bits with a sign, for any salt to be of one type.
    salts = ((x ^ 1 << 31) - (1 << 31) for x in (s.salt, s.weight_salt or 0))
    return (*map(float, (*numbers, *last)), *salts)
