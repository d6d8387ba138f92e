# SPDX-License-Identifier: Apache-2.0
"""Features of DeepSpeed that are in no other suite, against the oracle.

And the cases of cases_expectations.py, in one world. Run by test_features.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.cases_expectations import CASES as EXPECTATIONS
from tests.cases_stages import CPU, Z2, Z3, Case, advance, check, oracles, start, train

STEPS = 3


def run(case: Case, folder: Path, by: Callable[[Any, Case, int], None] = train) -> None:
    """Train and compare after every step."""
    engine, model = start(case)
    naive = oracles(case, torch.distributed.get_world_size())
    for step in range(STEPS):
        by(engine, case, step)
        if step != case.overflow_at:
            advance(case, naive, step)
        check(case, engine, model, naive)
    engine.destroy()


def in_halves(
    engine: Any,
    case: Case,
    step: int,
    together: Callable[[Any], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """One step of two backward passes, of which the caller says when they are done."""
    factor = 2.0 if torch.distributed.get_rank() == 0 else 0.0
    with together(engine):
        for _ in range(2):
            engine.backward(engine(step, factor / 2))
    engine.step()


def reduced_once(engine: Any, case: Case, step: int) -> None:
    """The same, and gradients are reduced once for both."""
    in_halves(engine, case, step, lambda engine: engine.coalesce_grad_reduction())


UNMANAGED = {"managed_gradient_accumulation": False}
AUTOCAST = {
    "torch_autocast": {
        "enabled": True,
        "dtype": "bfloat16",
        "lower_precision_safe_modules": ["tests.models.Cell"],
    }
}
HPZ = {**Z3, "zero_hpz_partition_size": 2}
CASES: dict[str, Callable[[Path], None]] = {
    **EXPECTATIONS,
    "z1_fp16": partial(run, Case({"stage": 1}, "fp16", overflow_at=1)),
    "micro_z1_fp16": partial(run, Case({"stage": 1}, "fp16", "instance", method="micro")),
    "z1_offload": partial(run, Case({"stage": 1, **CPU}, "bf16")),
    "micro_z1_offload": partial(run, Case({"stage": 1, **CPU}, "bf16", "instance", method="micro")),
    "z1_unmanaged": partial(run, Case({"stage": 1}, "bf16", extra=UNMANAGED), by=in_halves),
    "z2_unmanaged": partial(run, Case(Z2, "bf16", extra=UNMANAGED), by=in_halves),
    "z3_unmanaged": partial(run, Case(Z3, "bf16", extra=UNMANAGED), by=in_halves),
    "z1_reduced_once": partial(run, Case({"stage": 1}, "bf16"), by=reduced_once),
    "z3_reduced_once": partial(run, Case(Z3, "bf16"), by=reduced_once),
    "z3_hpz": partial(run, Case(HPZ, "bf16", "instance")),
    # DeepSpeed remembers that there was autocast, so these come last.
    "z2_autocast": partial(run, Case(Z2, extra=AUTOCAST)),
    "z3_autocast": partial(run, Case(Z3, how="instance", extra=AUTOCAST)),
}
