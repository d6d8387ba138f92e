# SPDX-License-Identifier: Apache-2.0
"""MicroAdam's fused steps against its torch step: C++, and Triton on a GPU or interpreted.

Gradients do not depend on weights here, so that windows and errors of both have to be equal to the
bit after any number of steps. Triton's is interpreted by tests/cases_kernels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from adapprox_ds import MicroAdam
from adapprox_ds.core.kernels import backends
from adapprox_ds.core.layout import ParamFragment, ShardLayout
from adapprox_ds.core.rounding import load_weights
from adapprox_ds.micro_adam import step as torch_step
from adapprox_ds.micro_adam.batches import Flat, batches
from adapprox_ds.micro_adam.hyperparameters import MicroHyperparameters
from adapprox_ds.micro_adam.optimizer import _scalars
from adapprox_ds.micro_adam.state import new_stores
from tests.core import cases_views

#: Behind each fragment of a shard, NaN in weights and gradients.
GAP = 5


@dataclass(frozen=True)
class Case:
    """A shard of some fragments of parameters.

    Attributes:
        fragments: (first element, length) in each one's parameter.
        knobs: hyper-parameters.
        dtype: of weights and gradients.
        steps: how many.
        tile: elements of a batch.
        spoil: changes gradients, in place.
    """

    fragments: tuple[tuple[int, int], ...]
    knobs: dict[str, Any]
    dtype: torch.dtype = torch.float32
    steps: int = 2
    tile: int = 1 << 16
    spoil: Callable[[Tensor], Any] | None = None

    def layout(self) -> ShardLayout:
        """With a gap behind each fragment."""
        placed, offset = [], 0
        for i, (start, numel) in enumerate(self.fragments):
            placed.append(ParamFragment(f"p{i}", (start + numel + 3,), start, numel, offset))
            offset += numel + GAP
        return ShardLayout.build(placed, offset)


SMALL = {"block_size": 256, "quant_block_size": 32, "density": 0.05, "window": 3}
#: Whole blocks, and parts that begin or end in a group, of equal frames and other slots.
PARTS = ((0, 512), (250, 300), (70, 90), (512, 70), (41, 70), (768, 1))
CASES = {
    "as by default": Case(((0, 2 * 4096),), {}),
    "parts, window filled": Case(PARTS, SMALL, steps=5),
    "window not filled": Case(PARTS, {**SMALL, "window": 6}, steps=2),
    "ascend": Case(PARTS, {**SMALL, "maximize": True}),
    "several batches": Case(((0, 256 * 5), (0, 40), (300, 50), (7, 41)), SMALL, tile=256),
    "many slots": Case(((0, 2048), (0, 1300)), {"block_size": 2048, "density": 0.35}),
    "groups of 6": Case(((0, 60), (5, 20)), {**SMALL, "block_size": 30, "quant_block_size": 6}),
    "groups of 2": Case(((0, 64), (5, 20)), {**SMALL, "block_size": 32, "quant_block_size": 2}),
    "group is block": Case(((0, 4608), (1, 9)), {"block_size": 4608, "quant_block_size": 4608}),
    "all taken": Case(PARTS, {**SMALL, "density": 1.0}, steps=4),
    "bf16": Case(PARTS, SMALL, torch.bfloat16, steps=4),
    "fp16": Case(PARTS, {**SMALL, "maximize": True}, torch.float16, steps=4),
    "bf16 compensated": Case(
        PARTS, {**SMALL, "weight_rounding": "compensated"}, torch.bfloat16, steps=4
    ),
    "fp16 compensated": Case(PARTS, {**SMALL, "weight_rounding": "compensated"}, torch.float16),
    "bf16 nearest": Case(PARTS, {**SMALL, "weight_rounding": "nearest"}, torch.bfloat16),
    "alpha": Case(PARTS, {**SMALL, "alpha": 0.125}, steps=5),
    "alpha, whole blocks": Case(((0, 2 * 4096),), {"alpha": 0.3}, steps=3),
    "alpha, bf16": Case(PARTS, {**SMALL, "alpha": 0.125}, torch.bfloat16, steps=4),
    "alpha, fp16 compensated": Case(
        PARTS, {**SMALL, "alpha": 0.125, "weight_rounding": "compensated"}, torch.float16, steps=4
    ),
    "gradients of 0": Case(PARTS, SMALL, steps=4, spoil=lambda g: g[::3].zero_()),
    "no gradient": Case(PARTS, SMALL, spoil=Tensor.zero_),
    "not finite": Case(
        PARTS, SMALL, spoil=lambda g: (g[300::400].fill_(torch.inf), g[9::410].fill_(torch.nan))
    ),
    "too large": Case(PARTS, SMALL, spoil=lambda g: g.mul_(3e38)),
}


def triton_step() -> Callable[..., None]:
    """Of Triton, which may not be installed."""
    from adapprox_ds.micro_adam.kernels import window_passes

    return window_passes.update


def in_order(flat: Flat) -> tuple[Tensor, ...]:
    """Window and error; of each block and step first the entries that are 0, then by place."""
    indices, values = [], []
    for i in range(len(flat.window.spans)):
        places, held = flat.window.entries(i)
        places = places.masked_fill(held == 0, -1)
        order = places.argsort(dim=-1)
        indices.append(places.gather(-1, order).flatten())
        values.append(held.gather(-1, order).flatten())
    e = flat.error
    return torch.cat(indices), torch.cat(values), e.codes, e.low, e.high


def check(c: Case, update: Callable[..., None], device: str = "cpu") -> list[Flat]:
    """Steps in torch and by ``update``: the same window and error, and weights to rounding.

    Returns:
        both shards after the steps.
    """
    h, layout = MicroHyperparameters(lr=0.03, weight_decay=0.1, **c.knobs), c.layout()
    random = torch.Generator().manual_seed(len(c.fragments))
    edges = torch.ones(layout.numel, dtype=torch.bool)  # what is no element
    for part in layout.fragments:
        edges[part.fragment.offset : part.fragment.offset + part.fragment.numel] = False
    start = torch.randn(layout.numel, generator=random).masked_fill_(edges, torch.nan)
    updates = (torch_step.update, update)
    flats = []
    for _ in updates:
        w = start.to(device, c.dtype, copy=True)
        rest = None
        if h.weight_rounding == "compensated":
            rest = torch.zeros_like(w, dtype=torch.int8)
        stores = new_stores(layout, h, c.dtype, device)
        flats.append(Flat(w, torch.empty_like(w), *stores, rest))
    for t in range(1, c.steps + 1):
        g = torch.randn(layout.numel, generator=random) * torch.rand(1, generator=random)
        if c.spoil is not None:
            c.spoil(g)
        g.masked_fill_(edges, torch.nan)
        for flat, step in zip(flats, updates, strict=True):
            flat.g.copy_(g)
            for batch in batches([flat], c.tile):
                step(batch, _scalars(h, t))
                batch.write_back()
        expected, actual = flats
        for one, other in zip(*map(in_order, flats), strict=True):
            torch.testing.assert_close(other, one, rtol=0.0, atol=0.0, equal_nan=True)
        rtol = max(4 * torch.finfo(c.dtype).eps, 1e-6)
        torch.testing.assert_close(actual.w, expected.w, rtol=rtol, atol=1e-7, equal_nan=True)
        ours, theirs = (load_weights(x.w, x.compensation, torch.float32) for x in flats)
        if expected.compensation is not None:
            # Sixteen bits, and as many of rounding that is alike.
            assert int(expected.compensation.count_nonzero()) > layout.numel // 2
            torch.testing.assert_close(theirs, ours, rtol=2**-15, atol=1e-7, equal_nan=True)
        for flat in flats:
            assert torch.equal(flat.g.cpu().nan_to_num(), g.to(c.dtype).nan_to_num())
    assert not torch.equal(actual.w.cpu()[~edges], start.to(c.dtype)[~edges])
    return flats


def check_optimizer(fused_backend: str) -> None:
    """MicroAdam through the dispatch: narrow and wide parameters, other dtypes, a full error."""
    name = {"native": "native_windows", "triton": "window_passes"}[fused_backend]
    module = import_module(f"adapprox_ds.micro_adam.kernels.{name}")
    ends = []
    for choice in ("torch", fused_backend):
        random = torch.Generator().manual_seed(0)
        shapes = ((30, 37), (33,), (), (300,))
        params = [torch.nn.Parameter(torch.randn(s, generator=random)) for s in shapes]
        params.append(torch.nn.Parameter(torch.randn(20, 30, generator=random).double()))
        params.append(torch.nn.Parameter(torch.randn(20, 30, generator=random).mT))
        full = torch.nn.Parameter(torch.randn(20, 30, generator=random))
        groups = [{"params": params}, {"params": [full], "quant_bits": 32}]
        micro = MicroAdam(groups, lr=1e-2, **SMALL, alpha=0.125)
        with (
            mock.patch.dict(os.environ, {backends.VARIABLE: choice}),
            mock.patch.object(module, "update", wraps=module.update) as fused,
        ):
            for _ in range(5):
                for p in (*params, full):
                    g = torch.randn(p.shape, generator=random)
                    p.grad = g.to(p.dtype)
                micro.step()
        seen = {(call.args[0].w.dtype, bool(call.args[0].group)) for call in fused.mock_calls}
        assert seen == ({(torch.float32, True)} if choice == fused_backend else set())
        states = [micro.state[p] for p in (*params, full)]
        keys = ("exp_avg", "exp_avg_sq", "error")
        ends.append(([*params, full], [s[key] + 0.0 for s in states for key in keys]))
    (torch_params, torch_states), (fused_params, fused_states) = ends
    assert all(torch.equal(a, b) for a, b in zip(torch_states, fused_states, strict=True))
    torch.testing.assert_close(fused_params, torch_params, rtol=1e-6, atol=1e-7)


def check_views(backend: str) -> None:
    cases_views.compare(partial(MicroAdam, lr=1e-2, **SMALL), ("exp_avg", "error"), backend)


CHECKS: dict[str, Callable[[], Any]] = {
    **{f"windows, {n}": lambda c=case: check(c, triton_step()) for n, case in CASES.items()},
    "windows, optimizer": partial(check_optimizer, "triton"),
    "windows, views": partial(check_views, "triton"),
}
