# SPDX-License-Identifier: Apache-2.0
"""What ``Adapprox.metrics()`` reports: bytes, ranks and error ratios."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from adapprox_ds.adapprox.moment import LowRankMoment
from adapprox_ds.core.kernels.self_check import verdicts
from adapprox_ds.core.layout import ShardLayout


@dataclass(slots=True)
class ParameterMetrics:
    """One factored parameter, as far as it lies in this process.

    Attributes:
        shape: (rows, cols) of the block held here.
        rank: k of its factors.
        error: xi of the last step whose value has reached the host; NaN before the first.
        state_bytes: bytes of the factors.
    """

    shape: tuple[int, int]
    rank: int
    error: float
    state_bytes: int


@dataclass(slots=True)
class Metrics:
    """A snapshot of the optimizer's state in this process.

    Attributes:
        step: steps done by the shard that has done most.
        mean_rank: mean of k over the factored blocks; NaN where there is none.
        mean_error: mean of xi over them; NaN before the first step.
        state_bytes: bytes of first and second moments held here.
        adamw_state_bytes: what AdamW would hold for the same tensors.
        skipped: steps left out in this process since its start: gradients were not finite.
        kernels: what the self-check of Triton's kernels found in this process: a kernel's form ->
            "triton", or "torch: " and the reason. Empty where no kernel was checked.
        parameters: by parameter name, the factored ones.
    """

    step: int = 0
    mean_rank: float = math.nan
    mean_error: float = math.nan
    state_bytes: int = 0
    adamw_state_bytes: int = 0
    skipped: int = 0
    kernels: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, ParameterMetrics] = field(default_factory=dict)


def collect(
    shards: Iterable[tuple[Tensor, ShardLayout, dict[str, Tensor]]],
    synchronize: bool,
    skipped: int = 0,
) -> Metrics:
    """Read the metrics off (flat tensor, layout, state) triples.

    Args:
        shards: those that have state.
        synchronize: wait for the error ratios of the last step; otherwise those of the step
            before are reported on devices other than the CPU.
        skipped: steps left out.
    """
    total = Metrics(skipped=skipped, kernels=verdicts())
    for p, layout, state in shards:
        moment = state["exp_avg_sq"]
        total.step = max(total.step, int(state["step"]))
        total.adamw_state_bytes += 2 * p.numel() * p.element_size()
        for held in (state.get("exp_avg"), state.get("compensation")):
            if held is not None:
                total.state_bytes += getattr(held, "allocated_bytes", held.nbytes)
        if not isinstance(moment, LowRankMoment):
            total.state_bytes += moment.nbytes
            continue
        total.state_bytes += moment.allocated_bytes
        if synchronize or p.device.type == "cpu":
            moment.store.settle()
        for block, factors in zip(layout.blocks, moment.store.factors, strict=True):
            total.parameters[block.name] = ParameterMetrics(
                shape=(block.rows, block.cols),
                rank=factors.q.shape[1],
                error=factors.error,
                state_bytes=factors.q.nbytes + factors.u.nbytes,
            )
    if total.parameters:
        count = len(total.parameters)
        total.mean_rank = sum(m.rank for m in total.parameters.values()) / count
        total.mean_error = sum(m.error for m in total.parameters.values()) / count
    return total
