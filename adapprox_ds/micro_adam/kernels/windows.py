# SPDX-License-Identifier: Apache-2.0
"""MicroAdam's step on a batch of blocks, on the backend that is asked for.

The environment variable is that of the package, and chooses alike: ``native`` is windows.cpp. What
:func:`backend` does not name goes to plain torch, which runs on any device.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import torch

from adapprox_ds.core.kernels import self_check
from adapprox_ds.core.kernels.backends import chosen, is_forced
from adapprox_ds.micro_adam import step
from adapprox_ds.micro_adam.feedback import ErrorRows
from adapprox_ds.micro_adam.kernels import native_windows
from adapprox_ds.micro_adam.quantize import dequantize, quantize
from adapprox_ds.micro_adam.step import Batch, StepScalars

#: Dtypes of weights and gradients whose step is one in fp32.
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def update(x: Batch, s: StepScalars) -> None:
    """Update weights, window and error.

    Raises:
        ValueError, RuntimeError: see :func:`backend`.
    """
    choice = backend(x)
    if choice == "triton" and not is_forced() and not takes(x, s):
        choice = "torch"
    if choice == "torch":
        step.update(x, s)
    elif choice == "native":
        native_windows.update(x, s)
    else:
        import_module("adapprox_ds.micro_adam.kernels.window_passes").update(x, s)


def takes(x: Batch, s: StepScalars) -> bool:
    """Whether Triton's kernels for such a batch pass the self-check of core/kernels."""
    window, slots = x.indices.shape[0], x.indices.shape[2]
    # What is compiled apart; widths and slots are numbers to a kernel.
    tile = import_module("adapprox_ds.micro_adam.kernels.window_passes").rows_of(slots)["SLOTS"]
    rounded = "nearest" if s.weight_salt is None else "at random"
    kinds = (x.g.dtype, x.w.dtype, rounded, "group", x.group, "slots", tile)
    names = ("outside", "surplus", "base", "first", "compensation")
    optional = [name for name in names if getattr(x, name) is not None]
    optional += ["alpha"] if s.alpha else []

    def compare() -> str | None:
        found, wanted = _example(x), _example(x)
        alpha = 0.25 if s.alpha else 0.0
        sure = replace(s, lr=0.5, weight_decay=0.1, eps=1e-3, row=0, alpha=alpha)
        sure = replace(sure, mean_weights=(0.3,) * window, square_weights=(0.2,) * window)
        import_module("adapprox_ds.micro_adam.kernels.window_passes").update(found, sure)
        step.update(wanted, sure)
        return self_check.differing(_results(found), _results(wanted))

    form = (str(x.w.device), "windows", *kinds, *optional, "ascends" if s.ascend else "descends")
    return self_check.is_right(form, compare)


def _example(like: Batch) -> Batch:
    """A few rows of random numbers in a batch's form, always the same."""
    rows, width = like.w[:3].shape
    window, _, slots = like.indices.shape
    random, device = torch.Generator("cpu").manual_seed(0), like.w.device

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, device="cpu", dtype=torch.float32)

    def part(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x[:rows].clone()

    outside, base = part(like.outside), part(like.base)
    # Places are told apart in each row, as those of the largest entries are.
    places = make(window, rows, max(width, slots)).argsort(-1)[..., :slots]
    values = torch.where(places < width, make(window, rows, slots), 0.0)
    places = places.clamp(max=width - 1).to(device)
    if base is not None:
        places = places + base
    error = quantize((0.1 * make(rows, width)).to(device), like.group, outside)
    return Batch(
        w=make(rows, width).to(device, like.w.dtype),
        g=make(rows, width).to(device, like.g.dtype),
        indices=places.to(torch.int16),
        values=values.to(device, torch.bfloat16),
        error=ErrorRows(*error),
        group=like.group,
        outside=outside,
        surplus=part(like.surplus),
        base=base,
        first=part(like.first),
        compensation=part(like.compensation),
    )


def _results(x: Batch) -> dict[str, torch.Tensor]:
    """What a step has written, the error in numbers."""
    error = dequantize(x.error.codes, x.error.low, x.error.high, x.group, torch.float32)
    # Of 4 bits, a code may be a neighbour's.
    return {"weights": x.w, "window": x.values, "error": error.bfloat16()}


def backend(x: Batch) -> str:
    """Which backend takes a batch: "native", "triton" or "torch".

    Fused kernels take whole blocks and frames alike, of contiguous weights and gradients in fp32,
    bf16 or fp16 whose error is kept in 4 bits.

    Raises:
        ValueError: the environment names no backend.
        RuntimeError: it names one that cannot run here.
    """
    choice = chosen(x.w.device, native_windows.LIBRARY)
    if choice == "torch":
        return "torch"
    fused = x.group > 0 and all(t.dtype in _FLOATS and t.is_contiguous() for t in (x.w, x.g))
    return choice if fused else "torch"
