# SPDX-License-Identifier: Apache-2.0
"""What the states of all optimizers share: Adam's keys, the step count and the compensation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.core.rounding import is_rounded

#: Keys of the state. They are those of torch.optim.AdamW, so that DeepSpeed takes it for Adam's.
STEP, FIRST_MOMENT, SECOND_MOMENT = "step", "exp_avg", "exp_avg_sq"

#: The key of the compensation of 16-bit weights (core/rounding.py), int8 and shaped like them.
COMPENSATION = "compensation"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a step computes: fp32, or fp64 for fp64 parameters."""
    return torch.promote_types(dtype, torch.float32)


def settle_step(state: dict[str, Any]) -> None:
    """Make the step count of a state with moments a 0-dim fp32 tensor, as torch's Adam has it.

    DeepSpeed's Adams, and those of old releases of torch, count in a Python number.

    Args:
        state: the state of one parameter or shard.

    Raises:
        RuntimeError: the state has moments and no step count.
    """
    if not {FIRST_MOMENT, SECOND_MOMENT} & state.keys():
        return
    held = state.get(STEP)
    if isinstance(held, Tensor) and not held.dim() and held.dtype == torch.float32:
        return
    value = held.item() if isinstance(held, Tensor) and held.numel() == 1 else held
    if not isinstance(value, Real) or not float(value).is_integer() or value < 0:
        raise RuntimeError(
            f"a parameter's loaded state holds {sorted(state)} with {STEP!r}={held!r}; allowed: "
            "the steps done, which the bias corrections need, in the state or in its group"
        )
    state[STEP] = torch.tensor(float(value), dtype=torch.float32, device="cpu")


def settle_steps(states: Mapping[Any, dict[str, Any]], groups: Iterable[Mapping[str, Any]]) -> None:
    """Apply :func:`settle_step` to all states that are about to be loaded.

    Raises:
        RuntimeError: a state has moments and no step count.
    """
    for group in groups:
        held = [states[p] for p in group["params"] if p in states]
        numbers = [s[STEP] for s in (*held, group) if isinstance(s.get(STEP), Real)]
        for state in held:
            # FusedAdam counts in only one state of a group; the others' counts stay 0.
            if numbers and not isinstance(state.get(STEP), Tensor) and not state.get(STEP):
                state[STEP] = max(numbers)
            settle_step(state)


def settle_compensation(state: dict[str, Any], p: Tensor, rounding: str) -> None:
    """Add a compensation to a state whose 16-bit weights are to have one, else remove it.

    Args:
        state: the state of a parameter or shard.
        p: the parameter or shard.
        rounding: the group's ``weight_rounding``.

    Raises:
        RuntimeError: the compensation that was loaded has another size or dtype.
    """
    if rounding != "compensated" or not is_rounded(p.dtype):
        state.pop(COMPENSATION, None)
        return
    held = state.get(COMPENSATION)
    if held is None:
        state[COMPENSATION] = torch.zeros(p.shape, dtype=torch.int8, device=p.device)
    elif held.dtype != torch.int8 or held.numel() != p.numel() or not held.is_contiguous():
        raise RuntimeError(
            f"the loaded {COMPENSATION} has {held.numel()} elements in {held.dtype} where the "
            f"parameter or shard has {p.numel()} in torch.int8: it was saved with another model or "
            "world size, or is damaged"
        )
