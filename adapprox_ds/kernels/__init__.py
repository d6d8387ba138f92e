# SPDX-License-Identifier: Apache-2.0
"""The one pass over a matrix's elements that a step makes; V is never written out.

There are three backends: C++ on CPUs, Triton on CUDA and ROCm, and plain torch in tiles on any
device. The environment variable ``ADAPPROX_KERNELS`` chooses: ``auto`` (default: ``native`` on CPUs
that have a compiler, ``triton`` where it can run and its kernels pass a self-check
(self_check.py), else ``torch``), ``native``, ``triton`` or ``torch``. MicroAdam's step
(windows.py) has the same three backends.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.kernels.interface import (
    Passed,
    Reduced,
    Runs,
    Sketches,
    Stack,
    StepScalars,
    elements,
)
from adapprox_ds.kernels.native_build import NativeUnavailableError, load
from adapprox_ds.lowrank.quantized import QuantizedMatrix

__all__ = [
    "Passed",
    "Reduced",
    "Runs",
    "Sketches",
    "Stack",
    "StepScalars",
    "automatic",
    "backend",
    "chosen",
    "is_forced",
    "largest_square",
    "run",
    "sketches",
]

_log = logging.getLogger(__name__)

VARIABLE = "ADAPPROX_KERNELS"
CHOICES = ("auto", "native", "triton", "torch")
#: The largest rank for which sketches are made by a kernel.
_SKETCHED_RANK = 32
#: The most columns of factors or sketches that Triton's kernel takes: what registers hold.
FUSED_LIMIT = 160
_MODULES = {"native": "native_pass", "triton": "triton_pass", "torch": "tiles"}


def run(stacks: Sequence[Stack], runs: Runs | None, s: StepScalars, write: bool) -> Passed:
    """One pass over the elements on the chosen backend; see :func:`tiles.run`."""
    if not stacks and runs is None:
        return Passed([], torch.zeros(0, dtype=torch.float64, device="cpu"))
    choice = backend(stacks, runs)
    if choice == "triton" and not is_forced():
        check = import_module(f"{__name__}.self_check")
        choice = "triton" if check.takes(stacks, runs, s, write) else "torch"
    module = import_module(f"{__name__}.{_MODULES[choice]}")
    passed: Passed = module.run(stacks, runs, s, write)
    return passed


def backend(stacks: Sequence[Stack], runs: Runs | None) -> str:
    """Which backend takes a pass: "native", "triton" (after its self-check) or "torch".

    Fused kernels take fp32 factors and dense second moments, and weights and gradients in fp32,
    bf16 or fp16. Native ones take weights all of one dtype, gradients and first moments likewise,
    these in fp32, bf16 or codes; Triton's take first moments in fp32, bf16, fp16 or codes, and no
    more columns of factors and sketches than :data:`FUSED_LIMIT`. All else goes to torch.

    Raises:
        ValueError, RuntimeError: see :func:`chosen`.
    """
    computed = [x.q for x in stacks] + (runs.v[:1] if runs is not None else [])
    choice = chosen(computed[0].device, "native")
    if choice == "torch":
        return "torch"
    fused = all(x.dtype == torch.float32 for x in computed)
    means = [m for x in stacks if x.m is not None for m in x.m[0][:1]]
    means += runs.m[:1] if runs is not None and runs.m is not None else []
    kept = {m.codes.dtype if isinstance(m, QuantizedMatrix) else m.dtype for m in means}
    codes = {torch.int8, torch.uint8}
    weights, grads = ({x.dtype for x in of} for of in elements(stacks, runs))
    floats = {torch.float32, torch.bfloat16, torch.float16}
    fused = fused and weights | grads <= floats
    if choice == "native":
        fused = fused and len(weights) <= 1 and len(grads) <= 1
        fused = fused and kept <= {torch.float32, torch.bfloat16, *codes} and len(kept) <= 1
    else:
        fused = fused and kept <= floats | codes
        wide = [x.shape[2] for y in stacks for x in (y.q, y.x, y.z) if x is not None]
        fused = fused and max(wide, default=0) <= FUSED_LIMIT
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
        return automatic(device, library)
    reason = None if choice == "torch" else missing(choice, device, library)
    if reason is not None:
        raise RuntimeError(f"{VARIABLE}={choice}, but {reason}; unset it, or set it to torch")
    return choice


def automatic(device: torch.device, library: str) -> str:
    """What a device gets where nothing is asked for; Triton's kernels are still to be checked."""
    if device.type == "cpu":
        return "native" if _has_native(library) else "torch"
    return "torch" if missing("triton", device, library) else "triton"


def is_forced() -> bool:
    """Whether the environment names a backend, which then is not checked and gives no other."""
    return os.environ.get(VARIABLE, "auto") != "auto"


def sketches(q: Tensor, *arguments: Any) -> Sketches | None:
    """Weights, floor and sketches by one kernel; None where there is none for such factors.

    See :func:`native_pass.sketches`. Beyond rank ``_SKETCHED_RANK`` matrix products are most of
    the work, and torch's are faster.
    """
    plain = q.dtype == torch.float32 and q.shape[2] <= _SKETCHED_RANK
    if not plain or chosen(q.device, "native") != "native":
        return None
    found: Sketches = import_module(f"{__name__}.native_pass").sketches(q, *arguments)
    return found


def largest_square(tensors: Sequence[Tensor]) -> float | None:
    """The largest sum of squares of contiguous tensors; None where there is no kernel for it."""
    floats = (torch.float32, torch.bfloat16, torch.float16)
    plain = all(x.device.type == "cpu" and x.dtype == tensors[0].dtype for x in tensors)
    if (
        not tensors
        or not plain
        or tensors[0].dtype not in floats
        or chosen(tensors[0].device, "native") != "native"
    ):
        return None
    found: float = import_module(f"{__name__}.native_pass").largest_square(tensors)
    return found


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
def missing(choice: str, device: torch.device, library: str) -> str | None:
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
        import_module(f"{__name__}.triton_pass")
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return None
