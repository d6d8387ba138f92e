# SPDX-License-Identifier: Apache-2.0
"""Gradients that are not finite under DeepSpeed. Run by test_nonfinite.py on two ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import adapprox_ds
from adapprox_ds.core.nonfinite import NonfiniteGradientError
from tests.models import Cell
from tests.zero import cases_stages
from tests.zero.cases_stages import CPU, Z2, Z3, Case, adapprox_of, config_of

#: DeepSpeed measures no norm, so that only the optimizer can tell.
BLIND = {"compute_grad_norm": False}


class Pair(torch.nn.Module):
    """Two matrices in one group: rank 0 holds the first and a part of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Cell((12, 16)), Cell((40, 16))
        with torch.no_grad():
            self.a.weight.fill_(1.0)
            self.b.weight.fill_(1.0)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.a(a) + self.b(b)


def step(engine: Any, t: int, poison: float | None = None) -> None:
    """One step, or one whose last gradient, of rank 1's shard alone, is ``poison``."""
    generator = torch.Generator().manual_seed(t)
    a, b = torch.randn(12, 16, generator=generator), torch.randn(40, 16, generator=generator)
    if poison is not None:
        b[-1, -1] = poison
    engine.backward(engine(a, b))
    engine.step()


#: Settings by method of cases_stages.
KNOBS: dict[str, dict[str, Any]] = {"default": {"lr": 1e-2, "rank_max": 4}, "micro": {"lr": 1e-2}}


def start(config: dict[str, Any], mode: str, method: str = "default", **zero: Any) -> Any:
    """An engine of Adapprox, or of MicroAdam."""
    knobs = {**KNOBS[method], "nonfinite": mode}
    base = config_of(Case(zero or None, method=method, knobs=knobs))
    return adapprox_ds.initialize(model=Pair(), config={**base, **config})[0]


def bits(engine: Any) -> list[torch.Tensor]:
    """All that this rank keeps."""
    optimizer, tensors = adapprox_of(engine), []
    for p, state in optimizer.state.items():
        store = state["exp_avg_sq"].store
        tensors += [p.detach().clone(), state["step"], state["exp_avg"].to_dense().clone()]
        if isinstance(optimizer, adapprox_ds.MicroAdam):
            window, error = store.window, state["error"].store
            held = (window.indices, window.values, error.codes, error.low, error.high)
            tensors += [x.clone() for x in held]
            continue
        tensors.append(store.dense.clone())
        tensors += [x.clone() for block in store.factors for x in (block.q, block.u)]
    return tensors


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


#: Where DeepSpeed lets such a step through to the optimizer.
THROUGH: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stage 0": ({}, {}),
    "no norm": ({}, {**Z2, **BLIND}),
    "no check": ({"bf16": {"enabled": True, "check_grad_overflow": False}}, {"stage": 1}),
    "no norm, bf16": (
        {"bf16": {"enabled": True, "check_grad_overflow": False}},
        {"stage": 1, **BLIND},
    ),
}


#: All of them for Adapprox; for MicroAdam where the norm is known and where it is not.
RUNS = [*(("default", name) for name in THROUGH), ("micro", "no norm"), ("micro", "no check")]


def left_out_on_all_ranks(folder: Path) -> None:
    """The bad gradient is in one rank's shard; no rank's changes, and training goes on."""
    runs = [(method, THROUGH[name]) for method, name in RUNS]
    for method, (config, zero) in runs:
        unbroken = start(config, "propagate", method, **zero)
        for t in range(4):
            step(unbroken, t)
        for mode in ("skip", "raise"):
            engine = start(config, mode, method, **zero)
            for t in range(4):
                if t != 1:
                    step(engine, t)
                    continue
                before = bits(engine)
                for poison in (math.nan, math.inf):
                    if mode == "skip":
                        step(engine, 9, poison)
                    else:
                        with pytest.raises(NonfiniteGradientError, match=r"gradients .* hold NaN"):
                            step(engine, 9, poison)
                        engine.optimizer.zero_grad()
                assert same(before, bits(engine))
                step(engine, t)
            assert same(bits(unbroken), bits(engine))
            assert adapprox_of(engine).metrics().skipped == 2


def names_lie_on_one_rank(folder: Path) -> None:
    """Both ranks raise; the one that holds the gradient names its parameter."""
    rank = torch.distributed.get_rank()
    for zero in ({**Z2, **BLIND}, {"stage": 1, **BLIND}):
        engine = start({}, "raise", **zero)
        step(engine, 0)
        message = r"of 'b\.weight' hold" if rank else "on another rank or in another"
        with pytest.raises(NonfiniteGradientError, match=message):
            step(engine, 1, 1e25)


def one_rank_would_go_on(folder: Path) -> None:
    """What would be without: one rank's shard is spoilt, the other's is a step ahead."""
    engine = start({}, "propagate", **Z2, **BLIND)
    step(engine, 0)
    step(engine, 1, math.nan)
    finite = [bool(x.isfinite().all()) for x in bits(engine)]
    assert all(finite) == (torch.distributed.get_rank() == 0)


def found_without_attach(folder: Path) -> None:
    """The same under the stock ``deepspeed.initialize``."""
    import deepspeed

    config = config_of(Case({**Z2, **BLIND}, how="instance"))
    model = Pair()
    optimizer = adapprox_ds.Adapprox(model.parameters(), lr=1e-2, rank_max=4)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    step(engine, 0)
    before = bits(engine)
    with pytest.raises(NonfiniteGradientError):
        step(engine, 1, math.nan)
    assert same(before, bits(engine))


def deepspeed_skips(case: Case, folder: Path) -> None:
    """DeepSpeed's own check comes first: the optimizer is not called, in whatever precision."""
    cases_stages.run(case, folder)


CASES: dict[str, Callable[[Path], None]] = {
    function.__name__: function
    for function in (
        left_out_on_all_ranks,
        names_lie_on_one_rank,
        one_rank_would_go_on,
        found_without_attach,
    )
} | {
    f"deepspeed_skips_{name}": partial(deepspeed_skips, case)
    for name, case in {
        "z0_bf16": Case(precision="bf16", overflow_at=2),
        "bf16_optimizer": Case({"stage": 1}, "bf16_fp32acc", overflow_at=2),
        "z1_bf16": Case({"stage": 1}, "bf16", overflow_at=2),
        "z2_fp32": Case(Z2, overflow_at=2),
        "z2_offload": Case({**Z2, **CPU}, "bf16", overflow_at=2),
        "z3_fp32_clip": Case(Z3, clipping=0.5, overflow_at=2),
        "z3_sub_groups_bf16": Case({**Z3, "sub_group_size": 200}, "bf16", overflow_at=2),
    }.items()
}
