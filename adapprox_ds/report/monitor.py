# SPDX-License-Identifier: Apache-2.0
"""Writes the optimizer's metrics to DeepSpeed's monitors: TensorBoard, W&B, CSV files or Comet.

DeepSpeed writes its own events, such as the learning rate, to the monitors that the configuration
enables (``engine.monitor``). :func:`watch` adds ranks, error ratios, window entries, state bytes
and step times to them.
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

#: Matches a parameter's name up to its first number, which counts the layers.
_NUMBERED = re.compile(r"(?:.*?\.)??\d+(?=\.|$)")


def watch(engine: Any, *, every: int = 100, layers: bool = False) -> RemovableHandle:
    """Write the optimizer's metrics to the engine's monitors from now on.

    This is a collective call: all processes make it, at the same step. If a checkpoint is loaded,
    it comes after that. Events are written over ``engine.global_samples``, as DeepSpeed's own:

    * ``Adapprox/mean_rank``: the mean rank k of the factored blocks of all processes.
    * ``Adapprox/mean_error``, ``Adapprox/largest_error``: the mean and the largest of their error
      ratios xi; on an accelerator those of the step before, as others have not reached the host.
    * ``Adapprox/rank/LAYER``: the mean rank k of a layer's blocks; see :func:`layer_of`.
    * ``MicroAdam/entries``: the number of entries that a step moves to the windows of all
      processes.
    * ``Adapprox/state_bytes``, ``MicroAdam/state_bytes``: the bytes of the state of all processes.
    * ``Adapprox/step_seconds``, ``MicroAdam/step_seconds``: the mean wall time of a step since the
      last event (or this call), with all that the script did in between, on the first process.

    A mean over nothing (no factored block, or no error known yet) is left out. Between events each
    step costs a comparison of integers. For an event the processes send their numbers to the first
    one over the host, and none waits for its device.

    Args:
        engine: a DeepSpeed engine whose optimizer is Adapprox or MicroAdam.
        every: the number of optimizer steps between events, counted by ``engine.global_steps``. If
            the step of an event is skipped, as fp16 overflowed, the event comes after the next one.
        layers: whether to write the rank of each layer too; only Adapprox has ranks.

    Returns:
        A handle whose ``remove()`` ends the events; all processes call it at the same step.

    Raises:
        ValueError: ``every`` is not a positive integer, ``layers`` is given with MicroAdam, or
            the configuration enables no monitor.
        RuntimeError: the optimizer is MatrixViews; see
            :func:`~adapprox_ds.zero.register.attach` for the other cases.
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

    It is the name up to its first number (``model.layers.3`` of
    ``model.layers.3.mlp.up_proj.weight``), or, without a number, that of the module
    (``transformer.wte`` of ``transformer.wte.weight``).
    """
    if found := _NUMBERED.match(parameter):
        return found[0]
    module, _, leaf = parameter.rpartition(".")
    return module or leaf


def summary(parts: Sequence[Metrics], *, layers: bool = False) -> dict[str, float]:
    """Combine the metrics of Adapprox on several processes.

    Args:
        parts: ``optimizer.metrics()`` of each process.
        layers: whether to add the rank of each layer.

    Returns:
        The value of each event, by its name without the prefix; a mean over nothing is left out.
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
    """Combine the metrics of MicroAdam on several processes; see :func:`summary`."""
    return {
        "state_bytes": sum(part.state_bytes for part in parts),
        "entries": sum(sum(part.entries.values()) for part in parts),
    }


class _Watcher:
    """The hook after ``optimizer.step``, which ZeRO calls for one shard after the other.

    Args:
        engine: the engine.
        every: see :func:`watch`, as for ``layers``.
        layers: whether to write the rank of each layer.
    """

    def __init__(self, engine: Any, every: int, layers: bool) -> None:
        self.engine, self.every, self.layers = engine, every, layers
        self.shards = _stepped_in_turn(engine.optimizer)
        # This group communicates over the host, as one of the device would have to be waited for.
        self.group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self.reported, self.clock = engine.global_steps, time.perf_counter()

    def __call__(self, optimizer: Adapprox | MicroAdam, args: Any, kwargs: Any) -> None:
        step = self.engine.global_steps + 1  # the engine counts the step only afterwards
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
        """Whether all shards were stepped; ZeRO gives the optimizer one at a time."""
        return not self.shards or any(
            p is self.shards[-1] for group in optimizer.param_groups for p in group["params"]
        )

    def _gather(self, mine: Metrics | WindowMetrics) -> list[Any]:
        """Gather the metrics of all processes on the first one; other processes get nothing."""
        if self.group is None:
            return [mine]
        parts = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(mine, parts, dst=0, group=self.group)
        return parts or []


def _stepped_in_turn(wrapper: Any) -> Sequence[Any]:
    """The shards that a wrapper steps one after the other; empty where one call steps all."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if hasattr(wrapper, name):
            shards: Sequence[Any] = getattr(wrapper, name)
            return shards
    return ()


def _samples_after_step(engine: Any) -> int:
    """The value that ``engine.global_samples`` will have after the engine's step.

    With ``managed_gradient_accumulation: false`` the engine counts the micro-batches of a step
    (runtime/engine.py, _take_model_step).
    """
    counted = getattr(engine, "_unmanaged_backward_count", 0)
    micro_batches = counted or engine.gradient_accumulation_steps()
    size = engine.train_batch_size() // engine.gradient_accumulation_steps()
    return int(engine.global_samples + micro_batches * size)
