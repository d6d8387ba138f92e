# SPDX-License-Identifier: Apache-2.0
"""Tables from which the programs of a launch read what they work on; see triton_kernels.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.adapprox.kernels.triton_kernels import sum_kernel

#: The tile of sums.
_SUM = {"ROWS": 32, "COLS": 64}


def up(count: int, size: int) -> int:
    """How many parts of a size hold so many. Triton's own function takes the host far longer."""
    return -(-count // size)


class Table:
    """Rows of int64, each behind the number of the first program that works on it."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, ...]] = []
        self.counts: list[int] = []
        self.programs = 0

    def add(self, programs: int, *fields: int) -> None:
        """Add a row that so many programs work on."""
        self.rows.append((self.programs, *fields))
        self.counts.append(programs)
        self.programs += programs

    def add_sum(
        self, at: int, to: Tensor, count: int, numel: int, inner: int = 0, outer: int = 0
    ) -> None:
        """Add partial results, (count, numel), whose sums are added to those of a tensor.

        Args:
            at: the address of the partial results.
            to: the tensor, fp32 or fp64, from the first number on.
            count: how many partial results there are.
            numel: how many numbers each has.
            inner: the numbers lie in parts of so many; 0 for one part.
            outer: each part lies so many numbers behind the one before.
        """
        if count * numel:
            wide = int(to.dtype == torch.float64)
            fields = (count, numel, inner or numel, outer, at, to.data_ptr(), wide)
            self.add(up(numel, _SUM["COLS"]), *fields)

    @property
    def tensors(self) -> list[Tensor]:
        """The rows, and for each program the number of its row."""
        rows, counts = (
            torch.tensor(x, dtype=torch.int64, device="cpu") for x in (self.rows, self.counts)
        )
        numbers = torch.arange(len(rows), dtype=torch.int64, device="cpu")
        return [rows, numbers.repeat_interleave(counts)]


def send(
    device: torch.device, *tables: Tensor, more: Sequence[int] | Sequence[tuple[int, ...]] = ()
) -> list[Tensor]:
    """Copy tables to a device, all in one copy; ``more`` numbers are the last of them."""
    tables = (*tables, torch.tensor(more, dtype=torch.int64, device="cpu"))
    host = torch.cat([x.flatten() for x in tables])
    if device.type == "cuda":
        # From pinned memory, so that the host does not wait for the device to come to this copy.
        host = host.pin_memory()
    return list(host.to(device, non_blocking=True).split([x.numel() for x in tables]))


def zeros_of(like: Tensor, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Zeros of several shapes on the device of ``like``, by one launch."""
    sizes = [math.prod(shape) for shape in shapes]
    parts = like.new_zeros(sum(sizes), dtype=dtype).split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def add_up(sums: Table, sent: Sequence[Tensor], kind: Any) -> None:
    """Add partial results in the dtype ``kind`` to their totals."""
    if sums.programs:
        sum_kernel[(sums.programs,)](*sent, KIND=kind, **_SUM)
