# SPDX-License-Identifier: Apache-2.0
"""Where an engine keeps what a checkpoint restores: shards, frozen parameters, buffers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.optim.base import ShardOptimizer
from adapprox_ds.zero import discover
from adapprox_ds.zero.discover import Shard
from adapprox_ds.zero.layout import ParamFragment, ShardLayout


@dataclass(slots=True)
class Placement:
    """One rank of a DeepSpeed engine, seen as what a checkpoint has to fill.

    Attributes:
        engine: DeepSpeed's.
        optimizer: its Adapprox or MicroAdam.
        shards: the flat tensors of this rank.
        names: the model's name of a parameter by the one that the optimizer knows it by.
        trainable: (shape, index among the optimizer's groups now) by the model's name.
        frozen: shapes of the parameters that are not trained, by name.
        buffers: shapes of the persistent buffers, by name.
    """

    engine: Any
    optimizer: ShardOptimizer
    shards: list[Shard]
    names: dict[str, str]
    trainable: dict[str, tuple[tuple[int, ...], int]]
    frozen: dict[str, tuple[int, ...]]
    buffers: dict[str, tuple[int, ...]]

    @contextmanager
    def writable_weights(self) -> Iterator[None]:
        """Within it shards and frozen parameters may be written; then the model follows them."""
        wrapper = self.engine.optimizer
        if hasattr(wrapper, "checkpoint_event_prologue"):
            wrapper.checkpoint_event_prologue()
        yield
        if hasattr(wrapper, "fp32_partitioned_groups_flat"):
            for sub_group in range(len(wrapper.fp32_partitioned_groups_flat)):
                wrapper._reassign_or_swap_out_partitioned_parameters(sub_group)
        elif hasattr(wrapper, "update_lp_params"):
            wrapper.update_lp_params()
        else:
            for shard in self.shards:
                for f, p in shard.sources:
                    low = p.detach().view(-1)[f.start : f.start + f.numel]
                    low.copy_(shard.flat.detach().view(-1)[f.offset : f.offset + f.numel])
        if hasattr(wrapper, "_lazy_init_hp_params_optimizer_state"):
            # safe_get_full_optimizer_state reads slices of the state that they were linked to.
            wrapper._hp_optimizer_states_linked = False
            wrapper._lazy_init_hp_params_optimizer_state()
        if hasattr(wrapper, "checkpoint_event_epilogue"):
            wrapper.checkpoint_event_epilogue()

    def write_fixed(self, name: str, value: Tensor) -> None:
        """Fill a buffer, or a frozen parameter or this rank's part of it (stage 3)."""
        with torch.no_grad():
            if name in self.buffers:
                self.engine.module.get_buffer(name).copy_(value)
            elif name in self.frozen:
                p: Any = self.engine.module.get_parameter(name)
                if not hasattr(p, "ds_tensor"):
                    p.copy_(value.view(p.shape))
                    return
                slot = p.ds_tensor.numel()
                start = discover.rank_in(p.ds_process_group) * slot
                part = value.reshape(-1)[start : start + slot]
                p.ds_tensor.view(-1)[: part.numel()].copy_(part)

    def adopt_global_state(self, saved: Mapping[str, Any]) -> None:
        """Take over the loss scale, where both runs scale the loss in the same way."""
        wrapper, scaler = self.engine.optimizer, saved.get("loss_scaler")
        if scaler is not None and type(scaler) is type(getattr(wrapper, "loss_scaler", None)):
            wrapper.loss_scaler = scaler


def place_of(engine: Any) -> Placement:
    """Read off an engine where everything is.

    Raises:
        RuntimeError: its optimizer is none of ours, the model is parallel in another way than by
            data, or a shard does not hold what DeepSpeed's tables say.
    """
    from adapprox_ds.zero.register import attach

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
    layouts = optimizer.shards.layouts  # those of the configured scope
    numbers = discover.numbers_now(wrapper, optimizer, shards)
    shards = [
        replace(s, layout=layouts.get(s.flat, s.layout), group=numbers[s.group]) for s in shards
    ]
    model_names = {id(p): name for name, p in engine.module.named_parameters()}
    names, trainable = {}, {}
    for group, entries in enumerate(recorded):
        for entry in entries:
            p = entry.param
            if p.requires_grad and _numel(p):
                names[entry.name] = model_names[id(p)]
                trainable[model_names[id(p)]] = (_shape(p), numbers[group])
    frozen = {
        name: _shape(p) for name, p in engine.module.named_parameters() if name not in trainable
    }
    persistent = set(engine._get_buffer_names())
    buffers = {
        name: tuple(b.shape)
        for name, b in engine.module.named_buffers(remove_duplicate=False)
        if name in persistent
    }
    return Placement(engine, optimizer, shards, names, trainable, frozen, buffers)


def _plain_shards(optimizer: ShardOptimizer) -> list[Shard]:
    """Every parameter as its own flat tensor (stage 0 in fp32)."""
    shards = []
    for group, entries in enumerate(optimizer.shards.recorded):
        for entry in entries:
            p = entry.param
            fragment = ParamFragment(entry.name, tuple(p.shape), 0, p.numel(), 0)
            layout = ShardLayout.of_parameter(entry.name, p.shape)
            shards.append(Shard(p, group, layout, ((fragment, p),)))
    return shards


def _shape(p: Any) -> tuple[int, ...]:
    return tuple(p.ds_shape) if hasattr(p, "ds_shape") else tuple(p.shape)


def _numel(p: Any) -> int:
    return int(p.ds_numel) if hasattr(p, "ds_numel") else int(p.numel())
