# SPDX-License-Identifier: Apache-2.0
"""The one pass over a matrix's elements that a step makes; V is never written out.

There are three backends: C++ on CPUs, Triton on CUDA and ROCm, and plain torch in tiles on any
device. core/kernels/backends.py chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import torch

from adapprox_ds.adapprox.kernels import forms, native_pass, tiles
from adapprox_ds.adapprox.kernels.interface import (
    Passed,
    Reduced,
    Runs,
    Stack,
    StepScalars,
    elements,
)
from adapprox_ds.adapprox.quantized import QuantizedMatrix
from adapprox_ds.core.kernels.backends import chosen, is_forced

__all__ = [
    "Passed",
    "Reduced",
    "Runs",
    "Stack",
    "StepScalars",
    "backend",
    "run",
]

#: The most columns of factors or sketches that Triton's kernel takes: what registers hold.
FUSED_LIMIT = 160


def run(stacks: Sequence[Stack], runs: Runs | None, s: StepScalars, write: bool) -> Passed:
    """One pass over the elements on the chosen backend; see :func:`tiles.run`."""
    if not stacks and runs is None:
        return Passed([], torch.zeros(0, dtype=torch.float64, device="cpu"))
    choice = backend(stacks, runs)
    if choice == "triton" and not is_forced():
        choice = "triton" if forms.takes(stacks, runs, s, write) else "torch"
    if choice == "torch":
        return tiles.run(stacks, runs, s, write)
    if choice == "native":
        return native_pass.run(stacks, runs, s, write)
    triton_pass = import_module("adapprox_ds.adapprox.kernels.triton_pass")
    passed: Passed = triton_pass.run(stacks, runs, s, write)
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
    choice = chosen(computed[0].device, native_pass.LIBRARY)
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
