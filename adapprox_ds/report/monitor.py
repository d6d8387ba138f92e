# SPDX-License-Identifier: Apache-2.0
"""Ranks, error ratios, window entries, state bytes and step time in DeepSpeed's own monitors.

DeepSpeed writes its learning rate to TensorBoard, W&B, CSV files or Comet, as the config says
(``engine.monitor``); :func:`watch` adds what the optimizer knows, against the same axis.
"""

from __future__ import annotations

import math
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

from adapprox_ds.adapprox.metrics import Metrics
from adapprox_ds.adapprox.optimizer import Adapprox
from adapprox_ds.matrix_views.optimizer import MatrixViews
from adapprox_ds.micro_adam.metrics import WindowMetrics
from adapprox_ds.micro_adam.optimizer import MicroAdam
from adapprox_ds.zero.register import attach

#: A parameter's name up to its first number, which counts the layers.
_NUMBERED = re.compile(r"(?:.*?\.)??\d+(?=\.|$)")


def watch(engine: Any, *, every: int = 100, layers: bool = False) -> RemovableHandle:
    """Write the optimizer's metrics into the engine's monitors from now on.

    Every rank calls it, at the same step, and after a checkpoint is loaded, if one is. Events,
    against ``engine.global_samples`` as DeepSpeed's own, begin with the optimizer's name:

    * ``Adapprox/mean_rank``: mean of k over the factored blocks of all ranks;
    * ``Adapprox/mean_error``, ``Adapprox/largest_error``: of their error ratios xi, those that
      have reached the host: on an accelerator the ones of the step before;
    * ``Adapprox/rank/LAYER``: mean of k over a layer's blocks; see :func:`layer_of`;
    * ``MicroAdam/entries``: gradient entries that a step moves to the windows of all ranks;
    * ``Adapprox/state_bytes``: first and second moments of all ranks together; of
      ``MicroAdam/state_bytes`` windows and errors;
    * ``Adapprox/step_seconds``, ``MicroAdam/step_seconds``: wall time a step since the last event
      (or this call) on rank 0, all that the script did in between included.

    A mean over nothing (no factored block, no error known yet) is left out. Between events
    nothing is done but a comparison of integers. For an event the ranks' numbers go to rank 0
    over the host; no rank waits for its device.

    Args:
        engine: a DeepSpeed engine whose optimizer is Adapprox or MicroAdam.
        every: optimizer steps from event to event, counted by ``engine.global_steps``. Where
            fp16 overflows at the step that is due, the next one that is not skipped reports.
        layers: write the rank of each layer too; Adapprox alone has ranks.

    Returns:
        A handle whose ``remove()``, on every rank at the same step, ends it.

    Raises:
        ValueError: ``every`` is not a positive integer, ``layers`` is given with MicroAdam, or
            the config enables no monitor.
        RuntimeError: the optimizer is MatrixViews; see
            :func:`~adapprox_ds.zero.register.attach` for the rest.
    """
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"watch: every={every!r} is not allowed; allowed: an integer >= 1")
    optimizer = attach(engine)
    if isinstance(optimizer, MatrixViews):
        raise RuntimeError(
            "watch: the engine's optimizer is MatrixViews, which has no metrics; allowed: Adapprox "
            "or MicroAdam"
        )
    if layers and not isinstance(optimizer, Adapprox):
        raise ValueError(
            f"watch: layers={layers!r} is not allowed with {type(optimizer).__name__}, which has "
            "no ranks; allowed: False"
        )
    if not engine.monitor.enabled:
        raise ValueError(
            "watch: the DeepSpeed config enables no monitor; set "
            '"csv_monitor": {"enabled": true, "output_path": ..., "job_name": ...}, '
            'or "tensorboard", "wandb" or "comet" in the same way'
        )
    return optimizer.register_step_post_hook(_Watcher(engine, every, layers))


def layer_of(parameter: str) -> str:
    """The layer that a parameter belongs to.

    Its name up to the first number (``model.layers.3.mlp.up_proj.weight``: ``model.layers.3``);
    without a number the module's name (``transformer.wte.weight``: ``transformer.wte``).
    """
    if found := _NUMBERED.match(parameter):
        return found[0]
    module, _, leaf = parameter.rpartition(".")
    return module or leaf


def summary(parts: Sequence[Metrics], *, layers: bool = False) -> dict[str, float]:
    """What several ranks' metrics of Adapprox come to.

    Args:
        parts: each rank's ``optimizer.metrics()``.
        layers: the rank of each layer too.

    Returns:
        Values by the event's name without its prefix; a mean over nothing is left out.
    """
    values: dict[str, float] = {"state_bytes": sum(part.state_bytes for part in parts)}
    blocks = [block for part in parts for block in part.parameters.items()]
    if blocks:
        values["mean_rank"] = sum(block.rank for _, block in blocks) / len(blocks)
    errors = [block.error for _, block in blocks if not math.isnan(block.error)]
    if errors:
        values["mean_error"] = sum(errors) / len(errors)
        values["largest_error"] = max(errors)
    if layers:
        ranks: dict[str, list[int]] = defaultdict(list)
        for name, block in blocks:
            ranks[layer_of(name)].append(block.rank)
        values |= {f"rank/{layer}": sum(k) / len(k) for layer, k in ranks.items()}
    return values


def window_summary(parts: Sequence[WindowMetrics]) -> dict[str, float]:
    """What several ranks' metrics of MicroAdam come to.

    Args:
        parts: each rank's ``optimizer.metrics()``.

    Returns:
        Values by the event's name without its prefix.
    """
    return {
        "state_bytes": sum(part.state_bytes for part in parts),
        "entries": sum(sum(part.entries.values()) for part in parts),
    }


class _Watcher:
    """The hook after ``optimizer.step``: called once a step, or once a shard by ZeRO."""

    def __init__(self, engine: Any, every: int, layers: bool) -> None:
        self.engine, self.every, self.layers = engine, every, layers
        self.shards = _stepped_in_turn(engine.optimizer)
        # Of its own, on the host: the device's group would have to be waited for.
        self.group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self.reported, self.clock = engine.global_steps, time.perf_counter()

    def __call__(self, optimizer: Adapprox | MicroAdam, args: Any, kwargs: Any) -> None:
        step = self.engine.global_steps + 1  # the engine counts it afterwards
        if step // self.every == self.reported // self.every or not self._has_stepped(optimizer):
            return
        parts = self._gather(optimizer.metrics())
        now = time.perf_counter()
        if parts:
            values = (
                summary(parts, layers=self.layers)
                if isinstance(optimizer, Adapprox)
                else window_summary(parts)
            )
            values["step_seconds"] = (now - self.clock) / (step - self.reported)
            samples = _samples_after_step(self.engine)
            prefix = type(optimizer).__name__
            self.engine.monitor.write_events(
                [(f"{prefix}/{name}", value, samples) for name, value in values.items()]
            )
        self.reported, self.clock = step, now

    def _has_stepped(self, optimizer: Adapprox | MicroAdam) -> bool:
        """Whether all shards have: ZeRO shows the optimizer one at a time."""
        return not self.shards or any(
            p is self.shards[-1] for group in optimizer.param_groups for p in group["params"]
        )

    def _gather(self, mine: Metrics | WindowMetrics) -> list[Any]:
        """Every rank's metrics on rank 0, nothing on the others."""
        if self.group is None:
            return [mine]
        parts = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(mine, parts, dst=0, group=self.group)
        return parts or []


def _stepped_in_turn(wrapper: Any) -> Sequence[Any]:
    """The shards that a wrapper steps one after the other; none where one call steps all."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if hasattr(wrapper, name):
            shards: Sequence[Any] = getattr(wrapper, name)
            return shards
    return ()


def _samples_after_step(engine: Any) -> int:
    """What ``engine.global_samples`` will be when the engine's step is over.

    With ``managed_gradient_accumulation: false`` the engine counts micro-batches as they come
    (runtime/engine.py, _take_model_step).
    """
    counted = getattr(engine, "_unmanaged_backward_count", 0)
    micro_batches = counted or engine.gradient_accumulation_steps()
    size = engine.train_batch_size() // engine.gradient_accumulation_steps()
    return int(engine.global_samples + micro_batches * size)
