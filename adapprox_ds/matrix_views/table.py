# SPDX-License-Identifier: Apache-2.0
"""Decides which process owns each parameter that ZeRO's partition cuts, for ``scope="matrix"``.

The owner steps the whole parameter; see :mod:`adapprox_ds.matrix_views.gather`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, distributed

from adapprox_ds.core.peers import Peers, find_peers
from adapprox_ds.core.shards import Shard, ShardTable


@dataclass(frozen=True)
class ViewSettings:
    """The settings of a parameter group that must be the same on all processes.

    Attributes:
        scope: "partition" or "matrix".
        vectors: whether the group's matrices go to the class for vectors.
    """

    scope: str
    vectors: bool


@dataclass(frozen=True, eq=False)
class Sharing:
    """The owners of the cut parameters of a shard.

    Attributes:
        peers: the group of processes over which the shard's parameters are partitioned; None where
            no parameter is gathered.
        owners: for each gathered parameter, by name, the number in the group of its owner.
    """

    peers: Peers | None
    owners: Mapping[str, int]


class ViewTable(ShardTable[ViewSettings]):
    """The layouts of MatrixViews' shards, and the owners of their cut parameters.

    Attributes:
        sharing: the owners by shard, for shards with the scope "matrix".
    """

    def __init__(self) -> None:
        super().__init__("MatrixViews")
        self.sharing: dict[Tensor, Sharing] = {}

    def adopt(self, shards: Iterable[Shard]) -> None:
        """Add the layouts of verified shards.

        With the scope "matrix" this is a collective call, which also chooses the owners.

        Raises:
            RuntimeError: with that scope, the process group of a shard is not known, or the
                processes' parts of a parameter overlap or leave a gap.
        """
        shards = list(shards)
        sharing = {}
        loads: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        whole = [s for s in shards if self.settings[s.group].scope == "matrix" and not s.is_clone]
        if any(shard.process_group is None for shard in whole):
            raise RuntimeError(_UNKNOWN)
        for shard in whole:
            if self.settings[shard.group].vectors:
                sharing[shard.flat] = Sharing(None, {})
                continue
            peers = find_peers(
                (part.fragment for part in shard.layout.fragments), shard.process_group
            )
            ranks = tuple(distributed.get_process_group_ranks(shard.process_group))
            owners = choose_owners(peers, loads[ranks])
            sharing[shard.flat] = Sharing(peers if owners else None, owners)
        # This comes last, so that nothing is added if a shard is refused.
        super().adopt(shards)
        self.sharing.update(sharing)

    def _take_padding(self, tensor: Tensor) -> bool:
        taken = super()._take_padding(tensor)
        if taken and self.settings[self._groups[tensor]].scope == "matrix":
            raise RuntimeError(_UNKNOWN)  # processes that have the parameters raise it in adopt
        return taken


_UNKNOWN = (
    "MatrixViews: scope='matrix' needs the process group of a shard; build the engine by "
    "adapprox_ds.initialize, or call adapprox_ds.attach(engine) before the first step"
)


def choose_owners(peers: Peers, loads: Counter[int]) -> dict[str, int]:
    """Choose the owner of each cut parameter: the process with the least load of those with a part.

    The result is the same on all processes.

    Args:
        peers: the group of processes over which a shard's parameters are partitioned.
        loads: for each process the number of elements that it steps, minus the number that lie on
            it, over the shards before this one; updated.

    Returns:
        The number of the owner in the group, by the parameter's name.
    """
    for parameter in peers.cut.values():
        for (begin, end), holder in zip(parameter.spans, parameter.holders, strict=True):
            loads[holder] -= end - begin
    owners: dict[str, int] = {}
    # The largest parameters come first, for an even load.
    for parameter in sorted(peers.cut.values(), key=lambda p: -p.numel):
        owner = min(parameter.holders, key=lambda holder: (loads[holder], holder))
        loads[owner] += parameter.numel
        owners[parameter.name] = owner
    return owners


def settings_of(group: Mapping[str, Any], scope: str) -> ViewSettings:
    """The settings of a parameter group."""
    return ViewSettings(scope, bool(group.get("vectors")))
