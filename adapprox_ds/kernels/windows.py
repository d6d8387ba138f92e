# SPDX-License-Identifier: Apache-2.0
"""MicroAdam's step on a batch of blocks, on the backend that is asked for.

The environment variable is that of the package. ``triton`` takes what :func:`backend` says; under
``auto``, ``native`` and ``torch``, and for all else, it is plain torch, which runs on any device.
"""

from __future__ import annotations

from importlib import import_module

import torch

from adapprox_ds import kernels
from adapprox_ds.sparse import step
from adapprox_ds.sparse.step import Batch, StepScalars

#: Dtypes of weights and gradients whose step is one in fp32.
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def update(x: Batch, s: StepScalars) -> None:
    """Update weights, window and error; gradients are 0 afterwards.

    Raises:
        ValueError, RuntimeError: see :func:`backend`.
    """
    if backend(x) == "triton":
        import_module("adapprox_ds.kernels.window_passes").update(x, s)
    else:
        step.update(x, s)


def backend(x: Batch) -> str:
    """Which backend takes a batch: "triton" or "torch".

    Triton's kernels take whole blocks and frames alike, of contiguous weights and gradients in
    fp32, bf16 or fp16, whose error is kept in 4 bits.

    Raises:
        ValueError: the environment names no backend.
        RuntimeError: it names Triton, which cannot run here.
    """
    if kernels.asked() != "triton":
        return "torch"
    kernels.require("triton", x.w.device)
    fused = x.group > 0 and all(t.dtype in _FLOATS and t.is_contiguous() for t in (x.w, x.g))
    return "triton" if fused else "torch"
