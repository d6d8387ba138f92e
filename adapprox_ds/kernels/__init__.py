# SPDX-License-Identifier: Apache-2.0
"""The two passes over a matrix's elements that a tracking step makes; V is never written out.

There are two backends: plain torch in tiles, on any device, and Triton on CUDA. The environment
variable ``ADAPPROX_KERNELS`` chooses: ``torch`` (default) or ``triton``, which has to be asked for
as long as its kernels were run by Triton's interpreter alone. One rule, :func:`backend`, holds for
both passes.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from adapprox_ds.kernels import tiles
from adapprox_ds.kernels.interface import FirstPass, SecondPass, StepScalars

__all__ = ["FirstPass", "SecondPass", "StepScalars", "backend", "first_pass", "second_pass"]

VARIABLE = "ADAPPROX_KERNELS"
CHOICES = ("torch", "triton")
#: The largest rank and sketch width that the Triton kernels hold in registers. Beyond it the
#: matrix products are most of the work, and those of plain torch are as good.
FUSED_LIMIT = 128


def first_pass(
    g: Tensor, q: Tensor, u: Tensor, sketch: Tensor, floor: Tensor | None, s: StepScalars
) -> FirstPass:
    """Reduce over V and X on the chosen backend; see :func:`tiles.first_pass`."""
    return _module(g, q, sketch).first_pass(g, q, u, sketch, floor, s)


def second_pass(
    w: Tensor,
    m: Tensor | None,
    g: Tensor,
    q: Tensor,
    u: Tensor,
    floor: Tensor | None,
    basis: Tensor,
    row_weights: Tensor,
    clip: Tensor,
    s: StepScalars,
) -> SecondPass:
    """Update weights and first moment on the chosen backend; see :func:`tiles.second_pass`."""
    run = _module(g, q, basis).second_pass
    return run(w, m, g, q, u, floor, basis, row_weights, clip, s)


def backend(device: torch.device, dtype: torch.dtype, rank: int, width: int) -> str:
    """Which backend takes a block: "torch" or "triton".

    Triton, where it is asked for, takes fp32 factors whose rank and width are at most
    :data:`FUSED_LIMIT`; all else goes to torch.

    Args:
        device: of the block.
        dtype: of its factors.
        rank: of its factors.
        width: of the sketch, or the basis.

    Raises:
        ValueError: the environment names no backend.
        RuntimeError: it names one that cannot run on this device.
    """
    choice = os.environ.get(VARIABLE, "torch")
    if choice not in CHOICES:
        raise ValueError(f"{VARIABLE}={choice!r}: allowed are {', '.join(CHOICES)}")
    if choice == "torch":
        return "torch"
    missing = _missing(device)
    if missing is not None:
        raise RuntimeError(f"{VARIABLE}=triton, but {missing}; unset it, or set it to torch")
    fused = dtype == torch.float32 and max(rank, width) <= FUSED_LIMIT
    return "triton" if fused else "torch"


def _module(g: Tensor, q: Tensor, wide: Tensor) -> ModuleType:
    if backend(g.device, q.dtype, q.shape[1], wide.shape[1]) == "torch":
        return tiles
    from adapprox_ds.kernels import triton_passes

    return triton_passes


@cache
def _missing(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device, or None."""
    # Triton's interpreter, for tests: chosen by this variable when Triton is imported.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and device.type == "cpu"
    if device.type != "cuda" and not interpreted:
        return f"its kernels run on CUDA devices and these tensors are on {device}"
    if not interpreted and torch.cuda.get_device_capability(device) < (8, 0):
        return f"its kernels need compute capability 8.0 and {device} has less"
    try:
        import_module(f"{__name__}.triton_passes")
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return None
