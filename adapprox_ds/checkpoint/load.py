# SPDX-License-Identifier: Apache-2.0
"""Loads a universal checkpoint into an engine of any ZeRO stage and number of processes.

Each process reads what its own shards need. All checks of the checkpoint come before the running
engine is changed: if one fails on one process, the load fails on all of them. If something fails
after that, such as an allocation, every process undoes its changes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import distributed

from adapprox_ds.checkpoint import files
from adapprox_ds.checkpoint.family import Family, Plan, require_same_family
from adapprox_ds.checkpoint.files import CheckpointError
from adapprox_ds.checkpoint.folder import UniversalFolder, open_universal
from adapprox_ds.checkpoint.place import Placement, read_placement
from adapprox_ds.core.rounding import keep_weights
from adapprox_ds.core.shards import Shard
from adapprox_ds.core.state import COMPENSATION, settle_compensation

T = TypeVar("T")

#: The keys of a parameter group that are no settings.
_IDENTITY = ("params", "param_names")

#: The keys that ``engine.load_checkpoint`` leaves out of the client state that it returns.
_ENGINE_KEYS = {
    "module",
    "skipped_steps",
    "global_steps",
    "dp_world_size",
    "mp_world_size",
    "data_sampler",
    "random_ltd",
    "lr_scheduler",
    "optimizer",
}


def load_universal(
    engine: Any,
    folder: str | os.PathLike[str],
    *,
    load_groups: bool = True,
    load_lr_scheduler: bool = True,
) -> tuple[str, dict[str, Any]]:
    """Continue a run from a universal checkpoint, whatever stage and world size saved it.

    This is a collective call: all processes make it. The engine's configuration does not need
    ``"load_universal"``. The checkpoint can come from ``python -m adapprox_ds convert`` or from
    DeepSpeed's own ``ds_to_universal``:

    - Adapprox loads checkpoints of Adapprox and of Adams. Factors stay factors; a dense second
      moment is factored block by block. The first moment is copied to the bit where the new run
      keeps the mean of the same quantity (``momentum``), and converted where it does not.
    - MicroAdam loads its own checkpoints, with window and error unchanged.
    - MatrixViews with the scope "matrix" loads its own checkpoints, if its classes are the same.

    Beside the memory of one parameter's factors it needs main memory for a copy of this process's
    fp32 weights and first moment, which are restored if the load fails.

    Args:
        engine: an engine of ``adapprox_ds.initialize``, or a DeepSpeed engine whose optimizer is
            one of this package.
        folder: a universal checkpoint, or a run's root with a ``latest_universal`` file.
        load_groups: whether to load the hyper-parameters of each parameter group; from an Adam's
            checkpoint, those that Adapprox has too. Otherwise those of the running optimizer stay.
        load_lr_scheduler: whether to load the scheduler's state, if the engine has a scheduler.

    Returns:
        The folder and the client state that was given to ``engine.save_checkpoint``.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged, of an unknown version, or of another
            model or optimizer. The engine has not changed.
        RuntimeError: the engine's optimizer is none of this package.
    """
    place = read_placement(engine)
    plans: list[Plan] = []
    settings: list[dict[str, Any]] = []
    metadata: dict[str, Any] = {}

    def prepare() -> UniversalFolder:
        source = open_universal(files.resolve(folder, files.LATEST_UNIVERSAL))
        family = require_same_family(place, source)
        _require_same_model(place, source, family)
        settings.extend(_settings(place, source, family, load_groups))
        plans.extend(family.plan(shard, place, source, settings) for shard in place.shards)
        metadata.update(source.metadata())
        return source

    source = _on_all_processes(prepare)

    def install() -> None:
        for plan in plans:
            plan.install(place, source, settings[plan.shard.group])
            rounding = settings[plan.shard.group].get("weight_rounding", "nearest")
            _write_weights(plan.shard, place, source, rounding)
        for name, value in source.fixed():
            place.write_fixed(name, value)
        for group, new in zip(place.optimizer.param_groups, settings, strict=True):
            group.update(new)
        place.adopt_global_state(source.state)
        _install_engine_state(engine, metadata, load_lr_scheduler)

    undo = _on_all_processes(lambda: place.snapshot(fixed=source.holds_fixed))
    with place.writable_weights():
        try:
            _on_all_processes(install)
        except CheckpointError:
            undo()
            raise
        del undo  # its copies are freed before the weights are gathered
    client = {key: value for key, value in metadata.items() if key not in _ENGINE_KEYS}
    return str(source.path), client


def _on_all_processes(work: Callable[[], T]) -> T:
    """Run ``work`` on every process; a collective call, which raises on all if any of them fails.

    Returns:
        What ``work`` returned on this process.

    Raises:
        CheckpointError: ``work`` failed on some process.
    """
    error: Exception | None = None
    result: list[T] = []
    try:
        result.append(work())
    except Exception as caught:  # of any kind, since the other processes wait in the all-gather
        error = caught
    messages: list[str | None] = [None] * distributed.get_world_size()
    # This is torch's function, since DeepSpeed has one only from 0.17 on.
    distributed.all_gather_object(messages, None if error is None else str(error))
    if isinstance(error, CheckpointError):
        raise error
    if error is not None:
        raise CheckpointError(f"the checkpoint does not fit this run: {error!r}") from error
    for process, message in enumerate(messages):
        if message is not None:
            raise CheckpointError(f"rank {process} cannot load the checkpoint: {message}")
    return result[0]


def _require_same_model(place: Placement, source: UniversalFolder, family: Family) -> None:
    """Raise unless the checkpoint is of this model, and every file that this process needs opens.

    Raises:
        CheckpointError: parameters, groups or shapes differ, or a file cannot be read.
    """
    ours = set(place.trainable)
    for missing, what in (
        (ours - source.names, "lacks"),
        (source.names - ours, "holds, and this model does not train,"),
    ):
        if missing:
            raise CheckpointError(
                f"{source.path} {what} {len(missing)} parameters, {sorted(missing)[:3]} among "
                "them: it is of another model, or other parameters are frozen"
            )
    if len(source.groups) != len(place.optimizer.param_groups):
        raise CheckpointError(
            f"{source.path} has {len(source.groups)} parameter groups and the optimizer "
            f"{len(place.optimizer.param_groups)}: give it the same groups"
        )
    for name, (shape, group) in place.trainable.items():
        if source.group_of is not None and source.group_of[name] != group:
            raise CheckpointError(
                f"{name!r} is in parameter group {source.group_of[name]} of {source.path} and in "
                f"{group} of the optimizer: give it the same groups"
            )
        if source.shapes is not None:
            _require_shape(source.shapes[name], shape, source.file(name, files.FP32))
    # Only files of parameters in this process's shards are opened; other processes open the others.
    for name in {place.names[f] for shard in place.shards for f in shard.names}:
        shape, _ = place.trainable[name]
        for file in (files.FP32, *family.tensor_files(source, name)):
            _require_shape(source.tensor(name, file).shape, shape, source.file(name, file))
    found = {place.aliases.get(n, n): tuple(value.shape) for n, value in source.fixed()}
    expected = {**place.frozen, **place.buffers}
    # DeepSpeed's converter leaves out some or all frozen parameters and buffers, and a run can be
    # saved without frozen parameters (exclude_frozen_parameters). The model's own values then stay.
    names = {*found, *place.buffers} if source.is_ours else {*found} & {*expected}
    if wrong := sorted(name for name in names if found.get(name) != expected.get(name)):
        raise CheckpointError(
            f"{source.path} holds {wrong[0]!r} with shape {found.get(wrong[0])} where the model "
            f"has {expected.get(wrong[0])}: a frozen parameter or buffer of another model"
        )
    if left_out := sorted(place.frozen.keys() - found.keys()):
        from deepspeed.utils import log_dist

        log_dist(
            f"{source.path} does not hold {len(left_out)} frozen parameters, {left_out[0]} among "
            "them: they stay as they are in the model",
            ranks=[0],
        )


def _require_shape(found: Sequence[int], shape: tuple[int, ...], path: Path) -> None:
    # DeepSpeed's converter of stage 3 flattens tensors.
    if tuple(found) in (shape, (math.prod(shape),)):
        return
    raise CheckpointError(
        f"{path} has shape {tuple(found)} where the model has {shape}: it is of another model"
    )


def _settings(
    place: Placement, source: UniversalFolder, family: Family, load: bool
) -> list[dict[str, Any]]:
    """The settings of each of the optimizer's groups after the load.

    Args:
        place: the running engine.
        source: the checkpoint.
        family: the family of its state.
        load: whether saved settings replace those of the running optimizer.

    Raises:
        ValueError: the running optimizer cannot use the settings.
    """
    merged = []
    for group, saved in zip(place.optimizer.param_groups, source.groups, strict=True):
        new = {key: group[key] for key in group if key not in _IDENTITY}
        if load:
            kept = {*_IDENTITY, "scope", "right_factor", *family.kept_settings(group, saved)}
            new.update({key: value for key, value in saved.items() if key not in kept})
        family.check(place.optimizer, new)
        merged.append(new)
    return merged


def _write_weights(shard: Shard, place: Placement, source: UniversalFolder, rounding: str) -> None:
    """Write a shard's weights, and a new compensation if ``rounding`` keeps one; skip padding.

    Weights are rounded to nearest, whatever ``rounding`` says, so that 16-bit weights that were
    saved with their compensation are restored to the bit.
    """
    state, weights = place.optimizer.state[shard.flat], shard.flat.detach().view(-1)
    state.pop(COMPENSATION, None)
    settle_compensation(state, shard.flat, rounding)
    lost = state.get(COMPENSATION)
    for f in (part.fragment for part in shard.layout.fragments):
        saved = source.tensor(place.names[f.name], files.FP32).reshape(-1)
        values = saved[f.start : f.start + f.numel].to(weights.device)
        rest = None if lost is None else f.view(lost.view(-1))
        keep_weights(f.view(weights), rest, values, f.start, None)


def _install_engine_state(engine: Any, metadata: dict[str, Any], scheduler: bool) -> None:
    """Restore the engine's counters and its scheduler, as ``engine.load_checkpoint`` does."""
    if scheduler and engine.lr_scheduler is not None and metadata.get("lr_scheduler") is not None:
        engine.lr_scheduler.load_state_dict(metadata["lr_scheduler"])
    engine.global_steps = metadata["global_steps"]
    engine.global_samples = metadata.get(
        "global_samples", engine.global_steps * engine.train_batch_size()
    )
    engine.skipped_steps = metadata["skipped_steps"]
