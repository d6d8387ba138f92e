# SPDX-License-Identifier: Apache-2.0
"""The two passes over a matrix's elements that a tracking step makes; V is never written out.

There are three backends: C++ on CPUs, Triton on CUDA, and plain torch in tiles on any device. The
environment variable ``ADAPPROX_KERNELS`` chooses: ``auto`` (default: ``native`` on CPUs that have a
compiler, else ``torch``), ``native``, ``triton`` or ``torch``. Triton has to be asked for as long
as its kernels were run by Triton's interpreter alone. One rule, :func:`backend`, holds for both
passes. MicroAdam's step (windows.py) has the same three backends.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from adapprox_ds.kernels.interface import FirstPass, Means, SecondPass, StepScalars
from adapprox_ds.kernels.native_build import NativeUnavailableError, load

__all__ = [
    "FirstPass",
    "SecondPass",
    "StepScalars",
    "backend",
    "chosen",
    "first_pass",
    "second_pass",
]

_log = logging.getLogger(__name__)

VARIABLE = "ADAPPROX_KERNELS"
CHOICES = ("auto", "native", "triton", "torch")
#: The largest rank and sketch width that fused kernels take. Beyond it the matrix products are
#: most of the work, and those of plain torch are as good.
FUSED_LIMIT = 128
_MODULES = {"native": "native_passes", "triton": "triton_passes", "torch": "tiles"}


def first_pass(
    g: list[Tensor],
    q: Tensor,
    u: Tensor,
    sketch: Tensor,
    floor: Tensor | None,
    s: StepScalars,
) -> FirstPass:
    """Reduce over V and X on the chosen backend; see :func:`tiles.first_pass`."""
    module = import_module(f"{__name__}.{_MODULES[backend(g, None, q, sketch)]}")
    result: FirstPass = module.first_pass(g, q, u, sketch, floor, s)
    return result


def second_pass(
    w: list[Tensor],
    m: Means | None,
    g: list[Tensor],
    q: Tensor,
    u: Tensor,
    floor: Tensor | None,
    basis: Tensor,
    row_weights: Tensor,
    clip: Tensor,
    s: StepScalars,
) -> SecondPass:
    """Update weights and first moments on the chosen backend; see :func:`tiles.second_pass`."""
    module = import_module(f"{__name__}.{_MODULES[backend([*w, *g], m, q, basis)]}")
    result: SecondPass = module.second_pass(w, m, g, q, u, floor, basis, row_weights, clip, s)
    return result


def backend(elements: list[Tensor], m: Means | None, factors: Tensor, wide: Tensor) -> str:
    """Which backend takes a stack: "native", "triton" or "torch".

    Fused kernels take fp32 factors whose rank and width are at most :data:`FUSED_LIMIT`. Native
    ones take fp32 weights and gradients, and first moments in fp32, bf16 or codes; Triton's take
    any weights and gradients, and first moments in fp32 or fp16. All else goes to torch.

    Args:
        elements: the stack's weights and gradients.
        m: its first moments.
        factors: (B, m, k).
        wide: the sketches or bases, (B, ..., w).

    Raises:
        ValueError, RuntimeError: see :func:`chosen`.
    """
    choice = chosen(factors.device, "native")
    if choice == "torch":
        return "torch"
    fused = factors.dtype == torch.float32 and max(factors.shape[2], wide.shape[2]) <= FUSED_LIMIT
    mean = m[0].dtype if m and isinstance(m[0], Tensor) else torch.int8 if m else None
    if choice == "native":
        fused = fused and all(x.dtype == torch.float32 for x in elements)
        fused = fused and mean in (None, torch.float32, torch.bfloat16, torch.int8)
    else:
        fused = fused and mean in (None, torch.float32, torch.float16)
    return choice if fused else "torch"


def chosen(device: torch.device, library: str) -> str:
    """What the environment asks for on a device: "native", "triton" or "torch".

    Args:
        device: of the tensors.
        library: that "native" stands for.

    Raises:
        ValueError: the environment names no backend.
        RuntimeError: it names one that cannot run here; says why, and what to set.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in CHOICES:
        raise ValueError(f"{VARIABLE}={choice!r}: allowed are {', '.join(CHOICES)}")
    if choice == "auto":
        return "native" if device.type == "cpu" and _has_native(library) else "torch"
    missing = None if choice == "torch" else _missing(choice, device, library)
    if missing is not None:
        raise RuntimeError(f"{VARIABLE}={choice}, but {missing}; unset it, or set it to torch")
    return choice


@cache
def _has_native(library: str) -> bool:
    """Whether native kernels can be had; says so once where they cannot."""
    try:
        load(library)
    except NativeUnavailableError as error:
        _log.warning("steps on the CPU are in plain torch, at most half as fast: %s", error)
        return False
    return True


@cache
def _missing(choice: str, device: torch.device, library: str) -> str | None:
    """Why a backend's kernels cannot run on a device, or None."""
    if choice == "native":
        if device.type != "cpu":
            return f"its kernels run on CPUs and these tensors are on {device}"
        try:
            load(library)
        except NativeUnavailableError as error:
            return str(error)
        return None
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
