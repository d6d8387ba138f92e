# SPDX-License-Identifier: Apache-2.0
"""Finds the norm of all gradients of a step, for the check that they are finite.

ZeRO-1 and 2 step one parameter group at a time. A gradient of one group that is not finite must
stop the step of all groups, also that of the first, which is stepped before the optimizer gets the
gradients of the others. DeepSpeed usually measures the norm of all gradients; where it does not,
:func:`norm_of_groups` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.core.shards import ShardTable
from adapprox_ds.zero.handshake import collective_device

#: DeepSpeed's ``averaged_gradients``: the gradients of this process by group, which become None
#: when the group is stepped.
Gradients = Mapping[int, Sequence[Tensor] | None]


def norm_of_wrapper(wrapper: Any, table: ShardTable[Any], group: Any) -> Callable[[], Any]:
    """Make a function that returns the norm of all gradients of a step.

    It is the norm that DeepSpeed measured, and otherwise (``compute_grad_norm: false``) that of
    :func:`norm_of_groups`.

    Args:
        wrapper: ``engine.optimizer``.
        table: the table of the optimizer that it wraps.
        group: torch's group of the processes that share the shards; None where it is not known.

    Returns:
        A function that returns a number or a 0-dim tensor; None where the norm is not known.
    """
    offloads = getattr(wrapper, "cpu_offload", False)
    gradients: Gradients | None = None if offloads else getattr(wrapper, "averaged_gradients", None)
    ours: Callable[[], Any] = lambda: None  # noqa: E731
    if group is not None and gradients is not None:
        ours = norm_of_groups(gradients, table, group)

    def norm() -> Any:
        measured = getattr(wrapper, "_global_grad_norm", None)
        return ours() if measured is None else measured

    return norm


def norm_of_groups(
    gradients: Gradients, table: ShardTable[Any], group: Any
) -> Callable[[], Tensor | None]:
    """Make a function that returns the largest norm of a gradient, over all processes.

    The function is to be called in the step of each group. In that of the first it measures the
    norms of all groups' gradients, by one all-reduce; in the others it returns the same number.

    Args:
        gradients: DeepSpeed's own dict of this process's gradients.
        table: the table of the optimizer. The gradients of the group that is being stepped are in
            ``grad`` of its shards.
        group: torch's group of the processes that share the shards.

    Returns:
        A function that returns a 0-dim fp32 tensor, which is infinite where a gradient is not
        finite; None where one step takes all groups.
    """
    from deepspeed import comm

    last: Tensor | None = None

    def norm() -> Tensor | None:
        nonlocal last
        if sum(parts is None for parts in gradients.values()) != 1:
            return last
        waiting = [g for parts in gradients.values() if parts is not None for g in parts]
        at_hand = [p.grad for p in table.layouts if p.grad is not None]
        device = collective_device(group)
        norms = [
            torch.linalg.vector_norm(g.detach(), dtype=torch.float32).to(device)
            for g in (*at_hand, *waiting)
        ]
        largest = (
            torch.stack(norms).amax()
            if norms
            else torch.zeros((), dtype=torch.float32, device=device)
        )
        # NaN becomes infinity, as the maximum in a collective may lose NaN.
        last = torch.where(largest.isfinite(), largest, torch.inf)
        comm.all_reduce(last, op=comm.ReduceOp.MAX, group=group)
        return last

    return norm
