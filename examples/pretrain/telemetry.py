# SPDX-License-Identifier: Apache-2.0
"""The optimizer's ranks, errors and bytes, gathered from the shards of all ranks."""

from dataclasses import dataclass
from typing import Any

import deepspeed.comm as dist
import torch

import adapprox_ds
from recording import RankRow


@dataclass(frozen=True)
class OptimizerReading:
    """State of the optimizer at one step, all ranks together.

    Attributes:
        mean_rank: Over the factored matrices of all shards; ``None`` if there are none.
        mean_error: Relative Frobenius error xi of the last factorisation, over the same.
        state_bytes: Bytes the optimizer's state takes.
        ranks: The same per matrix and shard.
    """

    mean_rank: float | None
    mean_error: float | None
    state_bytes: int
    ranks: list[RankRow]


def read_optimizer(engine: Any, step: int) -> OptimizerReading:
    """Reads every rank's optimizer; a collective call, of which each rank gets the result."""
    shard = dist.get_rank()
    optimizer = engine.basic_optimizer  # what is inside the ZeRO wrapper
    rows: list[RankRow] = []
    if isinstance(optimizer, adapprox_ds.Adapprox):
        metrics = optimizer.metrics()
        state_bytes = metrics.state_bytes
        rows = [
            RankRow(step, name, shard, parameter.rank, parameter.error)
            for name, parameter in metrics.parameters.items()
            if parameter.rank
        ]
    else:
        state_bytes = sum(
            value.nbytes
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (state_bytes, rows))
    everything = [row for _, part in gathered for row in part]
    count = len(everything)
    return OptimizerReading(
        mean_rank=sum(row.rank for row in everything) / count if count else None,
        mean_error=sum(row.error for row in everything) / count if count else None,
        state_bytes=sum(part for part, _ in gathered),
        ranks=everything,
    )
