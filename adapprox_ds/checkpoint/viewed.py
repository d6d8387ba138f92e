# SPDX-License-Identifier: Apache-2.0
"""The state of MatrixViews with the scope "matrix" in a checkpoint: each parameter's own, whole.

A parameter's state is what its class holds of it, tensors of any shape and numbers, on one process.
It goes as it is to the process that steps the parameter next. Only parameters of groups with
``"vectors": True`` may be stepped in parts; what a class holds by element of these is joined and
cut anew, and the rest, such as a step count, has to be the same in all parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapprox_ds.checkpoint import files
from adapprox_ds.checkpoint.family import Family, StateSize, register
from adapprox_ds.checkpoint.files import CheckpointError
from adapprox_ds.checkpoint.folder import UniversalFolder
from adapprox_ds.checkpoint.native import VIEWS, NativeCheckpoint, SavedParameter
from adapprox_ds.checkpoint.place import Placement
from adapprox_ds.core.layout import ParamFragment
from adapprox_ds.core.shards import Shard
from adapprox_ds.matrix_views.gather import whole_shape
from adapprox_ds.matrix_views.optimizer import MatrixViews
from adapprox_ds.matrix_views.unit import MATRICES, VECTORS, differs

#: What a class can do whose state of a parameter's parts does not fit together.
_REMEDY = 'leave "vectors": True out of its group, so that the parameter is stepped whole'


@register
class ViewedState(Family):
    """A state dict for each parameter."""

    optimizers = ("MatrixViews",)

    def owns(self, group: Mapping[str, Any]) -> bool:
        """Whether a saved parameter group is of MatrixViews (``open_native`` marks it)."""
        return VIEWS in group

    def describe(self, groups: Sequence[Mapping[str, Any]]) -> str:
        """Whose state it is."""
        return f"MatrixViews of {' and '.join(groups[0][VIEWS].values())}"

    def check(self, optimizer: Any, settings: Mapping[str, Any]) -> None:
        """Nothing: a class refuses settings when it is made."""

    def step(self, checkpoint: NativeCheckpoint, parameter: SavedParameter) -> int:
        """Steps done, as far as the class counts them; else 0."""
        whole = _saved(checkpoint, parameter)
        return int(whole["state"].get("step", whole["options"].get("step", 0)))

    def whole(
        self, checkpoint: NativeCheckpoint, parameter: SavedParameter, step: int, dense: bool
    ) -> dict[str, Any]:
        """The parameter's state, its shape there, and what the class keeps in its group.

        Raises:
            CheckpointError: a dense second moment is asked for, or parts do not fit together.
        """
        if dense:
            raise CheckpointError(
                f"{checkpoint.folder} is of {self.describe(checkpoint.groups)}, of which no "
                "moments of Adam can be made; allowed: second_moment='as-saved'"
            )
        return {files.VIEWED: _mapped(_saved(checkpoint, parameter), files.compact)}

    def files(self, source: UniversalFolder, name: str) -> Sequence[str]:
        """None that holds a tensor of the parameter's shape."""
        return ()

    def kept(self, group: Mapping[str, Any], saved: Mapping[str, Any]) -> set[str]:
        """Which class a group's matrices go to."""
        return {VIEWS, VECTORS}

    def plan(
        self,
        shard: Shard,
        place: Placement,
        source: UniversalFolder,
        settings: Sequence[Mapping[str, Any]],
    ) -> ViewedPlan:
        """The states of what this process steps of a shard."""
        optimizer: Any = place.optimizer
        assert isinstance(optimizer, MatrixViews)
        optimizer.shards.locate_own([shard.flat])
        gathers = shard.flat in optimizer.shards.sharing
        if not gathers and not optimizer.shards.is_whole(shard.flat):
            raise CheckpointError(
                "MatrixViews: scope='partition' cannot load a universal checkpoint under ZeRO: its "
                "state belongs to the partition; allowed: scope='matrix'"
            )
        spans, pieces = [], []
        options: dict[str, Any] = {}
        fragments = [part.fragment for part in shard.layout.fragments]
        for piece in optimizer.pieces_of(shard.flat):
            at = piece.span[0]
            f = next(f for f in fragments if f.offset <= at < f.offset + f.numel)
            path = source.file(place.names[f.name], files.VIEWED)
            saved = files.read(path)
            vectors = bool(optimizer.param_groups[shard.group].get(VECTORS))
            role = role_of(optimizer.classes, vectors, len(piece.span) == 3)
            if (saved["classes"], saved["role"]) != (optimizer.classes, role):
                raise CheckpointError(
                    f"{path} holds a state of {saved['classes'][saved['role']]} "
                    f"({saved['classes']}); allowed here: {optimizer.classes[role]} "
                    f"({optimizer.classes})"
                )
            spans.append(piece.span)
            pieces.append(_part(saved, f, piece.span, path.name))
            known = options.setdefault(role, saved["options"])
            if not _same(known, saved["options"]):
                raise CheckpointError(
                    f"{path}: the class keeps {saved['options']} in its group and {known} for "
                    "other parameters of the same shard: quantities that parameters saved apart do "
                    "not agree on cannot be moved; resume with engine.load_checkpoint"
                )
        state: dict[str, Any] = {
            "classes": optimizer.classes, "spans": spans, "pieces": pieces, "options": options,
        }  # fmt: skip
        if gathers:
            state |= {"scope": "matrix", "numel": shard.flat.numel()}
        return ViewedPlan(shard, state)

    def native_size(self, checkpoint: NativeCheckpoint, parameter: SavedParameter) -> StateSize:
        """Bytes of what the ranks hold."""
        return StateSize(_bytes(_saved(checkpoint, parameter)["state"]), 0)

    def universal_size(self, source: UniversalFolder, name: str) -> StateSize:
        """Bytes of a folder's tensors."""
        return StateSize(_bytes(files.read(source.file(name, files.VIEWED))["state"]), 0)


@dataclass(slots=True)
class ViewedPlan:
    """What MatrixViews is to hold of a shard."""

    shard: Shard
    state: dict[str, Any]

    def install(
        self, place: Placement, source: UniversalFolder, settings: Mapping[str, Any]
    ) -> None:
        """Put it in place; the classes' instances are made of it in the next step."""
        optimizer: Any = place.optimizer
        optimizer.state[self.shard.flat] = self.state
        optimizer.forget_units()


def role_of(classes: Mapping[str, str], only_vectors: bool, is_matrix: bool) -> str:
    """Which of the classes steps a piece."""
    return VECTORS if VECTORS in classes and (only_vectors or not is_matrix) else MATRICES


def _saved(checkpoint: NativeCheckpoint, parameter: SavedParameter) -> dict[str, Any]:
    """What the ranks hold of a parameter, as if one held all of it.

    Returns:
        ``classes``; ``role``, which of these steps it; ``shape``, in which it is stepped;
        ``state``; and ``options``, what the class put in its group.
    """
    parts: list[tuple[int, tuple[int, ...], dict[str, Any]]] = []
    found: dict[str, Any] = {}
    for h in parameter.held:
        f, held = h.fragment, checkpoint.state(h.rank, h.flat)
        for (at, *shape), state in zip(held["spans"], held["pieces"], strict=True):
            if f.offset <= at < f.offset + f.numel:
                parts.append((_start(f, at, shape), tuple(shape), state))
                vectors = bool(checkpoint.groups[parameter.group].get(VECTORS))
                role = role_of(held["classes"], vectors, len(shape) == 2)
                options = held["options"].get(role, {})
                found = {"classes": held["classes"], "role": role, "options": options}
    edges = [0]
    for start, shape, _ in sorted(parts, key=lambda part: part[0]):
        if start != edges[-1]:
            break
        edges.append(start + math.prod(shape))
    if edges[-1] != parameter.numel or len(edges) != len(parts) + 1:
        raise CheckpointError(
            f"the ranks of {checkpoint.folder} hold states of {len(parts)} parts of "
            f"{parameter.name!r} that do not make the whole: files of several saves are mixed; "
            "copy the folder again"
        )
    if len(parts) == 1:
        ((_, shape, state),) = parts
        return {**found, "shape": shape, "state": state}
    whole = whole_shape(parameter.shape)
    return {**found, "shape": whole, "state": _joined(parts, whole, parameter.name)}


def _start(f: ParamFragment, at: int, shape: Sequence[int]) -> int:
    """Where in its parameter a piece begins that the optimizer says to be at an offset.

    One that is whole is said to be where the process's own part of the parameter is.
    """
    return 0 if math.prod(shape) == math.prod(f.shape) else f.start + at - f.offset


def _joined(
    parts: Sequence[tuple[int, tuple[int, ...], dict[str, Any]]],
    whole: tuple[int, ...],
    name: str,
) -> dict[str, Any]:
    """The states of a parameter's parts as one.

    Raises:
        CheckpointError: an entry is neither one number an element nor the same in all parts.
    """
    ordered = sorted(parts, key=lambda part: part[0])
    joined: dict[str, Any] = {}
    for key in {key: None for _, _, state in ordered for key in state}:
        values: list[Any] = [state.get(key) for _, _, state in ordered]
        shapes = [shape for _, shape, _ in ordered]
        if all(isinstance(v, Tensor) and v.shape == s for v, s in zip(values, shapes, strict=True)):
            joined[key] = torch.cat([v.reshape(-1) for v in values]).view(whole)
        elif _is_common(values[0]) and all(_same(v, values[0]) for v in values):
            joined[key] = values[0]
        else:
            raise CheckpointError(
                f"the class holds {key!r} of parts of {name!r}, which cannot be made one of the "
                f"whole; {_REMEDY}"
            )
    return joined


def _part(
    saved: Mapping[str, Any], f: ParamFragment, span: tuple[int, ...], file: str
) -> dict[str, Any]:
    """A piece's state, of the whole parameter's; nothing is shared with the file.

    Raises:
        CheckpointError: an entry belongs to the whole parameter, and the piece is a part of it.
    """
    at, *shape = span
    start, numel = _start(f, at, shape), math.prod(shape)
    whole = numel == math.prod(f.shape)
    state = {}
    for key, value in saved["state"].items():
        if isinstance(value, Tensor) and value.shape == tuple(saved["shape"]):
            state[key] = value.reshape(-1)[start : start + numel].view(shape).clone()
        elif whole or _is_common(value):
            state[key] = _mapped(value, Tensor.clone)
        else:
            raise CheckpointError(
                f"{file} of {f.name!r} holds {key!r} of the whole parameter, of which this process "
                f"steps a part; {_REMEDY}"
            )
    return state


def _is_common(value: Any) -> bool:
    """Whether it can be the same for all parts of a parameter, as a step count is."""
    return (
        value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, bool | int | float)
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(value, b[key]) for key, value in a.items())
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool((a == b).all())
    return not differs(a, b)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(held, change) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(held, change) for held in value)
    return value


def _bytes(value: Any) -> int:
    """Of the tensors in it."""
    if isinstance(value, Tensor):
        return value.nbytes
    held = value.values() if isinstance(value, dict) else value
    return sum(map(_bytes, held)) if isinstance(value, dict | list | tuple) else 0
