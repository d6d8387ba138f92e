# SPDX-License-Identifier: Apache-2.0
"""The pass in C++ on CPUs: packs operands, calls native.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from adapprox_ds.kernels.interface import Mean, Passed, Reduced, Runs, Stack, StepScalars
from adapprox_ds.kernels.native_build import load
from adapprox_ds.lowrank.quantized import QuantizedMatrix

#: As in native.h: columns of packed operands, rows of a tile.
_PAD, _ROWS = 32, 8
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
        ("threads", ctypes.c_int32),
    ]


class _Stack(ctypes.Structure):
    """``struct Stack`` of native.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("blocks", "rows", "cols", "skip", "missing")),
        *((name, ctypes.c_int64) for name in ("rank", "width", "tests", "padded")),
        *((name, ctypes.c_int64) for name in ("chunk", "first_unit")),
        *((name, ctypes.c_void_p) for name in ("g", "m", "scales", "w", "first", "q", "ut")),
        *((name, ctypes.c_void_p) for name in ("floor_rows", "floor_cols", "energies")),
        *((name, ctypes.c_void_p) for name in ("xt", "z", "clip", "y", "p")),
        *((name, ctypes.c_void_p) for name in ("row_energies", "squares")),
    ]


def run(stacks: Sequence[Stack], runs: Runs | None, s: StepScalars, write: bool) -> Passed:
    """The pass over fp32 weights and gradients; as :func:`adapprox_ds.kernels.tiles.run`."""
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
        *(s.of_gradients, write, not write, kept, s.salt, torch.get_num_threads()),
    )
    load("native").one_pass(
        ctypes.byref(step),
        *(packed, ctypes.c_int64(len(stacks))),
        *(ctypes.c_void_p(of_runs.data_ptr()), ctypes.c_int64(len(of_runs))),
    )
    reduced = [
        Reduced(y, p[:, 0, :, : stack.cols], energies, squares.sum(1))
        for stack, (y, p, energies, squares) in zip(stacks, outputs, strict=True)
    ]
    return Passed(reduced, of_squares)


def sum_of_squares(tensors: Sequence[Tensor]) -> float:
    """Of contiguous fp32 tensors; not finite where one of them, or the sum, is not."""
    call = load("native").sum_of_squares
    call.restype = ctypes.c_double
    numels = (ctypes.c_int64 * len(tensors))(*(x.numel() for x in tensors))
    count, threads = ctypes.c_int64(len(tensors)), ctypes.c_int32(torch.get_num_threads())
    return float(call(_pointers(tensors), numels, count, threads))


def _pack(entry: _Stack, stack: Stack, s: StepScalars, first_unit: int) -> tuple[int, Any, Any]:
    """Fill in an entry; returns its chunks a block, what it points to, and what a pass makes."""
    blocks, q, rank = len(stack.g), stack.q, stack.q.shape[2]
    width = 0 if stack.x is None else stack.x.shape[2]
    tests = 0 if stack.z is None else stack.z.shape[2]
    padded = _up(stack.cols, _PAD) + (_PAD if stack.skip else 0)

    def columns(x: Tensor) -> Tensor:
        return pad(x, (0, padded - stack.cols)).contiguous()

    # A chunk's projection is at most a sixteenth of the chunk, and all together are bounded.
    most = max(1, _PARTIALS // (blocks * max(tests, 1) * padded))
    chunk = max(_up(tests * 16, _ROWS), _up(-(-stack.rows // min(_CHUNKS, most)), _ROWS))
    chunks = -(-stack.rows // chunk)
    floor_rows, floor_cols = stack.floor_rows, q.new_zeros(blocks, padded)
    if stack.floor_cols is not None:
        floor_cols = columns(stack.floor_cols * s.beta2**0.5)
    # (sqrt(beta_2) S)^2 = beta_2 S^2
    operands = [
        q.contiguous(),
        columns(stack.u.mT * s.beta2**0.5),
        None if floor_rows is None else floor_rows.contiguous(),
        floor_cols,
        columns(stack.col_squares),
        None if stack.x is None else columns(stack.x.mT),
        None if stack.z is None else stack.z.contiguous(),
        None if stack.clip is None else stack.clip.contiguous(),
    ]
    outputs = (
        q.new_empty(blocks, stack.rows, width),
        q.new_empty(blocks, chunks, tests, padded),
        q.new_empty(blocks, stack.rows, dtype=torch.float64),
        q.new_empty(blocks, chunks, dtype=torch.float64),
    )
    # The tiles of a block's first moment lie end to end.
    means = None if stack.m is None else [tiles[0] for tiles in stack.m]
    lists = [_pointers(stack.g), *_mean_pointers(means), _pointers(stack.w)]
    lists.append((ctypes.c_int64 * blocks)(*stack.first))
    sizes = (blocks, stack.rows, stack.cols, stack.skip, stack.missing, rank, width, tests)
    values = [
        *(*sizes, padded, chunk, first_unit),
        *(None if x is None else ctypes.cast(x, ctypes.c_void_p).value for x in lists),
        *(None if x is None else x.data_ptr() for x in (*operands, *outputs)),
    ]
    for field, value in zip(_Stack._fields_, values, strict=True):
        setattr(entry, field[0], value)
    return chunks, (operands, lists), outputs


def _pack_runs(runs: Runs | None) -> tuple[Tensor, Tensor]:
    """``struct Run`` of native.h of each, (R, 9) int64; and where sums of squares come, (R,)."""
    count = 0 if runs is None else len(runs.g)
    squares = torch.empty(count, dtype=torch.float64)
    if runs is None:
        return torch.empty(0, 9, dtype=torch.int64), squares
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
        [x.data_ptr() for x in runs.v],
        clips,
        range(at, at + 8 * count, 8),
    )
    return torch.tensor(list(zip(*columns, strict=False)), dtype=torch.int64), squares


def _kept(stacks: Sequence[Stack], runs: Runs | None) -> int:
    """How first moments are kept: ``enum Kept`` of native.h."""
    means = [m for stack in stacks if stack.m is not None for m in stack.m[0][:1]]
    means += runs.m[:1] if runs is not None and runs.m is not None else []
    if not means:
        return 0
    (first, *_) = means
    return 3 if isinstance(first, QuantizedMatrix) else 2 if first.dtype == torch.bfloat16 else 1


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


def _pointers(tensors: Sequence[Tensor]) -> Any:
    """A C array of the tensors' addresses."""
    return (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))


def _up(size: int, step: int) -> int:
    """The least multiple of ``step`` that holds ``size``."""
    return -(-size // step) * step
