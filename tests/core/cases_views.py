# SPDX-License-Identifier: Apache-2.0
"""Optimizers on parameters and gradients that are no dense plain tensors, for all kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from adapprox_ds import Adapprox
from adapprox_ds.core.kernels import backends

#: Settings by name; each matrix is factored, each vector and cut row is not.
KNOBS: dict[str, Any] = {"lr": 1e-2, "rank_init": 2, "rank_max": 2, "clip_threshold": 0.5}


def views() -> dict[str, Tensor]:
    """Tensors of (6, 40) that are not dense, or not plain, of which none overlaps itself."""
    wide = torch.zeros(6, 40, dtype=torch.complex64)
    return {
        "transposed": torch.zeros(40, 6).mT,
        "every other": torch.zeros(6, 80)[:, ::2],
        "columns": torch.zeros(9, 50)[2:8, 3:43],
        "real part": wide.real,
        "imaginary part": wide.clone().imag,
        "negative bit": wide.clone().conj().imag,
        "negative bit, dense": torch._neg_view(torch.zeros(6, 40)),
    }


def gradients(start: Tensor) -> dict[str, Tensor]:
    """The same numbers (but where one stands for all) in all kinds of memory."""
    memory = bytearray(start.numpy().tobytes())
    held = {name: view.copy_(start) for name, view in views().items()}
    held["expanded"] = start[:, :1].expand(start.shape)
    held["one for all"] = start[0, 0].expand(start.shape)
    held["shared with Python"] = torch.frombuffer(memory, dtype=start.dtype).view(6, 40)
    return held


def check(backend: str, preset: str | None = None, steps: int = 3) -> None:
    """Adapprox's; see :func:`compare`."""
    compare(partial(Adapprox, preset=preset, **KNOBS), ("exp_avg", "exp_avg_sq"), backend, steps)


def compare(make: Callable[..., Any], keys: Sequence[str], backend: str, steps: int = 3) -> None:
    """The bits of a run on dense tensors, and nothing beside the elements changes.

    Args:
        make: builds the optimizer.
        keys: of the state.
        backend: of the kernels.
        steps: of the run.
    """
    random = torch.Generator().manual_seed(0)
    start, grad = (torch.randn(6, 40, generator=random) for _ in range(2))
    pairs = [(view, grad.clone()) for view in views().values()]
    pairs += [(start.clone(), g) for g in gradients(grad).values()]
    pairs += [(views()["every other"], gradients(grad)["negative bit"])]
    pairs += [(torch.zeros(240, 2)[:, 0], grad.view(-1, 1).expand(240, 2)[:, 1])]
    shared = gradients(grad)["every other"]  # one gradient of two parameters
    pairs += [(start.clone(), shared), (start.clone(), shared)]
    params, twins = [], []
    for x, g in pairs:
        first = start.view(x.shape)
        p, twin = torch.nn.Parameter(x.copy_(first)), torch.nn.Parameter(first.clone())
        p.grad, twin.grad = g, g.clone(memory_format=torch.contiguous_format).resolve_neg()
        params.append(p)
        twins.append(twin)
    wholes = [torch.empty(0, dtype=p.dtype).set_(p.detach().untyped_storage()) for p in params]
    befores = [(p.grad.clone(), whole.clone()) for p, whole in zip(params, wholes, strict=True)]
    with mock.patch.dict(os.environ, {backends.VARIABLE: backend}):
        one, other = make(params), make(twins)
        for _ in range(steps):
            one.step()
            other.step()
    for p, twin, whole, before in zip(params, twins, wholes, befores, strict=True):
        assert not torch.equal(p, start.view(p.shape))
        assert torch.equal(p, twin)
        for key in keys:
            assert torch.equal(_dense(one.state[p][key]), _dense(other.state[twin][key]))
        inside = torch.zeros_like(whole, dtype=torch.bool)
        inside.as_strided(p.shape, p.stride(), p.storage_offset()).fill_(True)
        assert torch.equal(whole[~inside], before[1][~inside]), "memory beside a parameter"
        assert torch.equal(p.grad, before[0]), "a gradient was written to"


def _dense(state: Tensor) -> Tensor:
    return state.to_dense() if type(state) is not Tensor else state
