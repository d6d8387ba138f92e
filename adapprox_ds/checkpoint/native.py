# SPDX-License-Identifier: Apache-2.0
"""Reads a checkpoint of ``engine.save_checkpoint``, and finds the parts of each parameter in it.

Files are memory-mapped, so that reading a parameter touches only the pages that contain it. The
offset of each part is derived from ``param_shapes`` and the padding that DeepSpeed records. The
parameters lie in the flat tensors in the order of ``param_shapes``; DeepSpeed's own
``param_slice_mappings`` is in another order under ``round_robin_gradients``
(runtime/zero/stage_1_and_2.py, _link_all_hp_params).
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
from adapprox_ds.zero.partition import cut, slot_of

#: A key that is added to the parameter groups of a checkpoint that MatrixViews saved, also in a
#: universal folder; its value has the names of the classes that MatrixViews wrapped.
VIEWS = "views"


@dataclass(frozen=True, slots=True)
class SavedPart:
    """The part of a parameter that one process saved.

    Attributes:
        process: the number of the process among those of data parallelism; DeepSpeed's "dp rank",
            which the names of its files contain.
        flat: the index of the flat tensor, which is that of the parameter group or, at stage 3, of
            the sub-group.
        fragment: the elements of the parameter, and their offset in the flat tensor.
    """

    process: int
    flat: int
    fragment: ParamFragment


@dataclass(slots=True)
class SavedParameter:
    """A trainable parameter of the checkpoint.

    Attributes:
        name: the name that the model gives it.
        shape: the shape of the whole parameter.
        group: the index of its parameter group.
        parts: the parts that the processes saved, in the order of their elements.
    """

    name: str
    shape: tuple[int, ...]
    group: int
    parts: list[SavedPart] = field(default_factory=list)

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(slots=True)
class NativeCheckpoint:
    """An open checkpoint of ZeRO stage 1, 2 or 3, or BF16_Optimizer.

    Attributes:
        folder: the folder of its files.
        stage: the ZeRO stage: 1, 2 or 3.
        optimizer_states: for each process the optimizer state as DeepSpeed saved it, with tensors
            mapped.
        models: the contents of the files of model state; at stage 3 one for each process.
        model_files: the paths of these files.
        parameters: the trainable parameters by name.
        groups: the optimizer's parameter groups.
        corrected: the number of parts whose address in DeepSpeed's ``param_slice_mappings`` is
            wrong.
    """

    folder: Path
    stage: int
    optimizer_states: list[dict[str, Any]]
    models: list[dict[str, Any]]
    model_files: list[Path]
    parameters: dict[str, SavedParameter]
    groups: list[dict[str, Any]]
    corrected: int = 0

    @property
    def world(self) -> int:
        """The number of processes that saved."""
        return len(self.optimizer_states)

    def state(self, process: int, flat: int) -> Mapping[str, Any]:
        """The optimizer state that a process saved for one of its flat tensors.

        Raises:
            CheckpointError: there is none.
        """
        state = _base_state(self.optimizer_states[process], self.stage)["state"].get(flat)
        if not state:
            raise CheckpointError(
                f"rank {process} of {self.folder} holds no optimizer state for flat tensor {flat}: "
                "saved before the first step; train a step first"
            )
        return dict(state)

    def numel(self, flat: int) -> int:
        """The length of a flat tensor, with its padding; it is the same on all processes."""
        state = self.state(0, flat)
        return int(state["numel"]) if "numel" in state else self.second_moment(0, flat).numel()

    def second_moment(self, process: int, flat: int) -> Tensor:
        """The second moment of a whole flat tensor, dense or a ``LowRankMoment``.

        Raises:
            CheckpointError: there is none.
        """
        moment = self.state(process, flat).get("exp_avg_sq")
        if not isinstance(moment, Tensor):
            raise CheckpointError(
                f"{self.folder} holds no exp_avg_sq: it was trained by an optimizer that is "
                "neither an Adam nor one of this package, whose checkpoints alone can be converted"
            )
        return moment

    def master(self, part: SavedPart) -> Tensor:
        """The optimizer's copy of the weights of a part, (numel,), in fp32, or bf16 or fp16."""
        key = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
        return part.fragment.view(self.optimizer_states[part.process][key][part.flat])

    def weights(self, part: SavedPart) -> Tensor:
        """As :meth:`master`, but in fp32 with the compensation added, where one was saved."""
        master = self.master(part)
        compensation = self.state(part.process, part.flat).get(COMPENSATION)
        if compensation is None:
            return master
        return load_weights(master, part.fragment.view(compensation), torch.float32)

    def compensation_bytes(self, part: SavedPart) -> int:
        """The bytes of a part's compensation; 0 where none was saved."""
        compensation = self.state(part.process, part.flat).get(COMPENSATION)
        return 0 if compensation is None else part.fragment.numel

    def first_moment(self, part: SavedPart) -> Tensor | None:
        """The first moment of a part, (numel,); None where none was saved (beta_1 = 0)."""
        value = self.state(part.process, part.flat).get("exp_avg")
        return None if value is None else part.fragment.view(value)

    def frozen(self) -> Iterator[tuple[str, tuple[int, ...], list[Tensor]]]:
        """Yield name, shape and consecutive 1-D parts of each saved parameter that is not trained.

        A parameter is trained if the optimizer has it, even if it was frozen when it was saved.
        ``exclude_frozen_parameters`` leaves parameters out of a checkpoint, and so out of this.
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
        # DeepSpeed does not list all names of a shared parameter, so those with equal memory are
        # taken for names of one parameter.
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
    """A key that is equal for tensors that share their memory; a file keeps such sharing."""
    return value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride()


def _base_state(optimizer: Mapping[str, Any], stage: int) -> Mapping[str, Any]:
    key = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
    base: Mapping[str, Any] = optimizer[key]
    return base


@lru_cache(maxsize=1)
def open_native(folder: Path, trusted: bool = False) -> NativeCheckpoint:
    """Open a checkpoint, and check that it is complete.

    Args:
        folder: the checkpoint's folder, which is named after its tag.
        trusted: whether to load objects of any class, which can run any code, as
            ``engine.load_checkpoint`` does. Otherwise only tensors, plain data and some safe
            classes of DeepSpeed's are loaded.

    Raises:
        CheckpointError: the folder is no checkpoint of ZeRO, a process's file is missing or
            unreadable, or the checkpoint is tensor-, pipeline- or expert-parallel.
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
    states = [content["optimizer_state_dict"] for content in files]
    stage = int(states[0].get("zero_stage", 1))
    _require_all_files(folder, optimizer_files, states[0]["partition_count"])
    if stage == 3:
        _require_all_files(folder, model_files, len(states))
    base = _base_state(states[0], stage)
    checkpoint = NativeCheckpoint(
        folder=folder,
        stage=stage,
        optimizer_states=states,
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
    """Add ``VIEWS`` to the parameter groups if MatrixViews saved them.

    Args:
        checkpoint: the checkpoint, whose groups are changed.
        states: the optimizer states of one process's flat tensors.

    Raises:
        CheckpointError: MatrixViews saved with the scope "partition", whose state cannot be moved.
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


def _require_all_files(folder: Path, files: Sequence[Path], count: int | Sequence[int]) -> None:
    """Raise unless there is a file of each process.

    Args:
        folder: the checkpoint.
        files: the paths of the files.
        count: the number of processes, or that of each parameter group.
    """
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
    """Fill in the parameters of a checkpoint of stage 3.

    A process's slots of the parameters of a sub-group lie end to end in its flat tensor.
    """
    group_of = {flat: g for g, group in enumerate(c.groups) for flat in group["params"]}
    for flat, shapes in enumerate(c.models[0]["param_shapes"]):
        offset = 0
        for name, shape in shapes.items():
            parameter = SavedParameter(name, tuple(shape), group_of[flat])
            slot = slot_of(parameter.numel, c.world)
            for process, start, numel in cut(0, parameter.numel, slot) if slot else ():
                span = ParamFragment(name, parameter.shape, start, numel, offset)
                parameter.parts.append(SavedPart(process, flat, span))
            c.parameters[name] = parameter
            offset += slot


def _locate_zero12(c: NativeCheckpoint, round_robin: bool) -> None:
    """Fill in the parameters of a checkpoint of stage 1 or 2.

    A group's parameters lie end to end, with padding between them.

    Args:
        c: the checkpoint.
        round_robin: whether the run had ``round_robin_gradients``, under which DeepSpeed's
            ``param_slice_mappings`` are wrong.

    Raises:
        CheckpointError: DeepSpeed's addresses differ from those found here, without round robin.
    """
    paddings = c.optimizer_states[0].get("param_alignment_paddings")
    for flat, shapes in enumerate(c.models[0]["param_shapes"]):
        size = c.numel(flat)
        begin = 0
        for i, (name, shape) in enumerate(shapes.items()):
            parameter = SavedParameter(name, tuple(shape), flat)
            for process, start, numel in cut(begin, parameter.numel, size):
                offset = begin + start - process * size
                span = ParamFragment(name, parameter.shape, start, numel, offset)
                parameter.parts.append(SavedPart(process, flat, span))
            c.parameters[name] = parameter
            begin += parameter.numel + (paddings[flat][i] if paddings else 0)
    c.corrected = sum(_differs(c, part) for p in c.parameters.values() for part in p.parts)
    if c.corrected and not round_robin:
        raise CheckpointError(
            f"{c.folder}: {c.corrected} slice addresses (param_slice_mappings) contradict "
            "param_shapes; the checkpoint is damaged or of a DeepSpeed that adapprox_ds does not "
            "know"
        )


def _differs(c: NativeCheckpoint, part: SavedPart) -> bool:
    """Whether DeepSpeed's address of a part, in ``param_slice_mappings``, is another one."""
    addresses = c.optimizer_states[part.process]["param_slice_mappings"][part.flat]
    address = addresses.get(part.fragment.name)
    ours = (part.fragment.offset, part.fragment.numel)
    return address is None or (address.start, address.numel) != ours
