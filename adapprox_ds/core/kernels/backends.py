# SPDX-License-Identifier: Apache-2.0
"""Which backend takes a step: C++ on CPUs, Triton on CUDA and ROCm, or plain torch on any device.

The environment variable ``ADAPPROX_KERNELS`` chooses for all optimizers: ``auto`` (default:
``native`` on CPUs that have a compiler, ``triton`` where it can run and its kernels pass a
self-check (self_check.py), else ``torch``), ``native``, ``triton`` or ``torch``.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib import import_module

import torch

from adapprox_ds.core.kernels.native_build import Library, NativeUnavailableError, load

_log = logging.getLogger(__name__)

VARIABLE = "ADAPPROX_KERNELS"
CHOICES = ("auto", "native", "triton", "torch")

#: Elements of a tile. On a CPU large enough for torch's threads to share each operation and small
#: enough for their caches (2^19 was the best of 2^16 to 2^21 on 2 cores, and better than threads
#: that run whole tiles); elsewhere launches are the cost and a tile may take 16 MB.
_CPU_TILE, _DEVICE_TILE = 1 << 19, 1 << 22


def chosen(device: torch.device, library: Library) -> str:
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


def automatic(device: torch.device, library: Library) -> str:
    """What a device gets where nothing is asked for; Triton's kernels are still to be checked."""
    if device.type == "cpu":
        return "native" if _has_native(library) else "torch"
    return "torch" if missing("triton", device, library) else "triton"


def is_forced() -> bool:
    """Whether the environment names a backend, which then is not checked and gives no other."""
    return os.environ.get(VARIABLE, "auto") != "auto"


def tile_elements(device: torch.device) -> int:
    """Elements of a tile on a device."""
    return _CPU_TILE if device.type == "cpu" else _DEVICE_TILE


@cache
def _has_native(library: Library) -> bool:
    """Whether native kernels can be had; says so once where they cannot."""
    try:
        load(library)
    except NativeUnavailableError as error:
        _log.warning("steps on the CPU are in plain torch, at most half as fast: %s", error)
        return False
    return True


@cache
def missing(choice: str, device: torch.device, library: Library) -> str | None:
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
        import_module("adapprox_ds.core.kernels.triton_weights")
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return None
