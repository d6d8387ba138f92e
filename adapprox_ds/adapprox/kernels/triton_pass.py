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
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adapprox_ds.adapprox.kernels.interface import Mean, Passed, Reduced, Runs, Stack, StepScalars
from adapprox_ds.adapprox.kernels.triton_kernels import GROUP, pass_kernel, run_kernel, sum_kernel
from adapprox_ds.adapprox.quantized import QuantizedMatrix, group_count

#: Floats of a launch's projections by chunks of rows: more of them take more launches.
_PARTIALS = 1 << 23
#: Columns that a program walks over, a multiple of every tile.
_WALK = 512
#: Elements of a tile's rows whose places fit 32 bits.
_LARGEST = (1 << 31) - (1 << 12)
#: Tile of the runs' kernel and of sums.
_RUN_ROWS, _SUM = 8, {"ROWS": 32, "COLS": 64}
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
    reduced = []
    launches: dict[tuple, list[list[_Part]]] = {}
    for stack in stacks:
        reduced.append(_outputs(stack))
        for part in _parts(stack, reduced[-1], s, write, long):
            alike = launches.setdefault(tuple(part.constants.items()), [[]])
            # Of one block, parts are in as many launches: no part but its last leaves room.
            if sum(x.partials for x in alike[-1]) + part.partials > _PARTIALS and alike[-1]:
                alike.append([])
            alike[-1].append(part)
    for alike in launches.values():
        for parts in alike:
            _launch(parts, s)
    return Passed(
        reduced,
        torch.zeros(0, dtype=torch.float64, device="cpu")
        if runs is None
        else _run_runs(runs, s, write),
    )


def _outputs(stack: Stack) -> Reduced:
    q, blocks = stack.q, len(stack.g)
    width, tests = (0 if x is None else x.shape[2] for x in (stack.x, stack.z))
    return Reduced(
        q.new_zeros(blocks, stack.rows, width),
        q.new_zeros(blocks, tests, stack.cols),
        q.new_zeros(blocks, stack.rows, dtype=torch.float64),
        q.new_zeros(blocks, dtype=torch.float64),
    )


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
            room -= triton.cdiv(end - begin, height)
            begin = end
    for pieces in found:
        chunks = sum(triton.cdiv(x.rows.stop - x.rows.start, height) for x in pieces)
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
    counts = (triton.cdiv(x, size) for x in (rank, width, tests))
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


class _Table:
    """Rows of a table, each behind the number of the first program that works on it."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, ...]] = []
        self.counts: list[int] = []
        self.programs = 0

    def add(self, programs: int, *fields: int) -> None:
        self.rows.append((self.programs, *fields))
        self.counts.append(programs)
        self.programs += programs

    def add_sum(self, count: int, numel: int, inner: int, outer: int, *addresses: int) -> None:
        """Partial results, (count, numel), to be added up; see ``sum_kernel``."""
        if count * numel:
            programs = triton.cdiv(numel, _SUM["COLS"])
            self.add(programs, count, numel, inner, outer, *addresses)

    @property
    def tensors(self) -> list[Tensor]:
        """The rows, and each program's."""
        rows, counts = (
            torch.tensor(x, dtype=torch.int64, device="cpu") for x in (self.rows, self.counts)
        )
        numbers = torch.arange(len(rows), dtype=torch.int64, device="cpu")
        return [rows, numbers.repeat_interleave(counts)]


def _launch(parts: list[_Part], s: StepScalars) -> None:
    """Blocks of any shapes that have a kernel in common."""
    constants, like = parts[0].constants, parts[0].stack.q
    table, sums, wide_sums = _Table(), _Table(), _Table()
    places: list[tuple[int, ...]] = []
    held = [_add_part(part, table, places, sums, wide_sums) for part in parts]
    sent = _send(like.device, *table.tensors, *sums.tensors, *wide_sums.tensors, places=places)
    with torch.cuda.device_of(like):
        pass_kernel[(table.programs,)](
            sent[0], sent[-1], sent[1],
            float(s.beta2**0.5), *_scalars(s, parts[0].stack.m is not None), **constants,
        )  # fmt: skip
        _add_up(sums, sent[2:4], tl.float32)
        _add_up(wide_sums, sent[4:6], tl.float64)
    del held  # what addresses in tables point to


def _add_part(
    part: _Part, table: _Table, places: list[tuple[int, ...]], sums: _Table, wide_sums: _Table
) -> list[Tensor]:
    """Tables' rows of a part, and the tensors that nothing else holds."""
    stack, out, pieces, blocks = part.stack, part.reduced, part.pieces, part.blocks
    count, first = len(blocks), blocks.start
    tile, walk = part.constants["ROWS"], part.constants["COLS"] * part.constants["SPAN"]
    begin, end = pieces[0].rows.start, pieces[-1].rows.stop
    height, (tests, cols), width = end - begin, out.p.shape[1:], out.y.shape[2]
    chunks = [triton.cdiv(x.rows.stop - x.rows.start, tile) for x in pieces]
    walks = [triton.cdiv(x.cols.stop - x.cols.start, walk) for x in pieces]
    units = [a * b for a, b in zip(chunks, walks, strict=True)]
    sizes = (
        max(walks) * count * height * width,
        part.partials,
        max(walks) * count * height,
        sum(units) * count,
    )
    # Where rows are cut, no program has the rest.
    whole = all(x.cols == slice(0, cols) for x in pieces)
    work = stack.q.new_empty(sum(sizes)) if whole else stack.q.new_zeros(sum(sizes))
    y, p, energies, squares = (x.data_ptr() for x in work.split(sizes))
    operands = [
        *(stack.q, stack.u, stack.x, stack.z),
        *(stack.col_squares, stack.floor_rows, stack.floor_cols, stack.clip),
    ]
    operands = [None if x is None else x[first:].contiguous() for x in operands]
    sides = (0, 1, 1, 0, 1, 0, 1)
    chunk = unit = 0
    for i, piece in enumerate(pieces):
        rows, columns = piece.rows, piece.cols
        # Of a piece's first row or column; a clip is a block's.
        at = (*((rows.start, columns.start)[side] for side in sides), 0)
        steps = (*(1 if x is None or x.dim() < 3 else x.shape[2] for x in operands),)
        table.add(
            units[i] * count,
            *(rows.stop - rows.start, columns.stop - columns.start, count),
            *(stack.rows, cols, height, stack.q.shape[2], width, tests, len(places)),
            *(
                0 if x is None else x.data_ptr() + 4 * a * step
                for x, a, step in zip(operands, at, steps, strict=True)
            ),
            y + 4 * (rows.start - begin) * width,
            p + 4 * (chunk * count * tests * cols + columns.start),
            energies + 4 * (rows.start - begin),
            squares + 4 * unit * count,
        )
        places.extend(part.places[i])
        chunk, unit = chunk + chunks[i], unit + units[i]
    size, own = height * width, stack.rows * width
    sums.add_sum(max(walks), count * size, size, own, y, out.y[first, begin:].data_ptr())
    size = tests * cols
    sums.add_sum(chunk, count * size, size, size, p, out.p[first:].data_ptr())
    to = out.row_energies[first, begin:].data_ptr()
    wide_sums.add_sum(max(walks), count * height, height, stack.rows, energies, to)
    if not part.constants["WRITE"]:
        wide_sums.add_sum(unit, count, count, count, squares, out.squares[first:].data_ptr())
    return [work, *(x for x in operands if x is not None)]


def _run_runs(runs: Runs, s: StepScalars, write: bool) -> Tensor:
    """All dense runs, those of the same dtypes in one launch."""
    like = runs.v[0]
    squares = like.new_zeros(len(runs.v), dtype=torch.float64)
    launches: dict[tuple, list[int]] = {}
    for i, (g, w) in enumerate(zip(runs.g, runs.w, strict=True)):
        mean, rest = None if runs.m is None else runs.m[i], runs.compensation is not None
        kinds = _kinds(g, w, mean, rest, s, write)
        launches.setdefault(tuple(kinds.items()), []).append(i)
    clip = None if runs.clip is None else runs.clip.contiguous()
    for kinds_of, numbers in launches.items():
        table, sums = _Table(), _Table()
        units = [triton.cdiv(runs.v[i].numel(), _RUN_ROWS * GROUP.value) for i in numbers]
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
                sums.add_sum(count, 1, 1, 1, place, squares.data_ptr() + 8 * i)
        sent = _send(like.device, *table.tensors, *sums.tensors)
        with torch.cuda.device_of(like):
            run_kernel[(table.programs,)](
                sent[0], sent[1], float(s.beta2), *_scalars(s, runs.m is not None),
                **dict(kinds_of), ROWS=_RUN_ROWS,
            )  # fmt: skip
            _add_up(sums, sent[2:4], tl.float64)
    return squares


def _add_up(sums: _Table, sent: Sequence[Tensor], kind: Any) -> None:
    if sums.programs:
        sum_kernel[(sums.programs,)](*sent, KIND=kind, **_SUM)


def _send(
    device: torch.device, *tables: Tensor, places: Sequence[tuple[int, ...]] = ()
) -> list[Tensor]:
    """Tables in one copy, places the last of them."""
    tables = (*tables, torch.tensor(places, dtype=torch.int64, device="cpu"))
    host = torch.cat([x.flatten() for x in tables])
    if device.type == "cuda":
        # From pinned memory, so that the host does not wait for the device to come to this copy.
        host = host.pin_memory()
    return list(host.to(device, non_blocking=True).split([x.numel() for x in tables]))


def _scalars(s: StepScalars, has_mean: bool) -> tuple[float | int, ...]:
    """In the kernels' order; floats, as an integer would be compiled into the kernel."""
    numbers = (1.0 - s.beta2, s.correction, s.eps, s.largest, s.beta1, s.gain, *s.ahead)
    last = (1.0 - s.lr * s.weight_decay, s.rate(has_mean))
    # 32 bits with a sign, for any salt to be of one type.
    salts = ((x ^ 1 << 31) - (1 << 31) for x in (s.salt, s.weight_salt or 0))
    return (*map(float, (*numbers, *last)), *salts)
