# SPDX-License-Identifier: Apache-2.0
"""What an optimizer's state is in a checkpoint: the part of moving a run that is its own."""

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
    """A shard's new state, ready to be put in place.

    Attributes:
        shard: the shard.
    """

    shard: Shard

    def install(
        self, place: Placement, source: UniversalFolder, settings: Mapping[str, Any]
    ) -> None:
        """Put it in the optimizer's state; the weights are written apart from it.

        Args:
            place: the running engine.
            source: the checkpoint.
            settings: what the shard's group will be.
        """


@dataclass(frozen=True, slots=True)
class StateSize:
    """What a parameter's state takes, for a table.

    Attributes:
        second_bytes: of what the second moment is read from.
        first_bytes: of the rest.
        ranks: of its factored blocks, in order; None where the optimizer has no ranks.
        error: the largest known error ratio; NaN where none is known.
    """

    second_bytes: int
    first_bytes: int
    ranks: tuple[int, ...] | None = None
    error: float = math.nan


class Family(ABC):
    """Optimizers whose states have one form.

    Attributes:
        optimizers: names of those that can take a state of this form over.
    """

    optimizers: ClassVar[tuple[str, ...]]

    @abstractmethod
    def owns(self, group: Mapping[str, Any]) -> bool:
        """Whether a saved parameter group is of such an optimizer."""

    @abstractmethod
    def describe(self, groups: Sequence[Mapping[str, Any]]) -> str:
        """Whose state it is, for a title."""

    def check(self, optimizer: Any, settings: Mapping[str, Any]) -> None:
        """Raise where a running optimizer cannot use settings that a group would have."""
        optimizer.settings_class.of_group(settings)

    def step(self, checkpoint: NativeCheckpoint, parameter: SavedParameter) -> int:
        """The steps done on a parameter, the same on every rank.

        Raises:
            CheckpointError: it is not, or nothing says.
        """
        steps = set()
        for h in parameter.held:
            state = checkpoint.state(h.rank, h.flat)
            # Some Adams count in the group.
            held = state.get("step", checkpoint.groups[parameter.group].get("step"))
            if held is None:
                raise CheckpointError(
                    f"rank {h.rank} of {checkpoint.folder} does not say how many steps were done "
                    f"on {parameter.name!r}: neither its state nor its group has a 'step'; an "
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
    def whole(
        self, checkpoint: NativeCheckpoint, parameter: SavedParameter, step: int, dense: bool
    ) -> Mapping[str, Any]:
        """A parameter's state by file, of what the ranks hold: 1-D tensors, or other things.

        Args:
            checkpoint: the saved run.
            parameter: one of its parameters.
            step: steps done on it.
            dense: as a stock AdamW run needs it.
        """

    @abstractmethod
    def files(self, source: UniversalFolder, name: str) -> Sequence[str]:
        """The files that a parameter's state lies in."""

    @abstractmethod
    def kept(self, group: Mapping[str, Any], saved: Mapping[str, Any]) -> set[str]:
        """Settings of a running group that a saved one does not replace."""

    @abstractmethod
    def plan(
        self,
        shard: Shard,
        place: Placement,
        source: UniversalFolder,
        settings: Sequence[Mapping[str, Any]],
    ) -> Plan:
        """A shard's new state; nothing of the engine is touched."""

    @abstractmethod
    def native_size(self, checkpoint: NativeCheckpoint, parameter: SavedParameter) -> StateSize:
        """Of a parameter that the ranks hold."""

    @abstractmethod
    def universal_size(self, source: UniversalFolder, name: str) -> StateSize:
        """Of a parameter in a universal folder."""


#: The families that there are; every parameter group is owned by one of them.
_families: list[Family] = []

F = TypeVar("F", bound=type[Family])


def register(cls: F) -> F:
    """A decorator of a family's class, so that checkpoints of its optimizers can be moved."""
    _families.append(cls())
    return cls


def family_of(groups: Sequence[Mapping[str, Any]]) -> Family:
    """That of saved or running parameter groups."""
    return next(family for family in _families if family.owns(groups[0]))


def require_same_family(place: Placement, source: UniversalFolder) -> Family:
    """The family of a checkpoint and of the optimizer that loads it.

    Raises:
        CheckpointError: they are two.
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
