# SPDX-License-Identifier: Apache-2.0
"""Finds everything in a running engine that a load writes: shards, frozen parameters, buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.core.base import ShardOptimizer
from adapprox_ds.core.compact import CompactTensor
from adapprox_ds.core.layout import ParamFragment, ShardLayout
from adapprox_ds.core.shards import Shard
from adapprox_ds.core.state import FIRST_MOMENT
from adapprox_ds.matrix_views.optimizer import MatrixViews
from adapprox_ds.zero import discover
from adapprox_ds.zero.register import attach

#: The attributes of an engine that a load sets.
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


@dataclass(slots=True)
class Placement:
    """The parts of a DeepSpeed engine, on this process, that a load writes.

    Attributes:
        engine: DeepSpeed's engine.
        optimizer: its Adapprox, MicroAdam or MatrixViews.
        shards: the flat tensors of this process. Their ``group`` is an index in the optimizer's
            present ``param_groups``.
        names: for each name of a parameter in the optimizer, its name in the model.
        trainable: for each trained parameter, by its name in the model, its shape and the index of
            its group in the optimizer's present ``param_groups``.
        frozen: the shapes of the parameters that are not trained, by their names in the model.
        buffers: the shapes of the persistent buffers, by their names in the model.
        aliases: for each further name of a frozen parameter in the model, its name in ``frozen``.
    """

    engine: Any
    optimizer: ShardOptimizer | MatrixViews
    shards: list[Shard]
    names: dict[str, str]
    trainable: dict[str, tuple[tuple[int, ...], int]]
    frozen: dict[str, tuple[int, ...]]
    buffers: dict[str, tuple[int, ...]]
    aliases: dict[str, str]

    @contextmanager
    def writable_weights(self) -> Iterator[None]:
        """A context in which shards and frozen parameters may be written.

        On leaving, the model's parameters are updated from the shards. That is a collective call,
        so all processes have to leave, and all with an error or all without.
        """
        wrapper = self.engine.optimizer
        if hasattr(wrapper, "checkpoint_event_prologue"):
            wrapper.checkpoint_event_prologue()
        try:
            yield
        except Exception:
            self._follow_shards()
            raise
        self._follow_shards()

    def _follow_shards(self) -> None:
        """Update the model's parameters from the shards; a collective call."""
        wrapper = self.engine.optimizer
        if hasattr(wrapper, "fp32_partitioned_groups_flat"):
            for sub_group in range(len(wrapper.fp32_partitioned_groups_flat)):
                wrapper._reassign_or_swap_out_partitioned_parameters(sub_group)
        elif hasattr(wrapper, "update_lp_params"):
            wrapper.update_lp_params()
        else:
            for shard in self.shards:
                for f, p in shard.sources:
                    low = p.detach().view(-1)[f.start : f.start + f.numel]
                    low.copy_(f.view(shard.flat.detach().view(-1)))
        if hasattr(wrapper, "_lazy_init_hp_params_optimizer_state"):
            # The parameters are linked to slices of the state, for safe_get_full_optimizer_state;
            # the state is new, so they have to be linked again.
            wrapper._hp_optimizer_states_linked = False
            wrapper._lazy_init_hp_params_optimizer_state()
        if hasattr(wrapper, "checkpoint_event_epilogue"):
            wrapper.checkpoint_event_epilogue()

    def snapshot(self, fixed: Iterable[str]) -> Callable[[], None]:
        """Copy to main memory what a load will write.

        Compact state is replaced by a load and not written to, so it needs no copy.

        Args:
            fixed: the names of the frozen parameters and buffers that will be written.

        Returns:
            A function that restores everything.
        """
        kept: list[tuple[Tensor, Tensor]] = []
        states = []
        for shard in self.shards:
            state = self.optimizer.state.get(shard.flat)
            states.append((shard.flat, None if state is None else dict(state)))
            first = (state or {}).get(FIRST_MOMENT)
            written = [shard.flat.detach()]
            if isinstance(first, Tensor) and not isinstance(first, CompactTensor):
                written.append(first)
            kept += [(tensor, _copy(tensor)) for tensor in written]
        held = [tensor for name in fixed if (tensor := self._fixed(name)) is not None]
        kept += [(tensor, _copy(tensor)) for tensor in held]
        groups = [
            {k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups
        ]
        engine, wrapper = self.engine, self.engine.optimizer
        counters = {name: getattr(engine, name) for name in _COUNTERS}
        scheduler = engine.lr_scheduler
        schedule = None if scheduler is None else deepcopy(scheduler.state_dict())
        scaler = getattr(wrapper, "loss_scaler", None)

        def undo() -> None:
            with torch.no_grad():
                for tensor, copy in kept:
                    tensor.copy_(copy)
            for flat, state in states:
                if state is None:
                    self.optimizer.state.pop(flat, None)
                else:
                    self.optimizer.state[flat] = state
            if schedule is not None:
                scheduler.load_state_dict(schedule)
            for group, before in zip(self.optimizer.param_groups, groups, strict=True):
                for key in group.keys() - before.keys() - {"params"}:
                    del group[key]
                group.update(before)
            for name, value in counters.items():
                setattr(engine, name, value)
            if scaler is not None:
                wrapper.loss_scaler = scaler

        return undo

    def _fixed(self, name: str) -> Tensor | None:
        """The tensor to write for a frozen parameter or a buffer.

        Returns:
            The buffer, the parameter, or, at stage 3, this process's part of the parameter, 1-D;
            None where the model has neither of that name.
        """
        name = self.aliases.get(name, name)
        if name in self.buffers:
            held: Tensor = self.engine.module.get_buffer(name)
            return held
        if name not in self.frozen:
            return None
        p: Any = self.engine.module.get_parameter(name)
        held = p.ds_tensor if hasattr(p, "ds_tensor") else p
        return held.detach()

    def write_fixed(self, name: str, value: Tensor) -> None:
        """Write a frozen parameter or a buffer; do nothing if the model has none of that name.

        Args:
            name: its name in the model.
            value: the whole tensor, of which a process writes its own part at stage 3.
        """
        held = self._fixed(name)
        if held is None:
            return
        name = self.aliases.get(name, name)
        p: Any = None if name in self.buffers else self.engine.module.get_parameter(name)
        with torch.no_grad():
            if not hasattr(p, "ds_tensor"):
                held.copy_(value.view(held.shape))
                return
            start = discover.process_number(p.ds_process_group) * held.numel()
            part = value.reshape(-1)[start : start + held.numel()]
            held.view(-1)[: part.numel()].copy_(part)

    def adopt_global_state(self, saved: Mapping[str, Any]) -> None:
        """Load the loss scaler, if both runs use the same class of scaler.

        Args:
            saved: the content of ``zero/optimizer_state.pt``.
        """
        wrapper, scaler = self.engine.optimizer, saved.get("loss_scaler")
        if scaler is not None and type(scaler) is type(getattr(wrapper, "loss_scaler", None)):
            wrapper.loss_scaler = scaler


def read_placement(engine: Any) -> Placement:
    """Find everything in an engine that a load writes.

    Raises:
        RuntimeError: the engine's optimizer is none of this package, its parallelism is not by data
            alone, or a shard does not contain what DeepSpeed's tables say.
    """
    optimizer = attach(engine)
    if getattr(engine, "mp_world_size", 1) > 1 or getattr(engine, "has_moe_layers", False):
        raise RuntimeError(
            "load_universal handles data-parallel training only; for tensor-, pipeline- or "
            'expert-parallel models set "checkpoint": {"load_universal": true} and use '
            "engine.load_checkpoint"
        )
    wrapper = engine.optimizer
    recorded = optimizer.shards.recorded
    shards = (
        _plain_shards(optimizer)
        if wrapper is optimizer
        else discover.from_wrapper(wrapper, optimizer.shards)
    )
    layouts = optimizer.shards.layouts  # these are split for the configured scope
    numbers = discover.present_groups(wrapper, optimizer, shards)
    shards = [
        replace(s, layout=layouts.get(s.flat, s.layout), group=numbers[s.group]) for s in shards
    ]
    model_names = {id(p): name for name, p in engine.module.named_parameters()}
    stepped = _stepped(wrapper, optimizer)
    names, trainable = {}, {}
    for group, entries in enumerate(recorded):
        for entry in entries:
            p = entry.param
            if id(p) in stepped:
                names[entry.name] = model_names[id(p)]
                trainable[model_names[id(p)]] = (_shape(p), numbers[group])
    frozen = {
        name: _shape(p) for name, p in engine.module.named_parameters() if name not in trainable
    }
    aliases = {
        name: model_names[id(p)]
        for name, p in engine.module.named_parameters(remove_duplicate=False)
        if name != model_names[id(p)] and model_names[id(p)] in frozen
    }
    persistent = set(engine._get_buffer_names())
    buffers = {
        name: tuple(b.shape)
        for name, b in engine.module.named_buffers(remove_duplicate=False)
        if name in persistent
    }
    return Placement(engine, optimizer, shards, names, trainable, frozen, buffers, aliases)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True)


def _stepped(wrapper: Any, optimizer: ShardOptimizer | MatrixViews) -> set[int]:
    """The ids of the parameters that the optimizer steps.

    Some of them may have been frozen since the optimizer was built.
    """
    for groups in ("round_robin_bit16_groups", "bf16_groups", "fp16_groups"):
        if hasattr(wrapper, groups):
            return {id(p) for group in getattr(wrapper, groups) for p in group}
    params: list[Any] = [entry.param for group in optimizer.shards.recorded for entry in group]
    return {id(p) for p in params if p.numel() and (p.requires_grad or optimizer.state.get(p))}


def _plain_shards(optimizer: ShardOptimizer | MatrixViews) -> list[Shard]:
    """A shard for each parameter that is stepped itself (stage 0 in fp32)."""
    shards = []
    stepped = _stepped(optimizer, optimizer)
    for group, entries in enumerate(optimizer.shards.recorded):
        for entry in entries:
            p = entry.param
            if id(p) not in stepped:
                continue
            fragment = ParamFragment(entry.name, tuple(p.shape), 0, p.numel(), 0)
            layout = ShardLayout.of_parameter(entry.name, p.shape)
            shards.append(Shard(p, group, layout, ((fragment, p),)))
    return shards


def _shape(p: Any) -> tuple[int, ...]:
    return tuple(p.ds_shape) if hasattr(p, "ds_shape") else tuple(p.shape)
