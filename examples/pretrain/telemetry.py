# SPDX-License-Identifier: Apache-2.0
"""The optimizer's ranks, errors and bytes, gathered from the shards of all ranks."""

from dataclasses import dataclass
from typing import Any

import deepspeed.comm as dist
import torch

import adapprox_ds
from adapprox_ds.adapprox.metrics import Metrics
from adapprox_ds.report.monitor import summary
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
    optimizer = engine.basic_optimizer  # what is inside the ZeRO wrapper
    factored = isinstance(optimizer, adapprox_ds.Adapprox)
    mine = optimizer.metrics() if factored else Metrics(state_bytes=state_bytes(optimizer))
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    values = summary(parts)
    return OptimizerReading(
        mean_rank=values.get("mean_rank"),
        mean_error=values.get("mean_error"),
        state_bytes=int(values["state_bytes"]),
        ranks=[
            RankRow(step, name, shard, parameter.rank, parameter.error)
            for shard, part in enumerate(parts)
            for name, parameter in part.parameters.items()
        ],
    )


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in an optimizer's state; compact ones say what they hold."""
    return sum(
        getattr(value, "allocated_bytes", value.nbytes)
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
