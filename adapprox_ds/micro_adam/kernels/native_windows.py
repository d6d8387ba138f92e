# SPDX-License-Identifier: Apache-2.0
"""MicroAdam's step on a batch of blocks in C++ on CPUs: packs pointers, calls windows.cpp."""

from __future__ import annotations

import ctypes
from itertools import chain
from pathlib import Path

import torch

from adapprox_ds.core.kernels.native_build import FORMATS, SHARED, Library, load
from adapprox_ds.micro_adam.step import Batch, StepScalars

LIBRARY = Library(
    "windows",
    (Path(__file__).with_name("windows.cpp"), SHARED / "narrow.h"),
    ("-ffp-contract=off",),  # every operation rounds, as in torch's
)
#: ``struct Rows`` of windows.cpp, by type.
_SIZES = ("rows", "width", "slots", "window", "group", "indices_step", "values_step", "threads")
_TENSORS = ("w", "g", "indices", "values", "codes", "low", "high", "outside", "surplus")
_PLACES = ("base", "first", "rest")
_WEIGHTS = ("mean_weights", "square_weights")
_NUMBERS = ("decay", "rate", "eps", "push", "kept")
_CHOICES = ("ascend", "grads", "weights", "at_random", "applies")


class _Rows(ctypes.Structure):
    """``struct Rows`` of windows.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_void_p) for name in chain(_TENSORS, _PLACES, _WEIGHTS)),
        ("row", ctypes.c_int64),
        *((name, ctypes.c_float) for name in _NUMBERS),
        *((name, ctypes.c_int32) for name in _CHOICES),
        ("weight_salt", ctypes.c_uint32),
    ]


def update(x: Batch, s: StepScalars) -> None:
    """Update weights, window and error; as :func:`adapprox_ds.micro_adam.step.update`.

    Which of entries of equal magnitude it takes is its own choice, by their places.

    Args:
        x: the blocks, or frames, of contiguous weights and gradients in fp32, bf16 or fp16 on the
            CPU; with an error in 4 bits.
        s: the step's numbers.
    """
    (rows, width), (window, _, slots), e = x.w.shape, x.indices.shape, x.error
    rows_ = [s.mean_weights, s.square_weights]
    weights = torch.tensor(rows_, dtype=torch.float32, device="cpu")
    tensors = (x.w, x.g, x.indices, x.values, e.codes, e.low, e.high, x.outside, x.surplus)
    places = (x.base, x.first, x.compensation)
    step = _Rows(
        *(rows, width, slots, window, x.group, x.indices.stride(0), x.values.stride(0)),
        torch.get_num_threads(),
        *(None if t is None else t.data_ptr() for t in (*tensors, *places)),
        *(row.data_ptr() for row in weights),
        s.row,
        *(1.0 - s.lr * s.weight_decay, -s.lr, s.eps, -s.lr * s.alpha, 1.0 - s.alpha),
        *(s.ascend, FORMATS[x.g.dtype], FORMATS[x.w.dtype], s.weight_salt is not None),
        *(s.alpha != 0.0, s.weight_salt or 0),
    )
    load(LIBRARY).window_step(ctypes.byref(step))
