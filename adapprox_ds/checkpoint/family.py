# SPDX-License-Identifier: Apache-2.0
"""The interface between moving a checkpoint and the optimizers' different forms of state.

Converting, loading and inspecting checkpoints is the same for all optimizers, except for the state
of a parameter. A :class:`Family` says for one form of state how the parts that the processes saved
become the state of the whole parameter, and how that becomes the state of another shard. A module
that defines one registers it with :func:`register`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

from adapprox_ds.checkpoint.files import CheckpointError
from adapprox_ds.checkpoint.folder import UniversalFolder
from adapprox_ds.checkpoint.native import NativeCheckpoint, SavedParameter
from adapprox_ds.checkpoint.place import Placement
from adapprox_ds.core.shards import Shard


class Plan(Protocol):
    """The new state of a shard, computed but not yet in the optimizer.

    Attributes:
        shard: the shard.
    """

    shard: Shard

    def install(
        self, place: Placement, source: UniversalFolder, settings: Mapping[str, Any]
    ) -> None:
        """Put the new state into the optimizer's ``state``; the caller writes the weights.

        Args:
            place: the running engine.
            source: the checkpoint.
            settings: the settings of the shard's group after the load.
        """


@dataclass(frozen=True, slots=True)
class StateSize:
    """The size of one parameter's state, for the table of ``inspect``.

    Attributes:
        second_bytes: the bytes of the tensors from which the second moment is read.
        first_bytes: the bytes of the rest of the state.
        ranks: the ranks of the factored blocks, in the order of their rows; empty where the second
            moment is dense; None where the optimizer does not factor.
        error: the largest known error ratio of the blocks; NaN where none is known.
    """

    second_bytes: int
    first_bytes: int
    ranks: tuple[int, ...] | None = None
    error: float = math.nan


class Family(ABC):
    """A form of optimizer state, and how it is moved.

    Attributes:
        optimizers: the names of the optimizers that can load a state of this form.
    """

    optimizers: ClassVar[tuple[str, ...]]

    @abstractmethod
    def owns(self, group: Mapping[str, Any]) -> bool:
        """Whether a saved parameter group belongs to an optimizer with this form of state."""

    @abstractmethod
    def describe(self, groups: Sequence[Mapping[str, Any]]) -> str:
        """Name the optimizer that saved some parameter groups, for a title or a message."""

    def check(self, optimizer: Any, settings: Mapping[str, Any]) -> None:
        """Raise if a running optimizer cannot use the settings that a group would have."""
        optimizer.settings_class.of_group(settings)

    def step(self, checkpoint: NativeCheckpoint, parameter: SavedParameter) -> int:
        """The number of steps done on a parameter.

        Raises:
            CheckpointError: the processes do not agree on it, or it was not saved.
        """
        steps = set()
        for part in parameter.parts:
            state = checkpoint.state(part.process, part.flat)
            # Some Adams count their steps in the group.
            held = state.get("step", checkpoint.groups[parameter.group].get("step"))
            if held is None:
                raise CheckpointError(
                    f"rank {part.process} of {checkpoint.folder} does not say how many steps were "
                    f"done on {parameter.name!r}: neither its state nor its group has a 'step'; an "
                    "optimizer that is no Adam saved it, whose checkpoints cannot be converted"
                )
            steps.add(int(held))
        if len(steps) != 1:
            raise CheckpointError(
                f"the ranks of {checkpoint.folder} saved {parameter.name!r} at different steps "
                f"{sorted(steps)}: files of several saves are mixed; copy the folder again"
            )
        return steps.pop()

    @abstractmethod
    def merge(
        self, checkpoint: NativeCheckpoint, parameter: SavedParameter, step: int, dense: bool
    ) -> Mapping[str, Any]:
        """Join the parts of a parameter's state that the processes saved.

        Args:
            checkpoint: the saved run.
            parameter: one of its parameters.
            step: the number of steps done on it.
            dense: whether the result is to be the dense moments that a stock AdamW run needs.

        Returns:
            The state of the whole parameter: the name of each file to write, mapped to its
            content, which is a tensor (numel,) or another object.
        """

    @abstractmethod
    def tensor_files(self, source: UniversalFolder, name: str) -> Sequence[str]:
        """The files of a parameter's state that contain a tensor of the parameter's shape."""

    @abstractmethod
    def kept_settings(self, group: Mapping[str, Any], saved: Mapping[str, Any]) -> set[str]:
        """The names of the settings of a running group that a load does not replace.

        Args:
            group: the running parameter group.
            saved: the saved parameter group.
        """

    @abstractmethod
    def plan(
        self,
        shard: Shard,
        place: Placement,
        source: UniversalFolder,
        settings: Sequence[Mapping[str, Any]],
    ) -> Plan:
        """Compute a shard's new state, without changing the engine.

        Args:
            shard: the shard.
            place: the running engine.
            source: the checkpoint.
            settings: the settings of each of the optimizer's groups after the load.
        """

    @abstractmethod
    def native_size(self, checkpoint: NativeCheckpoint, parameter: SavedParameter) -> StateSize:
        """The size of a parameter's state in a checkpoint of ``engine.save_checkpoint``."""

    @abstractmethod
    def universal_size(self, source: UniversalFolder, name: str) -> StateSize:
        """The size of a parameter's state in a universal checkpoint."""


#: All families; every parameter group is owned by one of them.
_families: list[Family] = []

F = TypeVar("F", bound=type[Family])


def register(cls: F) -> F:
    """Register a family, so that checkpoints of its optimizers can be moved; a decorator."""
    _families.append(cls())
    return cls


def family_of(groups: Sequence[Mapping[str, Any]]) -> Family:
    """The family that owns some saved or running parameter groups."""
    return next(family for family in _families if family.owns(groups[0]))


def require_same_family(place: Placement, source: UniversalFolder) -> Family:
    """The family of a checkpoint, if the running optimizer can load its state.

    Raises:
        CheckpointError: it cannot.
    """
    theirs = family_of(source.groups)
    ours = type(place.optimizer).__name__
    if ours not in theirs.optimizers:
        raise CheckpointError(
            f"{source.path} holds the state of {theirs.describe(source.groups)}, which {ours} "
            f"cannot take over; allowed: {', '.join(theirs.optimizers)}. A checkpoint that "
            "python -m adapprox_ds convert made with --second-moment dense is of Adam"
        )
    return theirs
