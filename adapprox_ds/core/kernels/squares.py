# SPDX-License-Identifier: Apache-2.0
"""Sums of squares of gradients in C++ on CPUs: one pass that says whether all are finite."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from adapprox_ds.core.kernels.backends import chosen
from adapprox_ds.core.kernels.native_build import FORMATS, SHARED, Library, addresses, load

LIBRARY = Library(
    "squares", tuple(SHARED / name for name in ("squares.cpp", "narrow.h", "vectors.h"))
)


def largest_square(tensors: Sequence[Tensor]) -> float | None:
    """The largest sum of squares of contiguous tensors, not finite if an element is not.

    Returns:
        The sum; None where there is no kernel for such tensors.
    """
    kinds = {(x.device.type, x.dtype) for x in tensors}
    if len(kinds) != 1 or tensors[0].device.type != "cpu" or tensors[0].dtype not in FORMATS:
        return None
    if chosen(tensors[0].device, LIBRARY) != "native":
        return None
    call = load(LIBRARY).largest_square
    call.restype = ctypes.c_double
    numels = (ctypes.c_int64 * len(tensors))(*(x.numel() for x in tensors))
    count, threads = ctypes.c_int64(len(tensors)), ctypes.c_int32(torch.get_num_threads())
    format_ = ctypes.c_int32(FORMATS[tensors[0].dtype])
    return float(call(addresses(tensors), numels, count, format_, threads))
