# SPDX-License-Identifier: Apache-2.0
"""What Triton's kernels load and store, byte by byte, in its interpreter. Run by cases_kernels.py.

Loads and stores are watched by their addresses. Where tensors are larger than any memory, they are
not carried out: what is loaded is 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from adapprox_ds.adapprox.kernels.interface import Runs, Stack, StepScalars
from adapprox_ds.adapprox.quantized import QuantizedMatrix, group_count

FULL, BRAIN, CODES = torch.float32, torch.bfloat16, torch.int8


class Places:
    """Loads and stores by what lies at their addresses.

    Attributes:
        spans: name -> (first, end) addresses.
        loaded, stored: name -> bytes.
        touched: name -> lowest and highest address + 1 of what was loaded or stored.
    """

    def __init__(self, spans: dict[str, tuple[int, int]], carry_out: bool) -> None:
        self.spans, self.carry_out = spans, carry_out
        self.loaded: Counter[str] = Counter()
        self.stored: Counter[str] = Counter()
        self.touched: dict[str, tuple[int, int]] = {}

    def note(self, ptrs: Any, mask: Any, into: Counter[str]) -> bool:
        """Count; returns whether it was of a table, by which programs find all else."""
        kind = ptrs.get_element_ty()
        at = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)].astype(np.uint64)
        if not len(at):
            return str(kind) == "int64"
        size = max(1, kind.primitive_bitwidth // 8)
        first, end = int(at.min()), int(at.max()) + size
        name = "tables" if str(kind) == "int64" else "partial"
        for of, (begin, stop) in self.spans.items():
            if begin <= first < stop:
                name = of
                assert end <= stop, f"{of}: {end - stop} bytes behind its end"
        into[name] += size * len(at)
        before = self.touched.get(name, (first, end))
        self.touched[name] = (min(first, before[0]), max(end, before[1]))
        return name == "tables"


@contextmanager
def watched(spans: dict[str, tuple[int, int]], carry_out: bool = True) -> Iterator[Places]:
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

    places = Places(spans, carry_out)
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def watched_load(self: Any, ptrs: Any, mask: Any, *others: Any) -> Any:
        if places.note(ptrs, mask, places.loaded) or carry_out:
            return load(self, ptrs, mask, *others)
        kind = ptrs.get_element_ty()
        return TensorHandle(np.zeros(ptrs.data.shape, _get_np_dtype(kind)), kind)

    def watched_store(self: Any, ptrs: Any, value: Any, mask: Any, *others: Any) -> Any:
        places.note(ptrs, mask, places.stored)
        return store(self, ptrs, value, mask, *others) if carry_out else None

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", watched_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", watched_store),
    ):
        yield places


def scalars(mean: bool = True) -> StepScalars:
    return StepScalars(
        0.9 if mean else 0.0, 0.9, 1.0, 1.0, 1e-3, 0.1, 0.1, False, True, True, salt=7
    )


def span(x: Tensor, numel: int | None = None) -> tuple[int, int]:
    """Addresses of a tensor that has, or passes for one that has, so many elements."""
    return x.data_ptr(), x.data_ptr() + x.itemsize * (x.numel() if numel is None else numel)


def check_bytes(kind: torch.dtype, floor: int) -> None:
    """Each element is moved once: 20 bytes in fp32, 16 and 14 with less of a first moment.

    Of all else as much as tiles, walks and chunks of rows make of it.
    """
    from adapprox_ds.adapprox.kernels import triton_pass
    from adapprox_ds.adapprox.kernels.forms import _stack

    k, width, tests = 8, 10, 16
    # Walks are short, for the interpreter.
    walk = max(64, triton_pass.tile_of(kind == CODES)["COLS"])
    cols = walk + 22
    stack = _stack((k, width, tests), cols, FULL, FULL, kind, torch.device("cpu"))
    rows, numel = stack.rows, stack.rows * cols
    assert stack.m is not None and stack.x is not None and stack.z is not None
    assert stack.floor_rows is not None and stack.floor_cols is not None and stack.clip is not None
    (mean,) = stack.m[0]
    own = {"w": stack.w[0], "g": stack.g[0]}
    if isinstance(mean, QuantizedMatrix):
        own |= {"m": mean.codes, "scales": mean.scales}
    else:
        own["m"] = mean
    operands = {"q": stack.q, "u": stack.u, "x": stack.x, "z": stack.z, "clip": stack.clip}
    operands |= {"energies": stack.col_squares, "floor rows": stack.floor_rows}
    operands["floor cols"] = stack.floor_cols
    made: list[Any] = []
    outputs = triton_pass._outputs

    def noted(of: list[Stack]) -> Any:
        made.extend(outputs(of))
        for name, x in (("y", made[0].y), ("p", made[0].p), ("row energies", made[0].row_energies)):
            places.spans[name] = span(x)
        return made

    with (
        watched({name: span(x) for name, x in (own | operands).items()}) as places,
        mock.patch.multiple(triton_pass, _outputs=noted, _WALK=walk),
    ):
        triton_pass.run([stack], None, scalars(), True)
    loaded, stored = places.loaded, places.stored
    moved = sum(loaded[x] + stored[x] for x in ("w", "g", "m"))
    assert moved == floor * numel, moved / numel
    scales = 4 * rows * group_count(cols) if kind == CODES else 0
    assert loaded["scales"] == stored["scales"] == scales
    tile = triton_pass.tile_of(kind == CODES)
    chunks, across = -(-rows // tile["ROWS"]), -(-cols // tile["COLS"])
    walks = -(-cols // walk)
    assert loaded["q"] == 4 * rows * k * across and loaded["u"] == 4 * cols * k * chunks
    assert loaded["x"] == 4 * cols * width * chunks and loaded["z"] == 4 * rows * tests * across
    assert loaded["energies"] == loaded["floor cols"] == 4 * cols * chunks
    assert loaded["floor rows"] == 4 * rows * walks and loaded["clip"] == 4 * chunks * walks
    partial_sums = 4 * (rows * width * walks + tests * cols * chunks + rows * walks)
    assert stored["partial"] == loaded["partial"] == partial_sums
    for name, size in (
        ("y", 4 * rows * width),
        ("p", 4 * tests * cols),
        ("row energies", 8 * rows),
    ):
        assert loaded[name] == stored[name] == size
    assert not any(stored[name] for name in (*operands, "g", "tables"))


#: Of a launch whose last programs alone are run, how many.
LAST = 2


class LastPrograms:
    """In place of a kernel: the last programs of each launch of it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int]) -> Any:
        import triton.language as tl
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        count = min(LAST, grid[0])

        def program_id(builder: Any, axis: int) -> Any:
            number = builder.grid_idx[axis] + grid[0] - count
            return TensorHandle(np.array([number], dtype=np.int32), tl.int32)

        def launch(*given: Any, **constants: Any) -> None:
            with mock.patch.object(InterpreterBuilder, "create_get_program_id", program_id):
                self.kernel[(count,)](*given, **constants)

        return launch


def virtual(*shape: int, dtype: torch.dtype = FULL) -> Tensor:
    """A tensor of one element that passes for one of many."""
    return torch.zeros(1, dtype=dtype).expand(shape)


@contextmanager
def far(spans: dict[str, tuple[int, int]]) -> Iterator[tuple[Places, dict[str, int]]]:
    """Virtual tensors at addresses of their own, which nobody reads; and where each ends."""
    sizes = [(name, first, end - first) for name, (first, end) in spans.items()]
    apart = {name: (i << 44, (i << 44) + size) for i, (name, _, size) in enumerate(sizes, 1)}
    firsts = {first: apart[name][0] for name, first, _ in sizes}
    data_ptr = Tensor.data_ptr

    def address(x: Tensor) -> int:
        real = data_ptr(x)
        return firsts.get(real, real)

    with (
        watched(apart, carry_out=False) as places,
        mock.patch.object(Tensor, "contiguous", lambda x: x),
        mock.patch.object(Tensor, "data_ptr", address),
    ):
        yield places, {name: end for name, (_, end) in apart.items()}


def check_far(rows: int, cols: int, kind: torch.dtype, long: bool) -> None:
    """The last program of a block of more than 2^31 elements touches the last of each tensor."""
    from adapprox_ds.adapprox.kernels import triton_pass

    numel, k = rows * cols, 2
    assert numel > 1 << 31
    groups = group_count(cols)
    if kind == CODES:
        mean: Any = QuantizedMatrix(virtual(rows, cols, dtype=CODES), virtual(rows, groups), cols)
        kept = {"m": span(mean.codes, numel), "scales": span(mean.scales, rows * groups)}
    else:
        mean = virtual(rows, cols, dtype=kind)
        kept = {"m": span(mean, numel)}
    w, g = virtual(numel), virtual(numel)
    stack = Stack(
        rows, cols, 0, 0, [w], [[mean]], [g], [0],
        q=virtual(1, rows, k), u=virtual(1, cols, k), floor_rows=None, floor_cols=None,
        col_squares=virtual(1, cols),
    )  # fmt: skip
    assert triton_pass.is_long(stack) == long
    spans = {"w": span(w, numel), "g": span(g, numel), **kept}
    spans |= {"q": span(stack.q, rows * k), "u": span(stack.u, cols * k)}
    spans["energies"] = span(stack.col_squares, cols)
    kernel = LastPrograms(triton_pass.pass_kernel)
    # Of the sums, which have no tile, places are in 64 bits, and there are as many as rows.
    own = {"pass_kernel": kernel, "add_up": lambda *_: None}
    with far(spans) as (places, ends), mock.patch.multiple(triton_pass, **own):
        triton_pass.run([stack], None, scalars(), True)
    assert {name: places.touched[name][1] for name in spans} == ends
    # And what is touched is no more than those programs' rows and columns.
    tile = triton_pass.tile_of(kind == CODES)
    size = LAST * tile["ROWS"] * triton_pass._WALK
    assert 0 < places.loaded["w"] == places.stored["w"] <= 4 * size


def check_far_runs() -> None:
    """A run of more than 2^31 elements."""
    from adapprox_ds.adapprox.kernels import triton_pass

    numel = (1 << 31) + 12345
    w, g, v, m = (virtual(numel) for _ in range(4))
    runs = Runs([w], [m[None]], [g], [v], [0])
    spans = {name: span(x, numel) for name, x in {"w": w, "g": g, "v": v, "m": m}.items()}
    kernel = LastPrograms(triton_pass.run_kernel)
    with far(spans) as (places, ends), mock.patch.object(triton_pass, "run_kernel", kernel):
        triton_pass.run([], runs, scalars(), True)
    assert {name: places.touched[name][1] for name in spans} == ends


CHECKS: dict[str, Callable[[], None]] = {
    **{
        f"bytes, first moment {name}": partial(check_bytes, kind, floor)
        for name, kind, floor in (("fp32", FULL, 20), ("bf16", BRAIN, 16), ("codes", CODES, 14))
    },
    # Many rows; and rows of which a program's need 64 bits.
    "far rows": partial(check_far, (1 << 21) + 70, 1100, FULL, False),
    "far rows of codes": partial(check_far, (1 << 21) + 70, 1100, CODES, False),
    "far columns": partial(check_far, 64, (1 << 25) + 70, BRAIN, True),
    "far runs": check_far_runs,
}
