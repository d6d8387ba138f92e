# SPDX-License-Identifier: Apache-2.0
"""Which family a checkpoint's state is of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adapprox_ds.checkpoint.factored import FactoredState
from adapprox_ds.checkpoint.family import Family
from adapprox_ds.checkpoint.files import CheckpointError
from adapprox_ds.checkpoint.folder import UniversalFolder
from adapprox_ds.checkpoint.place import Placement
from adapprox_ds.checkpoint.viewed import ViewedState
from adapprox_ds.checkpoint.windowed import WindowedState

#: The last owns every group that no other does.
_FAMILIES: tuple[Family, ...] = (ViewedState(), WindowedState(), FactoredState())


def family_of(groups: Sequence[Mapping[str, Any]]) -> Family:
    """That of saved or running parameter groups."""
    return next(family for family in _FAMILIES if family.owns(groups[0]))


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
