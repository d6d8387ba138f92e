# SPDX-License-Identifier: Apache-2.0
"""The size of all gradients of a step that ZeRO-1 and 2 take one parameter group at a time.

A step that is left out for one group's gradients must be left out for all groups, and the first one
is stepped before the others' gradients reach the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.core.shards import ShardLayouts
from adapprox_ds.zero.handshake import collective_device

#: By group, what DeepSpeed's ``averaged_gradients`` holds of a rank: None once it was stepped.
Gradients = Mapping[int, Sequence[Tensor] | None]


def norm_of_wrapper(wrapper: Any, table: ShardLayouts, ranks: Any) -> Callable[[], Any]:
    """What gives the norm of all gradients of a step: DeepSpeed's own, else one of ours.

    Args:
        wrapper: ``engine.optimizer``, whose norm is None with ``compute_grad_norm: false``.
        table: of the optimizer that it steps.
        ranks: those that share the shards; None where that is not known.
    """
    gradients = None if getattr(wrapper, "cpu_offload", False) else _gradients_of(wrapper)
    ours: Callable[[], Any] = lambda: None  # noqa: E731
    if ranks is not None and gradients is not None:
        ours = norm_of_groups(gradients, table, ranks)

    def norm() -> Any:
        measured = getattr(wrapper, "_global_grad_norm", None)
        return ours() if measured is None else measured

    return norm


def _gradients_of(wrapper: Any) -> Gradients | None:
    gradients: Gradients | None = getattr(wrapper, "averaged_gradients", None)
    return gradients


def norm_of_groups(
    gradients: Gradients, table: ShardLayouts, ranks: Any
) -> Callable[[], Tensor | None]:
    """What gives the largest of the ranks' norms of a step's gradients; called once a group.

    It is measured, by one all-reduce, when the first group is stepped, and holds for the others.

    Args:
        gradients: DeepSpeed's own dict of this rank.
        table: of the optimizer whose shards hold the gradients of the group at hand.
        ranks: those that share the shards.

    Returns:
        A function that returns a 0-dim float tensor, infinite where a gradient is not finite; None
        where one step takes all groups.
    """
    from deepspeed import comm

    last: Tensor | None = None

    def norm() -> Tensor | None:
        nonlocal last
        if sum(parts is None for parts in gradients.values()) != 1:
            return last
        waiting = [g for parts in gradients.values() if parts is not None for g in parts]
        at_hand = [p.grad for p in table.layouts if p.grad is not None]
        device = collective_device(ranks)
        norms = [
            torch.linalg.vector_norm(g.detach(), dtype=torch.float32).to(device)
            for g in (*at_hand, *waiting)
        ]
        largest = (
            torch.stack(norms).amax()
            if norms
            else torch.zeros((), dtype=torch.float32, device=device)
        )
        # A collective maximum may lose NaN.
        last = torch.where(largest.isfinite(), largest, torch.inf)
        comm.all_reduce(last, op=comm.ReduceOp.MAX, group=ranks)
        return last

    return norm
