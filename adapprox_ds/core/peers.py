# SPDX-License-Identifier: Apache-2.0
"""Which process of a group holds which elements of a parameter that ZeRO cut.

Processes that factor a matrix together (``scope="matrix"``), or that redistribute whole matrices
(:mod:`adapprox_ds.matrix_views`), learn this once, by :func:`find_peers`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import distributed

from adapprox_ds.core.layout import ParamFragment, matrix_shape, rows_of_u


@dataclass(frozen=True)
class CutParameter:
    """A parameter of which several processes of a group hold parts.

    Attributes:
        name: the parameter's name.
        shape: the shape of the whole parameter.
        spans: for each process that holds a part, [begin, end) of the elements of the flattened
            parameter that it holds, in the order of the elements.
        holders: for each span the number in the group of the process that holds it.
    """

    name: str
    shape: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    holders: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements of the whole parameter."""
        return math.prod(self.shape)

    @cached_property
    def matrix(self) -> tuple[int, int] | None:
        """The shape (rows, cols) of the whole parameter's 2-D view; None for vectors."""
        return matrix_shape(self.shape)

    @cached_property
    def cut_rows(self) -> dict[int, int]:
        """The rows of the 2-D view that are cut: several processes hold elements of them.

        Returns:
            The global row index of each cut row, mapped to its place among the cut rows, from 0.
        """
        assert self.matrix is not None
        cols = self.matrix[1]
        rows = sorted({begin // cols for begin, _ in self.spans if begin % cols})
        return {row: place for place, row in enumerate(rows)}

    @cached_property
    def parts_of_u(self) -> tuple[tuple[int, int], ...]:
        """For each holder [first, end) of the rows of U that it keeps, where U is in parts."""
        assert self.matrix is not None
        return tuple(rows_of_u(*span, self.matrix[0]) for span in self.spans)


@dataclass(frozen=True, slots=True, eq=False)
class Peers:
    """The group of processes over which the parameters in a shard are partitioned.

    Attributes:
        group: torch's process group.
        world: the number of processes in the group.
        cut: by name the parameters of which several processes hold parts, in an order that is the
            same on all processes.
        plans: a cache of what steps derive from the above and from settings.
    """

    group: Any
    world: int
    cut: dict[str, CutParameter]
    plans: dict[Any, Any] = field(default_factory=dict)


def place_of(group: Any, device: torch.device) -> torch.device:
    """The device that a tensor has to be on to take part in a collective of a group.

    It is the tensor's own device where the group's backend takes tensors there, and otherwise the
    device of the backend: NCCL takes no tensors of the CPU, on which shards lie with CPU offload.

    Args:
        group: torch's process group; None for the group of all processes.
        device: the device of the tensor.
    """
    group = group or distributed.group.WORLD
    # The configuration looks like "cpu:gloo,cuda:nccl".
    pairs = distributed.get_backend_config(group).split(",")
    kinds = [pair.partition(":")[0] for pair in pairs]
    kind = device.type if device.type in kinds else kinds[0]
    # DeepSpeed binds its groups to a GPU before that GPU becomes the process's current device.
    bound: torch.device | None = getattr(group, "bound_device_id", None)
    if bound is not None and bound.type == kind:
        return bound
    return device if kind == device.type else torch.device(kind)


def find_peers(fragments: Iterable[ParamFragment], group: Any) -> Peers:
    """Find out which process of a group holds which elements of which parameter.

    This is a collective call: every process of the group makes it.

    Args:
        fragments: the fragments in this process's shard.
        group: torch's process group over which the shard's parameters are partitioned.

    Raises:
        RuntimeError: the processes' parts of a parameter overlap or leave a gap.
    """
    world = distributed.get_world_size(group)
    held: list[Any] = [None] * world
    mine = [(f.name, f.shape, f.start, f.start + f.numel) for f in fragments]
    distributed.all_gather_object(held, mine, group=group)
    spans: dict[str, list[tuple[int, int]]] = defaultdict(list)
    holders: dict[str, list[int]] = defaultdict(list)
    shapes: dict[str, tuple[int, ...]] = {}
    everything = [(*part, process) for process, parts in enumerate(held) for part in parts]
    for name, shape, begin, end, process in sorted(everything):
        spans[name].append((begin, end))
        holders[name].append(process)
        shapes[name] = shape
    cut = {}
    # Equal tuples are kept once, since many parameters are cut alike.
    same: dict[Any, Any] = {}
    for name, parts in spans.items():
        edges = [0, *(end for _, end in parts)]
        whole = edges[-1] == math.prod(shapes[name])
        if not whole or any(a != begin for a, (begin, _) in zip(edges, parts, strict=False)):
            raise RuntimeError(
                f"the processes hold {parts} of the {math.prod(shapes[name])} elements of "
                f"{name!r}: scope='matrix' needs each element on just one of them"
            )
        if len(parts) > 1:
            pair = (tuple(parts), tuple(holders[name]))
            cut[name] = CutParameter(name, shapes[name], *same.setdefault(pair, pair))
    return Peers(group, world, cut)
