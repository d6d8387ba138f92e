# SPDX-License-Identifier: Apache-2.0
"""Rows of a first moment, in whatever form it is kept: read, and written back."""

from __future__ import annotations

import torch
from torch import Tensor

from adapprox_ds.lowrank.quantized import QuantizedMatrix
from adapprox_ds.lowrank.rounding import round_stochastically


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
