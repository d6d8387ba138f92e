# SPDX-License-Identifier: Apache-2.0
"""Reads the checkpoint that ``engine.save_checkpoint`` writes, and finds each parameter's parts.

Files are mapped, and what lies where is derived from ``param_shapes`` and the padding that
DeepSpeed records, so a reader touches only the pages of the parameter at hand. The order in
``param_shapes`` is that of the flat tensors, which DeepSpeed's own ``param_slice_mappings`` is not
under ``round_robin_gradients`` (runtime/zero/stage_1_and_2.py, _link_all_hp_params).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.checkpoint.files import CheckpointError, read
from adapprox_ds.core.layout import ParamFragment
from adapprox_ds.core.rounding import load_weights
from adapprox_ds.core.state import COMPENSATION
from adapprox_ds.matrix_views.unit import STATE_KEYS, WHOLE_KEYS
from adapprox_ds.zero.compat import checkpoint_files, zero_rank

#: In the groups of a checkpoint that MatrixViews saved, here and in a universal folder: the names
#: of its classes.
VIEWS = "views"


@dataclass(frozen=True, slots=True)
class Held:
    """One rank's part of a parameter.

    Attributes:
        rank: the data-parallel rank.
        flat: index of the flat tensor (parameter group or ZeRO-3 sub-group).
        fragment: what lies where in it.
    """

    rank: int
    flat: int
    fragment: ParamFragment


@dataclass(slots=True)
class SavedParameter:
    """A trainable parameter of the checkpoint."""

    name: str
    shape: tuple[int, ...]
    group: int
    held: list[Held] = field(default_factory=list)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(slots=True)
class NativeCheckpoint:
    """An open checkpoint of ZeRO stage 1, 2 or 3, or BF16_Optimizer.

    Attributes:
        folder: where its files are.
        stage: 1, 2 or 3.
        ranks: each rank's optimizer state, as DeepSpeed saved it; tensors are mapped.
        models: the model state files' contents; one a rank at stage 3.
        model_files: their paths.
        parameters: the trainable parameters by name.
        groups: the optimizer's parameter groups.
        corrected: how many slice addresses of DeepSpeed's were wrong (round-robin order).
    """

    folder: Path
    stage: int
    ranks: list[dict[str, Any]]
    models: list[dict[str, Any]]
    model_files: list[Path]
    parameters: dict[str, SavedParameter]
    groups: list[dict[str, Any]]
    corrected: int = 0

    @property
    def world(self) -> int:
        """Number of data-parallel ranks that saved."""
        return len(self.ranks)

    def state(self, rank: int, flat: int) -> Mapping[str, Any]:
        """The optimizer state of one flat tensor.

        Raises:
            CheckpointError: there is none.
        """
        state = _base_state(self.ranks[rank], self.stage)["state"].get(flat)
        if not state:
            raise CheckpointError(
                f"rank {rank} of {self.folder} holds no optimizer state for flat tensor {flat}: "
                "saved before the first step; train a step first"
            )
        return dict(state)

    def numel(self, flat: int) -> int:
        """The length of one flat tensor, with its padding, the same on all ranks."""
        state = self.state(0, flat)
        return int(state["numel"]) if "numel" in state else self.second(0, flat).numel()

    def second(self, rank: int, flat: int) -> Tensor:
        """The second moment of one flat tensor, dense or a ``LowRankMoment``.

        Raises:
            CheckpointError: there is none.
        """
        moment = self.state(rank, flat).get("exp_avg_sq")
        if not isinstance(moment, Tensor):
            raise CheckpointError(
                f"{self.folder} holds no exp_avg_sq: it was trained by an optimizer that is "
                "neither an Adam nor one of this package, whose checkpoints alone can be converted"
            )
        return moment

    def master(self, held: Held) -> Tensor:
        """The weights of a fragment as the optimizer has them, 1-D: in fp32, or bf16 or fp16."""
        key = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
        return _cut(self.ranks[held.rank][key][held.flat], held)

    def weights(self, held: Held) -> Tensor:
        """The weights of a fragment in full, 1-D: with their compensation, where one was kept."""
        master = self.master(held)
        rest = self.state(held.rank, held.flat).get(COMPENSATION)
        if rest is None:
            return master
        return load_weights(master, _cut(rest, held), torch.float32)

    def compensation_bytes(self, held: Held) -> int:
        """What a fragment's compensation takes, if one was kept."""
        rest = self.state(held.rank, held.flat).get(COMPENSATION)
        return 0 if rest is None else held.fragment.numel

    def first(self, held: Held) -> Tensor | None:
        """A fragment's ``exp_avg``, 1-D; None where the optimizer keeps none (beta_1 = 0)."""
        value = self.state(held.rank, held.flat).get("exp_avg")
        return None if value is None else _cut(value, held)

    def frozen(self) -> Iterator[tuple[str, tuple[int, ...], list[Tensor]]]:
        """Name, shape and consecutive flat parts of each parameter that is not trained.

        Those that ``exclude_frozen_parameters`` left out are not there; one that was frozen while
        saving, but is the optimizer's, is trained.
        """
        model = self.models[0]
        shapes = model.get("frozen_param_shapes") or {}
        if self.stage == 3:
            fragments = [m.get("frozen_param_fragments") or {} for m in self.models]
            for name, shape in shapes.items():
                if name not in self.parameters:
                    yield name, tuple(shape), [f[name].reshape(-1) for f in fragments if name in f]
            return
        aliases = set(model.get("shared_params") or {})
        known = set(self.parameters) | set(model["buffer_names"])
        module = {n: v for n, v in model["module"].items() if isinstance(v, Tensor)}
        # DeepSpeed does not list the second name of a module whose names have one parent.
        seen = {_memory(module[name]) for name in known if name in module}
        for name, value in module.items():
            if name in known or name in aliases or (value.numel() and _memory(value) in seen):
                continue
            seen.add(_memory(value))
            yield name, tuple(value.shape), [value.reshape(-1)]

    def buffers(self) -> dict[str, Tensor]:
        """The model's persistent buffers."""
        model = self.models[0]
        return {name: model["module"][name] for name in model["buffer_names"]}


def _memory(value: Tensor) -> tuple[Any, ...]:
    """Equal for the names of one tensor: a file keeps what shares memory together."""
    return value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride()


def _cut(flat: Tensor, held: Held) -> Tensor:
    return flat[held.fragment.offset : held.fragment.offset + held.fragment.numel]


def _base_state(optimizer: Mapping[str, Any], stage: int) -> Mapping[str, Any]:
    key = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
    base: Mapping[str, Any] = optimizer[key]
    return base


@lru_cache(maxsize=1)
def open_native(folder: Path, trusted: bool = False) -> NativeCheckpoint:
    """Open a checkpoint folder (the one named after a tag) and check that it is complete.

    Of objects, only DeepSpeed's own that are safe to load are taken, unless ``trusted``: then all
    that ``engine.load_checkpoint`` takes, which can run any code.

    Raises:
        CheckpointError: it is no checkpoint of ZeRO, a rank's file is missing or unreadable, or
            it is tensor-, pipeline- or expert-parallel.
    """
    try:
        optimizer_files, model_files = checkpoint_files(folder)
    except FileNotFoundError as error:
        trainers = sorted(path.name for path in folder.glob("checkpoint-*"))
        inside = f" ({folder / trainers[-1]} looks like one of the Trainer's)" if trainers else ""
        raise CheckpointError(
            f"{folder} is no checkpoint of ZeRO ({error}); give the folder that is named after "
            f"the tag{inside}. At stage 0 DeepSpeed saves no shards: resume with "
            "engine.load_checkpoint"
        ) from error
    foreign = any(zero_rank(f) is None for f in optimizer_files)
    parallel = [f for f in optimizer_files if "_mp_rank_00_" not in f.name]
    parallel += [f for f in model_files if "_expert_" in f.name]
    if parallel or foreign:
        raise CheckpointError(
            f"{folder} is tensor-, pipeline- or expert-parallel, which adapprox_ds cannot "
            "convert; use deepspeed.checkpoint.ds_to_universal (a dense second moment)"
        )
    files = [read(f, trusted=trusted) for f in optimizer_files]
    for path, content in zip(optimizer_files, files, strict=True):
        if not isinstance(content, dict) or "optimizer_state_dict" not in content:
            raise CheckpointError(f"{path} is no optimizer state of DeepSpeed's ZeRO")
    ranks = [content["optimizer_state_dict"] for content in files]
    stage = int(ranks[0].get("zero_stage", 1))
    _require_all_ranks(folder, optimizer_files, ranks[0]["partition_count"])
    if stage == 3:
        _require_all_ranks(folder, model_files, len(ranks))
    base = _base_state(ranks[0], stage)
    checkpoint = NativeCheckpoint(
        folder=folder,
        stage=stage,
        ranks=ranks,
        models=[read(f, trusted=trusted) for f in model_files],
        model_files=model_files,
        parameters={},
        groups=[dict(group) for group in base["param_groups"]],
    )
    _mark_views(checkpoint, base["state"])
    if stage == 3:
        _locate_zero3(checkpoint)
    else:
        config = files[0].get("ds_config") or {}
        zero = config.get("zero_optimization") or {} if isinstance(config, dict) else {}
        _locate_zero12(checkpoint, bool(zero.get("round_robin_gradients")))
    return checkpoint


def _mark_views(checkpoint: NativeCheckpoint, states: Mapping[Any, Any]) -> None:
    """Note in the groups whether MatrixViews saved them.

    Raises:
        CheckpointError: it did, with a state that belongs to the partition.
    """
    for state in states.values():
        if set(state) == STATE_KEYS:
            raise CheckpointError(
                f"{checkpoint.folder} was saved by MatrixViews with scope='partition', whose state "
                "belongs to the partition; resume with engine.load_checkpoint on as many ranks, or "
                "train with scope='matrix', whose checkpoints can be converted"
            )
        if set(state) == WHOLE_KEYS:
            for group in checkpoint.groups:
                group[VIEWS] = dict(state["classes"])


def _require_all_ranks(folder: Path, files: Sequence[Path], count: int | Sequence[int]) -> None:
    """Raise unless there is one file a rank."""
    counts = {count} if isinstance(count, int) else set(count)
    if len(counts) != 1:
        raise CheckpointError(
            f"{folder} is expert-parallel (partitions {sorted(counts)}), which adapprox_ds cannot "
            "convert; use deepspeed.checkpoint.ds_to_universal (a dense second moment)"
        )
    world = counts.pop()
    found = {zero_rank(f) for f in files}
    if missing := sorted(set(range(world)) - found):
        raise CheckpointError(
            f"{folder} was saved by {world} ranks and the files of {missing} are missing; copy "
            "them too (every node writes its own)"
        )


def _locate_zero3(c: NativeCheckpoint) -> None:
    """Each parameter is split evenly into slots; a sub-group's slots of a rank lie end to end."""
    group_of = {flat: g for g, group in enumerate(c.groups) for flat in group["params"]}
    for flat, shapes in enumerate(c.models[0]["param_shapes"]):
        offset = 0
        for name, shape in shapes.items():
            parameter = SavedParameter(name, tuple(shape), group_of[flat])
            slot = -(-parameter.numel // c.world)
            for rank in range(c.world):
                numel = min(slot, parameter.numel - rank * slot)
                if numel > 0:
                    span = ParamFragment(name, parameter.shape, rank * slot, numel, offset)
                    parameter.held.append(Held(rank, flat, span))
            c.parameters[name] = parameter
            offset += slot


def _locate_zero12(c: NativeCheckpoint, round_robin: bool) -> None:
    """A group's parameters lie end to end; each rank owns one of ``world`` equal parts of it."""
    paddings = c.ranks[0].get("param_alignment_paddings")
    for flat, shapes in enumerate(c.models[0]["param_shapes"]):
        size = c.numel(flat)
        begin = 0
        for i, (name, shape) in enumerate(shapes.items()):
            parameter = SavedParameter(name, tuple(shape), flat)
            end = begin + parameter.numel
            for rank in range(begin // size, -(-end // size)):
                lo, hi = max(begin, rank * size), min(end, (rank + 1) * size)
                span = ParamFragment(name, parameter.shape, lo - begin, hi - lo, lo - rank * size)
                parameter.held.append(Held(rank, flat, span))
            c.parameters[name] = parameter
            begin = end + (paddings[flat][i] if paddings else 0)
    c.corrected = sum(_differs(c, h) for p in c.parameters.values() for h in p.held)
    if c.corrected and not round_robin:
        raise CheckpointError(
            f"{c.folder}: {c.corrected} slice addresses (param_slice_mappings) contradict "
            "param_shapes; the checkpoint is damaged or of a DeepSpeed that adapprox_ds does not "
            "know"
        )


def _differs(c: NativeCheckpoint, held: Held) -> bool:
    """Whether DeepSpeed's own address of a fragment is another."""
    address = c.ranks[held.rank]["param_slice_mappings"][held.flat].get(held.fragment.name)
    ours = (held.fragment.offset, held.fragment.numel)
    return address is None or (address.start, address.numel) != ours
