# SPDX-License-Identifier: Apache-2.0
"""Which ranks hold what of the parameters that a partition cuts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import distributed

from adapprox_ds.zero.layout import ParamFragment, matrix_shape, rows_of_u


@dataclass(frozen=True)
class CutParameter:
    """A parameter of which several ranks of a group hold parts.

    Attributes:
        name: the parameter's.
        shape: of the whole parameter.
        spans: [begin, end) in the flattened parameter, of each rank that holds some, in order.
        holders: those ranks, by their number in the group.
    """

    name: str
    shape: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    holders: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int] | None:
        """(rows, cols) of the whole parameter's 2-D view, None for vectors."""
        return matrix_shape(self.shape)

    @cached_property
    def cut_rows(self) -> dict[int, int]:
        """Rows of the 2-D view of which several ranks hold parts, and their places among them."""
        assert self.matrix is not None
        cols = self.matrix[1]
        rows = sorted({begin // cols for begin, _ in self.spans if begin % cols})
        return {row: place for place, row in enumerate(rows)}

    @cached_property
    def parts_of_u(self) -> tuple[tuple[int, int], ...]:
        """[first, end) of U's rows that each holder keeps, where U is in parts."""
        assert self.matrix is not None
        return tuple(rows_of_u(*span, self.matrix[0]) for span in self.spans)


@dataclass(frozen=True, slots=True, eq=False)
class Peers:
    """The ranks that a flat tensor is partitioned over.

    Attributes:
        group: torch's process group.
        world: its size.
        cut: the parameters that they share, by name, in the same order on all of them.
        plans: what steps have derived from it.
    """

    group: Any
    world: int
    cut: dict[str, CutParameter]
    plans: dict[Any, Any] = field(default_factory=dict)


def place_of(group: Any, device: torch.device) -> torch.device:
    """Where a group's collectives take what lies on a device: there, or where its backend wants it.

    NCCL takes nothing from CPUs, where shards lie with CPU offload. Groups of DeepSpeed's are bound
    to their rank's GPU before that becomes the process's current device.

    Args:
        group: torch's process group; None for that of all ranks.
        device: of the tensor, or the one that is preferred.
    """
    group = group or distributed.group.WORLD
    # As in "cpu:gloo,cuda:nccl".
    pairs = distributed.get_backend_config(group).split(",")
    kinds = [pair.partition(":")[0] for pair in pairs]
    kind = device.type if device.type in kinds else kinds[0]
    bound: torch.device | None = getattr(group, "bound_device_id", None)
    if bound is not None and bound.type == kind:
        return bound
    return device if kind == device.type else torch.device(kind)


def find_peers(fragments: Iterable[ParamFragment], group: Any) -> Peers:
    """Tell the other ranks what this one holds, and learn what they do; a collective call.

    Args:
        fragments: what lies in this rank's flat tensor.
        group: torch's process group of the partition.

    Raises:
        RuntimeError: the ranks' parts of a parameter overlap or leave a gap.
    """
    world = distributed.get_world_size(group)
    held: list[Any] = [None] * world
    mine = [(f.name, f.shape, f.start, f.start + f.numel) for f in fragments]
    distributed.all_gather_object(held, mine, group=group)
    spans: dict[str, list[tuple[int, int]]] = defaultdict(list)
    holders: dict[str, list[int]] = defaultdict(list)
    shapes: dict[str, tuple[int, ...]] = {}
    ranked = [(*part, rank) for rank, parts in enumerate(held) for part in parts]
    for name, shape, begin, end, rank in sorted(ranked):
        spans[name].append((begin, end))
        holders[name].append(rank)
        shapes[name] = shape
    cut = {}
    same: dict[Any, Any] = {}  # many parameters are cut alike, by many ranks
    for name, parts in spans.items():
        edges = [0, *(end for _, end in parts)]
        whole = edges[-1] == math.prod(shapes[name])
        if not whole or any(a != begin for a, (begin, _) in zip(edges, parts, strict=False)):
            raise RuntimeError(
                f"the ranks hold {parts} of the {math.prod(shapes[name])} elements of {name!r}: "
                "scope='matrix' needs each element on just one of them"
            )
        if len(parts) > 1:
            pair = (tuple(parts), tuple(holders[name]))
            cut[name] = CutParameter(name, shapes[name], *same.setdefault(pair, pair))
    return Peers(group, world, cut)
