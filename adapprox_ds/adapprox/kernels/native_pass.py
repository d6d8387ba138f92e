# SPDX-License-Identifier: Apache-2.0
"""The pass in C++ on CPUs: packs operands, calls native.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.adapprox.kernels.interface import (
    Found,
    Mean,
    Passed,
    Past,
    Reduced,
    Runs,
    Sketches,
    Stack,
    StepScalars,
)
from adapprox_ds.adapprox.quantized import QuantizedMatrix
from adapprox_ds.core.kernels.native_build import FORMATS, SHARED, Library, addresses, load

LIBRARY = Library(
    "native",
    (
        *(Path(__file__).with_name(name) for name in ("native.cpp", "native.h")),
        *(SHARED / name for name in ("narrow.h", "products.h", "vectors.h")),
    ),
)
#: As in native.h: columns of packed operands, rows of a tile.
_PAD, _ROWS = 32, 16
#: The most chunks of a block: threads that can share one.
_CHUNKS = 128
#: Elements of all chunks' projections of a stack.
_PARTIALS = 1 << 22


class _Step(ctypes.Structure):
    """``struct Step`` of native.h."""

    _fields_ = [
        *((name, ctypes.c_float) for name in ("beta1", "gain", "beta2", "rest2")),
        *((name, ctypes.c_float) for name in ("of_mean", "of_new")),
        *((name, ctypes.c_float) for name in ("correction", "eps", "largest", "decay", "rate")),
        *((name, ctypes.c_int32) for name in ("of_gradients", "write", "measure", "kept")),
        ("salt", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in ("grads", "weights", "at_random")),
        ("weight_salt", ctypes.c_uint32),
        ("threads", ctypes.c_int32),
    ]


class _Stack(ctypes.Structure):
    """``struct Stack`` of native.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("blocks", "rows", "cols", "skip", "missing")),
        *((name, ctypes.c_int64) for name in ("rank", "width", "tests", "padded")),
        *((name, ctypes.c_int64) for name in ("chunk", "first_unit")),
        *((name, ctypes.c_void_p) for name in ("g", "m", "scales", "w", "rest")),
        *((name, ctypes.c_void_p) for name in ("first", "q", "u")),
        *((name, ctypes.c_void_p) for name in ("floor_rows", "floor_cols", "energies")),
        *((name, ctypes.c_void_p) for name in ("x", "z", "clip", "y", "p")),
        *((name, ctypes.c_void_p) for name in ("row_energies", "squares", "packed")),
    ]


class _Sketches(ctypes.Structure):
    """``struct Sketches`` of native.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("blocks", "rows", "cols", "rank", "width", "tests")),
        *((name, ctypes.c_int64) for name in ("first", "matrix_rows")),
        *((name, ctypes.c_void_p) for name in ("q", "u", "gram_q", "gram_u", "keys_x", "keys_z")),
        *((name, ctypes.c_void_p) for name in ("x", "z", "row_squares", "col_squares")),
        *((name, ctypes.c_void_p) for name in ("floor_rows", "floor_cols")),
        ("floor", ctypes.c_float),
        ("threads", ctypes.c_int32),
    ]


class _Products(ctypes.Structure):
    """``struct Products`` of native.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("blocks", "rows", "width", "tests", "first", "cols")),
        *((name, ctypes.c_int64) for name in ("p_block", "p_row", "squares_block")),
        *((name, ctypes.c_void_p) for name in ("y", "z", "p", "row_squares", "energies")),
        *((name, ctypes.c_void_p) for name in ("col_squares", "sums", "s")),
        ("threads", ctypes.c_int64),
    ]


def run(stacks: Sequence[Stack], runs: Runs | None, s: StepScalars, write: bool) -> Passed:
    """The pass over fp32 factors; as :func:`adapprox_ds.adapprox.kernels.tiles.run`."""
    units, held, outputs = 0, [], []
    packed = (_Stack * len(stacks))()
    for entry, stack in zip(packed, stacks, strict=True):
        chunks, operands, output = _pack(entry, stack, s, units)
        held.append(operands)
        outputs.append(output)
        units += len(stack.g) * chunks
    of_runs, of_squares = _pack_runs(runs)
    step = _Step(
        *(s.beta1, s.gain, s.beta2, 1.0 - s.beta2, *s.ahead, s.correction, s.eps, s.largest),
        *(1.0 - s.lr * s.weight_decay, s.rate((kept := _kept(stacks, runs)) > 0)),
        *(s.of_gradients, write, not write, kept, s.salt, *_formats(stacks, runs)),
        *(s.weight_salt is not None, s.weight_salt or 0, torch.get_num_threads()),
    )
    load(LIBRARY).one_pass(
        ctypes.byref(step),
        *(packed, ctypes.c_int64(len(stacks))),
        *(ctypes.c_void_p(of_runs.data_ptr()), ctypes.c_int64(len(of_runs))),
    )
    reduced = [
        Reduced(y, p[:, 0, :, : stack.cols], energies, squares.sum(1))
        for stack, (y, p, energies, squares, _) in zip(stacks, outputs, strict=True)
    ]
    return Passed(reduced, of_squares)


def sketches(past: Past, gram_u: Tensor, row_scale: Tensor) -> Sketches:
    """Weights, floor and sketches of a stack in one pass over its factors, fp32.

    Args:
        past: what they are made of.
        gram_u: U^T U, (B, k, k), fp64.
        row_scale: :attr:`Sketches.row_scale`, which is handed on.
    """
    q, u, width, tests = past.q, past.u, past.width, past.tests
    (blocks, rows, rank), cols = q.shape, u.shape[1]
    found = Sketches(
        x=q.new_empty(blocks, cols, width),
        z=q.new_empty(blocks, rows, tests),
        row_squares=q.new_empty(blocks, rows),
        col_squares=q.new_empty(blocks, cols),
        row_scale=row_scale,
        floor_rows=q.new_empty(blocks, rows) if past.floor else None,
        floor_cols=q.new_empty(blocks, cols) if past.floor else None,
    )
    given = [x.contiguous() for x in (q, u, past.gram_q, gram_u)]
    of_keys = [(ctypes.c_int64 * blocks)(*x) for x in past.keys]
    made = (found.x, found.z, found.row_squares, found.col_squares)
    packed = _Sketches(
        *(blocks, rows, cols, rank, width, tests, past.first, past.rows),
        *(x.data_ptr() for x in given),
        *(ctypes.cast(x, ctypes.c_void_p) for x in of_keys),
        *(None if x is None else x.data_ptr() for x in (*made, found.floor_rows, found.floor_cols)),
        *(past.floor, torch.get_num_threads()),
    )
    load(LIBRARY).sketches(ctypes.byref(packed))
    return found


def gram(a: Tensor, first: int) -> Tensor:
    """A^T A in fp64, (B, k, k), of (B, r, k) in fp32, from a row on."""
    blocks, rows, width = a.shape
    a = a.contiguous()
    sums = a.new_empty(blocks, width**2 + 1, dtype=torch.float64)
    packed = _Products(blocks, rows, width, 0, first, 0, 0, 0, 0)
    packed.y, packed.sums, packed.threads = a.data_ptr(), sums.data_ptr(), torch.get_num_threads()
    load(LIBRARY).products(ctypes.byref(packed))
    return sums[:, :-1].view(blocks, width, width)


def products(found: Found, row_squares: Tensor) -> tuple[Tensor, Tensor]:
    """The same as :func:`adapprox_ds.adapprox.algebra.products`, of fp32 sketches.

    Args:
        found: what a pass found.
        row_squares: D_r^2, (B, m), fp64.
    """
    y, z, p, col_squares = found.y, found.z, found.p, found.col_squares
    (blocks, rows, width), (_, tests, cols) = y.shape, p.shape
    if p.stride(2) != 1:
        p = p.contiguous()
    if col_squares.stride(1) != 1:
        col_squares = col_squares.contiguous()
    energies = found.energies.contiguous()
    given = (y.contiguous(), z.contiguous(), p, row_squares.contiguous(), energies)
    sums = energies.new_empty(blocks, width * (width + tests) + 1)
    s = energies.new_empty(blocks, tests, tests)
    packed = _Products(
        *(blocks, rows, width, tests, found.first, cols, *p.stride()[:2], col_squares.stride(0)),
        *(x.data_ptr() for x in (*given, col_squares, sums, s)),
        torch.get_num_threads(),
    )
    load(LIBRARY).products(ctypes.byref(packed))
    return sums, s


def _pack(entry: _Stack, stack: Stack, s: StepScalars, first_unit: int) -> tuple[int, Any, Any]:
    """Fill in an entry; returns its chunks a block, what it points to, and what a pass makes."""
    blocks, q, rank = len(stack.g), stack.q, stack.q.shape[2]
    width = 0 if stack.x is None else stack.x.shape[2]
    tests = 0 if stack.z is None else stack.z.shape[2]
    padded = _up(stack.cols, _PAD) + (_PAD if stack.skip else 0)

    # A chunk's projection is at most a sixteenth of the chunk, and all together are bounded.
    most = max(1, _PARTIALS // (blocks * max(tests, 1) * padded))
    chunk = max(_up(tests * 16, _ROWS), _up(-(-stack.rows // min(_CHUNKS, most)), _ROWS))
    chunks = -(-stack.rows // chunk)
    if stack.z is not None:
        stack.z = stack.z.contiguous()  # the pass writes to it what it rounds it to
    given = (q, stack.u, stack.floor_rows, stack.floor_cols, stack.col_squares)
    operands = [
        None if x is None else x.contiguous() for x in (*given, stack.x, stack.z, stack.clip)
    ]
    outputs = (
        q.new_empty(blocks, stack.rows, width),
        q.new_empty(blocks, chunks, tests, padded),
        q.new_empty(blocks, stack.rows, dtype=torch.float64),
        q.new_empty(blocks, chunks, dtype=torch.float64),
        q.new_empty(blocks, rank + (width if width <= _PAD else _up(width, _PAD)) + 2, padded),
    )
    # The tiles of a block's first moment lie end to end.
    means = None if stack.m is None else [tiles[0] for tiles in stack.m]
    rest = None if stack.compensation is None else addresses(stack.compensation)
    lists = [addresses(stack.g), *_mean_pointers(means), addresses(stack.w), rest]
    lists.append((ctypes.c_int64 * blocks)(*stack.first))
    sizes = (blocks, stack.rows, stack.cols, stack.skip, stack.missing, rank, width, tests)
    values: list[Any] = [
        *(*sizes, padded, chunk, first_unit),
        *(None if x is None else ctypes.cast(x, ctypes.c_void_p).value for x in lists),
        *(None if x is None else x.data_ptr() for x in (*operands, *outputs)),
    ]
    for field, value in zip(_Stack._fields_, values, strict=True):
        setattr(entry, field[0], value)
    return chunks, (operands, lists), outputs


def _pack_runs(runs: Runs | None) -> tuple[Tensor, Tensor]:
    """``struct Run`` of native.h of each, (R, 10) int64; and where sums of squares come, (R,)."""
    count = 0 if runs is None else len(runs.g)
    squares = torch.empty(count, dtype=torch.float64, device="cpu")
    if runs is None:
        return torch.empty(0, 10, dtype=torch.int64, device="cpu"), squares
    means, scales = _mean_addresses(runs.m) if runs.m is not None else ([0] * count, [0] * count)
    at = squares.data_ptr()
    clips: Any = repeat(0)
    if runs.clip is not None:
        clips = range(runs.clip.data_ptr(), runs.clip.data_ptr() + 4 * count, 4)
    columns = (
        [x.numel() for x in runs.g],
        runs.first,
        [x.data_ptr() for x in runs.g],
        means,
        scales,
        [x.data_ptr() for x in runs.w],
        [0] * count if runs.compensation is None else [x.data_ptr() for x in runs.compensation],
        [x.data_ptr() for x in runs.v],
        clips,
        range(at, at + 8 * count, 8),
    )
    return torch.tensor(list(zip(*columns, strict=False)), dtype=torch.int64, device="cpu"), squares


def _kept(stacks: Sequence[Stack], runs: Runs | None) -> int:
    """How first moments are kept: ``enum Kept`` of native.h."""
    means = [m for stack in stacks if stack.m is not None for m in stack.m[0][:1]]
    means += runs.m[:1] if runs is not None and runs.m is not None else []
    if not means:
        return 0
    (first, *_) = means
    if isinstance(first, QuantizedMatrix):
        return 3 if first.bits == 8 else 4
    return 2 if first.dtype == torch.bfloat16 else 1


def _formats(stacks: Sequence[Stack], runs: Runs | None) -> tuple[int, int]:
    """How gradients and weights are kept: ``enum Format`` of narrow.h."""
    one: Stack | Runs | None = stacks[0] if stacks else runs
    assert one is not None
    return FORMATS[one.g[0].dtype], FORMATS[one.w[0].dtype]


def _mean_addresses(means: Sequence[Mean]) -> tuple[list[int], list[int]]:
    """Where first moments lie, and the scales of codes."""
    codes = [m.codes if isinstance(m, QuantizedMatrix) else m for m in means]
    scales = [m.scales.data_ptr() if isinstance(m, QuantizedMatrix) else 0 for m in means]
    return [x.data_ptr() for x in codes], scales


def _mean_pointers(means: Sequence[Mean] | None) -> tuple[Any, Any]:
    if means is None:
        return None, None
    count = len(means)
    return tuple((ctypes.c_void_p * count)(*x) for x in _mean_addresses(means))  # type: ignore[return-value]


def _up(size: int, step: int) -> int:
    """The least multiple of ``step`` that holds ``size``."""
    return -(-size // step) * step
