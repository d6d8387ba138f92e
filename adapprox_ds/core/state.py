# SPDX-License-Identifier: Apache-2.0
"""What the states of all optimizers have alike: Adam's keys, the step count, a compensation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.core.rounding import is_rounded

#: State keys, those of torch.optim.AdamW, so that DeepSpeed treats the state as Adam's.
STEP, FIRST_MOMENT, SECOND_MOMENT = "step", "exp_avg", "exp_avg_sq"

#: State key of what rounding took from 16-bit weights, int8 and shaped like them.
COMPENSATION = "compensation"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a step computes in: fp32, or fp64 for fp64 parameters."""
    return torch.promote_types(dtype, torch.float32)


def settle_step(state: dict[str, Any]) -> None:
    """Let a state that has moments count its steps as torch's Adam does: 0-dim, fp32.

    DeepSpeed's Adams and old ones of torch count in a Python number.

    Args:
        state: of one parameter or shard; new, loaded, or filled in by a loader.

    Raises:
        RuntimeError: it does not say how many steps were done.
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
    """:func:`settle_step` of all states that are about to be loaded.

    Raises:
        RuntimeError: one does not say how many steps were done.
    """
    for group in groups:
        held = [states[p] for p in group["params"] if p in states]
        numbers = [s[STEP] for s in (*held, group) if isinstance(s.get(STEP), Real)]
        for state in held:
            # FusedAdam counts in one state of a group alone; the others' numbers stay 0.
            if numbers and not isinstance(state.get(STEP), Tensor) and not state.get(STEP):
                state[STEP] = max(numbers)
            settle_step(state)


def settle_compensation(state: dict[str, Any], p: Tensor, rounding: str) -> None:
    """Let a state have a compensation where 16-bit weights are to have one, and else none.

    Args:
        state: of a parameter or shard.
        p: the parameter or shard.
        rounding: the group's ``weight_rounding``.

    Raises:
        RuntimeError: a loaded one is of another size or kind.
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
