# SPDX-License-Identifier: Apache-2.0
"""How the state of MatrixViews is converted and loaded, with ``scope="matrix"``.

See :mod:`adapprox_ds.checkpoint.family`. MatrixViews wraps optimizer classes of any kind. The state
that such a class keeps for a parameter, tensors of any shape and numbers, lies on one process, and
moves unchanged to the process that will step the parameter.

Only parameters of groups with ``"vectors": True`` can lie on several processes, each of which steps
its part. Of their state, tensors with one number for each element are joined and split again; the
rest, such as a step count, has to be the same in all parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

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
from adapprox_ds.matrix_views.unit import VECTORS, differs, role_of

#: The advice for a class whose states of a parameter's parts cannot be joined or split.
_REMEDY = 'leave "vectors": True out of its group, so that the parameter is stepped whole'


@register
class ViewedState(Family):
    """For each parameter, the state that a wrapped class keeps for it."""

    optimizers = ("MatrixViews",)

    def owns(self, group: Mapping[str, Any]) -> bool:
        """Whether a saved parameter group is of MatrixViews (``open_native`` marks it)."""
        return VIEWS in group

    def describe(self, groups: Sequence[Mapping[str, Any]]) -> str:
        """MatrixViews, and the wrapped classes."""
        return f"MatrixViews of {' and '.join(groups[0][VIEWS].values())}"

    def check(self, optimizer: Any, settings: Mapping[str, Any]) -> None:
        """Nothing is checked, as the wrapped classes check their settings themselves."""

    def step(self, checkpoint: NativeCheckpoint, parameter: SavedParameter) -> int:
        """The number of steps done, or 0 where the class does not count them."""
        whole = _joined_state(checkpoint, parameter)
        return int(whole["state"].get("step", whole["options"].get("step", 0)))

    def merge(
        self, checkpoint: NativeCheckpoint, parameter: SavedParameter, step: int, dense: bool
    ) -> dict[str, Any]:
        """The result of :func:`_joined_state`, in a file of its own.

        Raises:
            CheckpointError: a dense second moment is asked for, or parts cannot be joined.
        """
        if dense:
            raise CheckpointError(
                f"{checkpoint.folder} is of {self.describe(checkpoint.groups)}, of which no "
                "moments of Adam can be made; allowed: second_moment='as-saved'"
            )
        return {
            files.VIEWED: tree_map_only(Tensor, files.compact, _joined_state(checkpoint, parameter))
        }

    def tensor_files(self, source: UniversalFolder, name: str) -> Sequence[str]:
        """None, as the one file of the state is no tensor."""
        return ()

    def kept_settings(self, group: Mapping[str, Any], saved: Mapping[str, Any]) -> set[str]:
        """The settings that choose the class which steps a parameter."""
        return {VIEWS, VECTORS}

    def plan(
        self,
        shard: Shard,
        place: Placement,
        source: UniversalFolder,
        settings: Sequence[Mapping[str, Any]],
    ) -> ViewedPlan:
        """The states of the matrices and vectors of a shard that this process steps."""
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
            f = next(f for f in fragments if f.offset <= at < f.end)
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
            pieces.append(_state_of_piece(saved, f, piece.span, path.name))
            known = options.setdefault(role, saved["options"])
            if not _same(known, saved["options"]):
                raise CheckpointError(
                    f"{path}: the class keeps {saved['options']} in its group and {known} for "
                    "other parameters of the same shard: what a class keeps in its group can be "
                    "moved only if it is the same for all; resume with engine.load_checkpoint"
                )
        state: dict[str, Any] = {
            "classes": optimizer.classes, "spans": spans, "pieces": pieces, "options": options,
        }  # fmt: skip
        if gathers:
            state |= {"scope": "matrix", "numel": shard.flat.numel()}
        return ViewedPlan(shard, state)

    def native_size(self, checkpoint: NativeCheckpoint, parameter: SavedParameter) -> StateSize:
        """The bytes of the state, over all processes."""
        return StateSize(_bytes(_joined_state(checkpoint, parameter)["state"]), 0)

    def universal_size(self, source: UniversalFolder, name: str) -> StateSize:
        """The bytes of the file's tensors."""
        return StateSize(_bytes(files.read(source.file(name, files.VIEWED))["state"]), 0)


@dataclass(slots=True)
class ViewedPlan:
    """The new state of a shard.

    Attributes:
        shard: the shard.
        state: the state that MatrixViews will have of it.
    """

    shard: Shard
    state: dict[str, Any]

    def install(
        self, place: Placement, source: UniversalFolder, settings: Mapping[str, Any]
    ) -> None:
        """Put the state into the optimizer; the next step makes the classes' instances from it."""
        optimizer: Any = place.optimizer
        optimizer.state[self.shard.flat] = self.state
        optimizer.forget_units()


def _joined_state(checkpoint: NativeCheckpoint, parameter: SavedParameter) -> dict[str, Any]:
    """The state of a whole parameter, joined from the parts that the processes saved.

    Returns:
        ``classes``, the names of the wrapped classes; ``role``, the key of the one that steps the
        parameter; ``shape``, the shape in which it is stepped; ``state``, the class's state of it;
        and ``options``, what the class added to its parameter group.

    Raises:
        CheckpointError: the parts do not cover the parameter, or cannot be joined.
    """
    parts: list[tuple[int, tuple[int, ...], dict[str, Any]]] = []
    found: dict[str, Any] = {}
    for part in parameter.parts:
        f, held = part.fragment, checkpoint.state(part.process, part.flat)
        for (at, *shape), state in zip(held["spans"], held["pieces"], strict=True):
            if f.offset <= at < f.end:
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
    """The index in its flattened parameter of a piece's first element.

    Args:
        f: the fragment of the parameter that lies in the process's shard.
        at: the offset of the piece that MatrixViews saved: its own offset in the flat tensor, or,
            where a process steps a whole parameter, the offset of the process's fragment of it.
        shape: the shape of the piece.
    """
    return 0 if math.prod(shape) == math.prod(f.shape) else f.start + at - f.offset


def _joined(
    parts: Sequence[tuple[int, tuple[int, ...], dict[str, Any]]],
    whole: tuple[int, ...],
    name: str,
) -> dict[str, Any]:
    """Join the states of a parameter's parts.

    Args:
        parts: for each part the index in the flattened parameter of its first element, its shape,
            and its state.
        whole: the shape of the result's tensors.
        name: the parameter's name.

    Raises:
        CheckpointError: an entry neither has one number for each element nor is the same in all
            parts.
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
                f"the class holds {key!r} for each part of {name!r}, which cannot be joined to one "
                f"for the whole; {_REMEDY}"
            )
    return joined


def _state_of_piece(
    saved: Mapping[str, Any], f: ParamFragment, span: tuple[int, ...], file: str
) -> dict[str, Any]:
    """The state of a piece, taken from that of the whole parameter; its tensors are copies.

    Args:
        saved: the content of the parameter's file, which :func:`_joined_state` made.
        f: the fragment of the parameter that lies in this process's shard.
        span: the offset of the piece and its shape; see :func:`_start`.
        file: the name of the file, for messages.

    Raises:
        CheckpointError: an entry cannot be split, and the piece is not the whole parameter.
    """
    at, *shape = span
    start, numel = _start(f, at, shape), math.prod(shape)
    whole = numel == math.prod(f.shape)
    state = {}
    for key, value in saved["state"].items():
        if isinstance(value, Tensor) and value.shape == tuple(saved["shape"]):
            state[key] = value.reshape(-1)[start : start + numel].view(shape).clone()
        elif whole or _is_common(value):
            state[key] = tree_map_only(Tensor, Tensor.clone, value)
        else:
            raise CheckpointError(
                f"{file} of {f.name!r} holds {key!r} of the whole parameter, of which this process "
                f"steps a part; {_REMEDY}"
            )
    return state


def _is_common(value: Any) -> bool:
    """Whether a value is a single number, which all parts of a parameter can have in common."""
    return (
        value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, bool | int | float)
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(value, b[key]) for key, value in a.items())
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool((a == b).all())
    return not differs(a, b)


def _bytes(state: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, Tensor))
