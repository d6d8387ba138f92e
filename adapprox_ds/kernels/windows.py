# SPDX-License-Identifier: Apache-2.0
"""MicroAdam's step on a batch of blocks, on the backend that is asked for.

The environment variable is that of the package, and chooses alike: ``native`` is windows.cpp. What
:func:`backend` does not name goes to plain torch, which runs on any device.
"""

from __future__ import annotations

from importlib import import_module

import torch

from adapprox_ds import kernels
from adapprox_ds.sparse import step
from adapprox_ds.sparse.step import Batch, StepScalars

#: Dtypes of weights and gradients whose step is one in fp32, by backend.
_FLOATS = {
    "native": (torch.float32,),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}
_MODULES = {"native": "native_windows", "triton": "window_passes"}


def update(x: Batch, s: StepScalars) -> None:
    """Update weights, window and error.

    Raises:
        ValueError, RuntimeError: see :func:`backend`.
    """
    choice = backend(x)
    if choice == "torch":
        step.update(x, s)
    else:
        import_module(f"adapprox_ds.kernels.{_MODULES[choice]}").update(x, s)


def backend(x: Batch) -> str:
    """Which backend takes a batch: "native", "triton" or "torch".

    Fused kernels take whole blocks and frames alike, of contiguous weights and gradients whose
    error is kept in 4 bits: native ones in fp32, Triton's in fp32, bf16 or fp16.

    Raises:
        ValueError: the environment names no backend.
        RuntimeError: it names one that cannot run here.
    """
    choice = kernels.chosen(x.w.device, "windows")
    if choice == "torch":
        return "torch"
    kinds = _FLOATS[choice]
    fused = x.group > 0 and all(t.dtype in kinds and t.is_contiguous() for t in (x.w, x.g))
    return choice if fused else "torch"
