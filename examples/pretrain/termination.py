# SPDX-License-Identifier: Apache-2.0
"""SIGTERM as a request that all ranks follow at the same step."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed.comm as dist
import torch


@contextmanager
def termination_requests(device: torch.device) -> Iterator[Callable[[], bool]]:
    """Notes SIGTERM instead of dying of it, while the context lasts.

    Args:
        device: Of the ranks' collectives.

    Yields:
        A function that says whether any rank was told to stop; a collective call, so that all
        ranks hear of it at the same step, whichever of them got the signal.
    """
    told = False

    def note(number: int, frame: Any) -> None:
        nonlocal told
        told = True

    def requested() -> bool:
        anywhere = torch.tensor(float(told), device=device)
        dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
        return bool(anywhere)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield requested
    finally:
        signal.signal(signal.SIGTERM, before)
