# SPDX-License-Identifier: Apache-2.0
"""Loads a universal checkpoint at any ZeRO stage and world size, factors as factors.

Each rank reads what its own shards hold and writes it where it belongs. What can be wrong with the
checkpoint is found, and agreed on by all ranks, before the running engine changes; what fails on a
rank after that (memory, a disk) is undone on all.
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
from adapprox_ds.checkpoint.place import Placement, place_of
from adapprox_ds.core.rounding import keep_weights
from adapprox_ds.core.shards import Shard
from adapprox_ds.core.state import COMPENSATION, settle_compensation

T = TypeVar("T")

#: What of a group is no setting.
_IDENTITY = ("params", "param_names")

#: What ``engine.load_checkpoint`` leaves out of the client state it returns.
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

    Takes the checkpoints of ``python -m adapprox_ds convert`` and of DeepSpeed's own
    ``ds_to_universal``, those of AdamW among them. A dense second moment is never made of a
    factored one; a dense one is factored block by block. A first moment is copied to the bit where
    the new run keeps the mean of the same thing (``momentum``), and converted where it does not.
    MicroAdam takes its own checkpoints alone, window and error as they are, and MatrixViews with
    the scope "matrix" those of the same classes.
    Beside a copy in main memory of this rank's fp32 weights and first moment as they were, for a
    failure half-way, it takes what one parameter's factors do.
    All ranks call it; the engine's config does not need ``"load_universal"``.

    Args:
        engine: of ``adapprox_ds.initialize``, or a DeepSpeed engine whose optimizer is one of ours.
        folder: a universal checkpoint, or a run's root with a ``latest_universal`` file.
        load_groups: take over the hyper-parameters of each parameter group, of Adam's those that
            Adapprox has too; otherwise those of the running optimizer stay.
        load_lr_scheduler: take over the scheduler's state, where there is a scheduler.

    Returns:
        The folder and the client state that was given to ``engine.save_checkpoint``.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged, of an unknown version, or not of
            this model or optimizer. The engine is as it was.
        RuntimeError: the engine's optimizer is none of ours.
    """
    place = place_of(engine)
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

    source = _on_all_ranks(prepare)

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

    undo = _on_all_ranks(lambda: place.snapshot(fixed=source.holds_fixed))
    with place.writable_weights():
        try:
            _on_all_ranks(install)
        except CheckpointError:
            undo()
            raise
        del undo  # before the weights are gathered
    client = {key: value for key, value in metadata.items() if key not in _ENGINE_KEYS}
    return str(source.path), client


def _on_all_ranks(work: Callable[[], T]) -> T:
    """Run ``work``; where it fails on one rank it fails on all."""
    error: Exception | None = None
    result: list[T] = []
    try:
        result.append(work())
    except Exception as caught:  # whatever it is: the other ranks wait below
        error = caught
    messages: list[str | None] = [None] * distributed.get_world_size()
    # torch's own: DeepSpeed has it since 0.17.
    distributed.all_gather_object(messages, None if error is None else str(error))
    if isinstance(error, CheckpointError):
        raise error
    if error is not None:
        raise CheckpointError(f"the checkpoint does not fit this run: {error!r}") from error
    for rank, message in enumerate(messages):
        if message is not None:
            raise CheckpointError(f"rank {rank} cannot load the checkpoint: {message}")
    return result[0]


def _require_same_model(place: Placement, source: UniversalFolder, family: Family) -> None:
    """Raise unless the checkpoint holds just this model, and every file this rank needs opens."""
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
    # Files of what other ranks hold are theirs to open: one of them has each.
    for name in {place.names[f] for shard in place.shards for f in shard.names}:
        shape, _ = place.trainable[name]
        for file in (files.FP32, *family.files(source, name)):
            _require_shape(source.tensor(name, file).shape, shape, source.file(name, file))
    found = {place.aliases.get(n, n): tuple(value.shape) for n, value in source.fixed()}
    expected = {**place.frozen, **place.buffers}
    # DeepSpeed's converter leaves some or all of these out, and a run saves without its frozen
    # parameters that says so (exclude_frozen_parameters): the model's own values stay.
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
    # DeepSpeed's stage 3 converter flattens.
    if tuple(found) in (shape, (math.prod(shape),)):
        return
    raise CheckpointError(
        f"{path} has shape {tuple(found)} where the model has {shape}: it is of another model"
    )


def _settings(
    place: Placement, source: UniversalFolder, family: Family, load: bool
) -> list[dict[str, Any]]:
    """What each group's settings will be; those that cannot be used raise here."""
    merged = []
    for group, saved in zip(place.optimizer.param_groups, source.groups, strict=True):
        new = {key: group[key] for key in group if key not in _IDENTITY}
        if load:
            kept = {*_IDENTITY, "scope", "right_factor", *family.kept(group, saved)}
            new.update({key: value for key, value in saved.items() if key not in kept})
        family.check(place.optimizer, new)
        merged.append(new)
    return merged


def _write_weights(shard: Shard, place: Placement, source: UniversalFolder, rounding: str) -> None:
    """Write a shard's weights, and a new compensation where there is one; not padding.

    To nearest, so that weights that were saved with a compensation are to the bit what they were.
    """
    state, weights = place.optimizer.state[shard.flat], shard.flat.detach().view(-1)
    state.pop(COMPENSATION, None)
    settle_compensation(state, shard.flat, rounding)
    lost = state.get(COMPENSATION)
    for f in (part.fragment for part in shard.layout.fragments):
        saved = source.tensor(place.names[f.name], files.FP32).reshape(-1)
        here = slice(f.offset, f.offset + f.numel)
        values = saved[f.start : f.start + f.numel].to(weights.device)
        rest = None if lost is None else lost.view(-1)[here]
        keep_weights(weights[here], rest, values, f.start, None)


def _install_engine_state(engine: Any, metadata: dict[str, Any], scheduler: bool) -> None:
    """Counters and the scheduler, as ``engine.load_checkpoint`` restores them."""
    if scheduler and engine.lr_scheduler is not None and metadata.get("lr_scheduler") is not None:
        engine.lr_scheduler.load_state_dict(metadata["lr_scheduler"])
    engine.global_steps = metadata["global_steps"]
    engine.global_samples = metadata.get(
        "global_samples", engine.global_steps * engine.train_batch_size()
    )
    engine.skipped_steps = metadata["skipped_steps"]
