# SPDX-License-Identifier: Apache-2.0
"""Lets processes that step together agree on the kernels that they use, so that all compute alike.

Triton's kernels are checked on each process's own device (core/kernels/self_check.py), and the
check of one form of a kernel can fail on one process alone. So in the first step each process
checks every form that its steps can ever need and tells the others what failed; all processes then
compute these forms by plain torch. Later steps do not ask again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import distributed

from adapprox_ds.core.kernels import self_check
from adapprox_ds.core.kernels.backends import VARIABLE, chosen, is_forced
from adapprox_ds.core.kernels.squares import LIBRARY
from adapprox_ds.core.shards import ShardTable


def settle(
    check: Callable[[], Any], devices: Iterable[torch.device], table: ShardTable[Any]
) -> None:
    """Check this process's kernels, and agree on them with the others of its process group.

    In the first step this is a collective call. It does nothing in later steps, and where the
    process group is not known.

    Args:
        check: checks every form of a kernel that this process's steps can need.
        devices: the devices that this process steps on.
        table: the optimizer's table of layouts, which has the process group and keeps the answer.
    """
    if table.process_group is None or table.agreed is not None:
        return
    world = distributed.get_world_size(table.process_group)
    table.agreed = world > 1
    if world == 1:
        return
    choices = {chosen(device, LIBRARY) for device in devices}
    mine: dict[str, str] = {}
    if choices - {"triton"}:
        # A process that does not use Triton would compute otherwise than those that do.
        asked = os.environ.get(VARIABLE, "auto")
        mine = {self_check.EVERY: f"{min(choices - {'triton'})} is taken, of {asked}"}
    elif choices and not is_forced():
        check()
        mine = self_check.failures()
    told: list[Any] = [None] * world
    distributed.all_gather_object(told, mine, group=table.process_group)
    if is_forced():
        return
    processes = distributed.get_process_group_ranks(table.process_group)
    for process, failed in zip(processes, told, strict=True):
        self_check.give_up({form: f"on rank {process}: {why}" for form, why in failed.items()})
