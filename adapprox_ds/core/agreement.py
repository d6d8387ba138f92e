# SPDX-License-Identifier: Apache-2.0
"""Ranks that step together agree on kernels, once, so that none takes another backend.

Triton's kernels are checked on each rank's own device (core/kernels/self_check.py), and a device or
a compiler can fail on one rank alone. So each rank checks all forms that its steps can ever take,
and tells the others what failed; torch takes that everywhere. All ranks of a process group do so in
their first step, whether they hold something of a form or nothing, and no later step asks.
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
from adapprox_ds.core.shards import ShardLayouts


def settle(check: Callable[[], Any], devices: Iterable[torch.device], table: ShardLayouts) -> None:
    """Check this rank's kernels and agree on them with others; collective in the first step.

    Does nothing where nobody steps together, or where they agreed before.

    Args:
        check: looks at all forms that this rank's steps can take.
        devices: that it steps on.
        table: of the optimizer.
    """
    if table.ranks is None or table.agreed is not None:
        return
    world = distributed.get_world_size(table.ranks)
    table.agreed = world > 1
    if world == 1:
        return
    choices = {chosen(device, LIBRARY) for device in devices}
    mine: dict[str, str] = {}
    if choices - {"triton"}:
        # A rank that has no such kernels would step otherwise than those that do.
        asked = os.environ.get(VARIABLE, "auto")
        mine = {self_check.EVERY: f"{min(choices - {'triton'})} is taken, of {asked}"}
    elif choices and not is_forced():
        check()
        mine = self_check.failures()
    told: list[Any] = [None] * world
    distributed.all_gather_object(told, mine, group=table.ranks)
    if is_forced():
        return
    for rank, failed in zip(distributed.get_process_group_ranks(table.ranks), told, strict=True):
        self_check.give_up({form: f"on rank {rank}: {why}" for form, why in failed.items()})
