# SPDX-License-Identifier: Apache-2.0
"""Loads a universal checkpoint at any ZeRO stage and world size, factors as factors.

Each rank reads what its own shards hold and writes it where it belongs. Everything that can be
wrong with the checkpoint is found, and agreed on by all ranks, before the running engine changes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.checkpoint import files
from adapprox_ds.checkpoint.files import CheckpointError
from adapprox_ds.checkpoint.folder import UniversalFolder, open_universal
from adapprox_ds.checkpoint.moments import (
    GRADIENT,
    SHARED_KEYS,
    Normalisation,
    is_adapprox,
    kind_of,
)
from adapprox_ds.checkpoint.place import Placement, place_of
from adapprox_ds.checkpoint.reshard import RankTarget, reshard
from adapprox_ds.lowrank.factors import FactoredBlock, FactorStore
from adapprox_ds.lowrank.moment import LowRankMoment
from adapprox_ds.lowrank.quantized import QuantizedMoment
from adapprox_ds.lowrank.rounding import rounding_salt
from adapprox_ds.optim.fragment import write_mean
from adapprox_ds.optim.hyperparameters import Hyperparameters, compute_dtype, factor_dtype
from adapprox_ds.optim.state import (
    FIRST_MOMENT,
    SECOND_MOMENT,
    STEP,
    first_moment_pieces,
    new_first_moment,
    plain_dtype,
)
from adapprox_ds.zero.discover import Shard

#: What of a group is no setting.
_IDENTITY = ("params", "param_names")

#: Settings that go with ``factor``: where the run is configured for another one, all stay as
#: configured, and the second moment is factored anew.
_METHOD = ("factor", "warm_start", "balanced", "floor", "power_iterations")

#: Elements of a first moment that change kind at a time: so much of the second moment is dense.
_CHUNK = 1 << 22

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


@dataclass(slots=True)
class _Plan:
    """A shard's new state, ready to be put in place."""

    shard: Shard
    step: int
    moment: LowRankMoment
    settings: Hyperparameters


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
    All ranks call it; the engine's config does not need ``"load_universal"``.

    Args:
        engine: of ``adapprox_ds.initialize``, or a DeepSpeed engine whose optimizer is Adapprox.
        folder: a universal checkpoint, or a run's root with a ``latest_universal`` file.
        load_groups: take over the hyper-parameters of each parameter group, of Adam's those that
            Adapprox has too; otherwise those of the running optimizer stay.
        load_lr_scheduler: take over the scheduler's state, where there is a scheduler.

    Returns:
        The folder and the client state that was given to ``engine.save_checkpoint``.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged, of an unknown version or not of
            this model. The engine is as it was.
        RuntimeError: the engine's optimizer is not Adapprox.
    """
    place = place_of(engine)
    plans: list[_Plan] = []
    settings: list[dict[str, Any]] = []
    metadata: dict[str, Any] = {}

    def prepare() -> UniversalFolder:
        source = open_universal(files.resolve(folder, files.LATEST_UNIVERSAL))
        _require_same_model(place, source)
        settings.extend(_settings(place, source, load_groups))
        plans.extend(_plan(shard, place, source, settings) for shard in place.shards)
        metadata.update(source.metadata())
        return source

    source = _on_all_ranks(prepare)
    with place.writable_weights():
        for plan in plans:
            _install(plan, place, source, settings[plan.shard.group])
        for name, value in source.fixed():
            place.write_fixed(name, value)
    for group, new in zip(place.optimizer.param_groups, settings, strict=True):
        group.update(new)
    place.adopt_global_state(source.state)
    _install_engine_state(engine, metadata, load_lr_scheduler)
    client = {key: value for key, value in metadata.items() if key not in _ENGINE_KEYS}
    return str(source.path), client


def _on_all_ranks(prepare: Callable[[], UniversalFolder]) -> UniversalFolder:
    """Run ``prepare``; where it fails on one rank it fails on all."""
    from deepspeed import comm

    error: Exception | None = None
    result: UniversalFolder | None = None
    try:
        result = prepare()
    except Exception as caught:  # whatever it is: the other ranks wait below
        error = caught
    messages: list[str | None] = [None] * comm.get_world_size()
    comm.all_gather_object(messages, None if error is None else str(error))
    if isinstance(error, CheckpointError):
        raise error
    if error is not None:
        raise CheckpointError(f"the checkpoint does not fit this run: {error!r}") from error
    for rank, message in enumerate(messages):
        if message is not None:
            raise CheckpointError(f"rank {rank} cannot load the checkpoint: {message}")
    assert result is not None
    return result


def _require_same_model(place: Placement, source: UniversalFolder) -> None:
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
        for file in (files.FP32, files.EXP_AVG, files.EXP_AVG_SQ):
            if file == files.EXP_AVG and not source.has_first_moment(name):
                continue
            _require_shape(source.tensor(name, file), shape, source.file(name, file))
    found = {name: tuple(value.shape) for name, value in source.fixed()}
    expected = {**place.frozen, **place.buffers}
    # DeepSpeed's converter leaves some or all of these out.
    names = {*found, *expected} if source.is_ours else {*found} & {*expected}
    if wrong := sorted(name for name in names if found.get(name) != expected.get(name)):
        raise CheckpointError(
            f"{source.path} holds {wrong[0]!r} with shape {found.get(wrong[0])} where the model "
            f"has {expected.get(wrong[0])}: a frozen parameter or buffer of another model"
        )


def _require_shape(value: Tensor, shape: tuple[int, ...], path: Path) -> None:
    # DeepSpeed's stage 3 converter flattens.
    if tuple(value.shape) in (shape, (math.prod(shape),)):
        return
    raise CheckpointError(
        f"{path} has shape {tuple(value.shape)} where the model has {shape}: it is of another model"
    )


def _settings(place: Placement, source: UniversalFolder, load: bool) -> list[dict[str, Any]]:
    """What each group's settings will be; those that cannot be used raise here."""
    merged = []
    for group, saved in zip(place.optimizer.param_groups, source.groups, strict=True):
        new = {key: group[key] for key in group if key not in _IDENTITY}
        if load:
            kept = {*_IDENTITY, "scope"}
            if saved.get("factor", group["factor"]) != group["factor"]:
                kept |= set(_METHOD)
            if not is_adapprox(saved):
                kept |= set(saved) - set(SHARED_KEYS)
            new.update({key: value for key, value in saved.items() if key not in kept})
        Hyperparameters.of_group(new)
        merged.append(new)
    return merged


def _plan(
    shard: Shard, place: Placement, source: UniversalFolder, settings: list[dict[str, Any]]
) -> _Plan:
    """Factors for one shard's layout; nothing of the engine is touched."""
    h = Hyperparameters.of_group(settings[shard.group])
    target = RankTarget(h.rank_control, h.k0, h.factor)
    dtype, device = compute_dtype(shard.flat.dtype), shard.flat.device
    kept_in = factor_dtype(shard.flat.dtype, h)
    blocks: list[FactoredBlock] = []
    dense: list[tuple[int, Tensor]] = []
    steps = set()
    for part in shard.layout.fragments:
        name = place.names[part.fragment.name]
        whole = source.second_moment(name)
        if whole.blocks and whole.domain != target.domain and part.blocks:
            _log_domain(name, whole.domain, target.domain)
        piece = reshard(whole, part, target)
        for b in piece.blocks:
            b.q, b.u = b.q.to(device, kept_in), b.u.to(device, kept_in)
        blocks.extend(piece.blocks)
        dense.extend((offset, values.to(device, dtype)) for offset, values in piece.runs)
        steps.add(source.step(name))
    if len(steps) > 1:
        raise CheckpointError(
            f"{source.path}: parameters that share a shard here were saved after different "
            f"numbers of steps: {sorted(steps)}"
        )
    runs = tuple((offset, values.numel()) for offset, values in dense)
    held = torch.cat([v for _, v in dense]) if dense else torch.empty(0, dtype=dtype, device=device)
    store = FactorStore(shard.layout.numel, blocks, runs, held, target.domain)
    step = steps.pop() if steps else source.common_step
    return _Plan(shard, step, LowRankMoment(store, shard.flat.shape, shard.flat.dtype), h)


def _log_domain(name: str, saved: str, configured: str) -> None:
    from deepspeed.utils import logger

    logger.warning(
        f"{name}: the checkpoint's factors are those of the {saved}, the optimizer's of the "
        f"{configured}; its blocks are factored anew, one dense tile at a time"
    )


def _install(
    plan: _Plan, place: Placement, source: UniversalFolder, settings: dict[str, Any]
) -> None:
    """Write one shard's weights and state; padding is left alone."""
    flat = plan.shard.flat
    state = place.optimizer.state[flat]
    state[STEP] = torch.tensor(float(plan.step))
    state[SECOND_MOMENT] = plan.moment
    keeps_first = settings["betas"][0] > 0
    held = state.pop(FIRST_MOMENT, None)
    if keeps_first:
        state[FIRST_MOMENT] = _empty_first_moment(held, plan)
        pieces = first_moment_pieces(state[FIRST_MOMENT], plan.shard.layout)
    del held
    saved = source.groups[plan.shard.group]
    weights = flat.detach().view(-1)
    for i, part in enumerate(plan.shard.layout.fragments):
        f = part.fragment
        name = place.names[f.name]
        here, there = slice(f.offset, f.offset + f.numel), slice(f.start, f.start + f.numel)
        weights[here].copy_(source.tensor(name, files.FP32).reshape(-1)[there])
        if not keeps_first:
            continue
        if not source.has_first_moment(name):
            continue  # beta_1 was 0: the mean begins now
        values = source.tensor(name, files.EXP_AVG).reshape(-1)[there]
        if kind_of(saved) != kind_of(settings):
            out = torch.empty(values.shape, dtype=compute_dtype(values.dtype))
            second = source.second_moment(name)
            _convert(values, second, f.start, (saved, settings), plan.step, out)
            values = out
        write_mean(part, pieces[i], values.to(flat.device), rounding_salt(plan.step))


def _empty_first_moment(held: Tensor | None, plan: _Plan) -> Tensor:
    """Zeros as the settings keep them: the tensor that is there where it will do.

    DeepSpeed's links keep that one alive, so that a second would be the peak of memory.
    """
    flat, h = plan.shard.flat, plan.settings
    if held is None or isinstance(held, QuantizedMoment) or h.first_moment == "int8":
        return new_first_moment(flat, plan.shard.layout, h)
    if (held.shape, held.dtype) != (flat.shape, plain_dtype(flat, h)):
        return new_first_moment(flat, plan.shard.layout, h)
    return held.zero_()


def _convert(
    values: Tensor,
    second: FactorStore,
    start: int,
    groups: tuple[dict[str, Any], dict[str, Any]],
    step: int,
    out: Tensor,
) -> None:
    """Write a fragment's first moment as the other kind, a chunk at a time.

    Args:
        values: the first moment, 1-D.
        second: the whole parameter's second moment.
        start: where in the parameter the fragment begins.
        groups: the saved group, and the one that goes on.
        step: steps done.
        out: as long as ``values``.
    """
    saved, new = groups
    from_gradients = kind_of(saved) == GRADIENT
    dtype = compute_dtype(values.dtype)
    normalisation = Normalisation.of_group(saved if from_gradients else new, step)
    change = normalisation.to_updates if from_gradients else normalisation.to_gradients
    for a in range(0, values.numel(), _CHUNK):
        b = min(a + _CHUNK, values.numel())
        out[a:b].copy_(change(values[a:b], second.read(start + a, start + b, dtype)))


def _install_engine_state(engine: Any, metadata: dict[str, Any], scheduler: bool) -> None:
    """Counters and the scheduler, as ``engine.load_checkpoint`` restores them."""
    if scheduler and engine.lr_scheduler is not None and metadata.get("lr_scheduler") is not None:
        engine.lr_scheduler.load_state_dict(metadata["lr_scheduler"])
    engine.global_steps = metadata["global_steps"]
    engine.global_samples = metadata.get(
        "global_samples", engine.global_steps * engine.train_batch_size()
    )
    engine.skipped_steps = metadata["skipped_steps"]
