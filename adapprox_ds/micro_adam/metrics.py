# SPDX-License-Identifier: Apache-2.0
"""The metrics that ``MicroAdam.metrics()`` reports."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from adapprox_ds.core.kernels.self_check import verdicts
from adapprox_ds.core.layout import ShardLayout
from adapprox_ds.micro_adam.tensors import FeedbackError, WindowMean


@dataclass(slots=True)
class WindowMetrics:
    """A snapshot of MicroAdam's state in this process.

    Attributes:
        step: the largest number of steps that a parameter or shard has done.
        state_bytes: the bytes of windows, errors and compensations.
        adamw_state_bytes: the bytes of AdamW's state for the same tensors.
        skipped: the number of steps that this process left out since its start, because gradients
            were not finite.
        kernels: the result of the self-check of Triton's kernels, as in
            :class:`~adapprox_ds.adapprox.metrics.Metrics`.
        entries: the number of entries that a step moves to the window on this process, by the name
            of the parameter.
    """

    step: int = 0
    state_bytes: int = 0
    adamw_state_bytes: int = 0
    skipped: int = 0
    kernels: dict[str, str] = field(default_factory=dict)
    entries: dict[str, int] = field(default_factory=dict)


def collect(
    shards: Iterable[tuple[Tensor, ShardLayout, dict[str, Tensor]]], skipped: int = 0
) -> WindowMetrics:
    """Compute the metrics.

    Args:
        shards: each parameter or shard that has state, with its layout and its state.
        skipped: the number of steps that were left out.
    """
    total = WindowMetrics(skipped=skipped, kernels=verdicts())
    for p, layout, state in shards:
        mean, error = state["exp_avg"], state["error"]
        total.step = max(total.step, int(state["step"]))
        total.adamw_state_bytes += 2 * p.numel() * p.element_size()
        assert isinstance(mean, WindowMean) and isinstance(error, FeedbackError)
        lost = state.get("compensation")
        total.state_bytes += mean.allocated_bytes + error.allocated_bytes
        total.state_bytes += 0 if lost is None else lost.nbytes
        for f in (part.fragment for part in layout.fragments):
            total.entries[f.name] = mean.store.entries_between(f.offset, f.end)
    return total
