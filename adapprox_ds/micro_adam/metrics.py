# SPDX-License-Identifier: Apache-2.0
"""What ``MicroAdam.metrics()`` reports: bytes, and the entries that a step moves to the window."""

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
        step: steps done by the shard that has done most.
        state_bytes: bytes of windows and errors held here.
        adamw_state_bytes: what AdamW would hold for the same tensors.
        skipped: steps left out in this process since its start: gradients were not finite.
        kernels: what the self-check of Triton's kernels found, as in
            :class:`~adapprox_ds.adapprox.metrics.Metrics`.
        entries: by parameter name, the entries that a step moves to the window here.
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
    """Read the metrics off (flat tensor, layout, state) triples that have state.

    Args:
        shards: those that have state.
        skipped: steps left out.
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
            total.entries[f.name] = mean.store.entries_between(f.offset, f.offset + f.numel)
    return total
