# SPDX-License-Identifier: Apache-2.0
"""What MatrixViews knows of its shards: who steps a parameter that ZeRO's partition cuts."""

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
    """What the processes' groups must agree on.

    Attributes:
        scope: "partition" or "matrix".
        vectors: whether the group's matrices go to the class for vectors.
    """

    scope: str
    vectors: bool


@dataclass(frozen=True, eq=False)
class Sharing:
    """Who steps the cut parameters of a shard whole.

    Attributes:
        peers: the processes that hold the shard's parameters; None where no parameter is gathered.
        owners: by name of each gathered parameter, the number in the group of the process that
            steps it.
    """

    peers: Peers | None
    owners: Mapping[str, int]


class ViewTable(ShardTable[ViewSettings]):
    """The layouts of MatrixViews' shards.

    Attributes:
        sharing: by shard, of those in groups with the scope "matrix".
    """

    def __init__(self) -> None:
        super().__init__("MatrixViews")
        self.sharing: dict[Tensor, Sharing] = {}

    def adopt(self, shards: Iterable[Shard]) -> None:
        """Take over the layouts of verified shards.

        With the scope "matrix" this is a collective call: processes tell each other what they hold.

        Raises:
            RuntimeError: with that scope, the process group of a shard is not known, or the
                processes' parts of a parameter overlap or leave a gap.
        """
        shards = list(shards)
        sharing = {}
        loads: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        whole = [s for s in shards if self.settings[s.group].scope == "matrix" and not s.is_clone]
        if any(shard.ranks is None for shard in whole):
            raise RuntimeError(_UNKNOWN)
        for shard in whole:
            if self.settings[shard.group].vectors:
                sharing[shard.flat] = Sharing(None, {})
                continue
            peers = find_peers((part.fragment for part in shard.layout.fragments), shard.ranks)
            ranks = tuple(distributed.get_process_group_ranks(shard.ranks))
            owners = choose_owners(peers, loads[ranks])
            sharing[shard.flat] = Sharing(peers if owners else None, owners)
        # Last, so that nothing is taken over where any shard is refused.
        super().adopt(shards)
        self.sharing.update(sharing)

    def _take_padding(self, tensor: Tensor) -> bool:
        taken = super()._take_padding(tensor)
        if taken and self.settings[self._groups[tensor]].scope == "matrix":
            raise RuntimeError(_UNKNOWN)  # as the processes do that hold the parameters
        return taken


_UNKNOWN = (
    "MatrixViews: scope='matrix' needs to know the ranks of a shard; build the engine by "
    "adapprox_ds.initialize, or call adapprox_ds.attach(engine) before the first step"
)


def choose_owners(peers: Peers, loads: Counter[int]) -> dict[str, int]:
    """By name of each cut parameter the process that steps it: of its holders the least loaded.

    The same on all processes.

    Args:
        peers: the processes that hold a shard's parameters.
        loads: by process, how many elements it steps more than ZeRO's even partition gives it, of
            the shards before this one; brought up to date.
    """
    for parameter in peers.cut.values():
        for (begin, end), holder in zip(parameter.spans, parameter.holders, strict=True):
            loads[holder] -= end - begin
    owners: dict[str, int] = {}
    # Largest first, for an even load.
    for parameter in sorted(peers.cut.values(), key=lambda p: -p.numel):
        owner = min(parameter.holders, key=lambda holder: (loads[holder], holder))
        loads[owner] += parameter.numel
        owners[parameter.name] = owner
    return owners


def settings_of(group: Mapping[str, Any], scope: str) -> ViewSettings:
    """A parameter group's."""
    return ViewSettings(scope, bool(group.get("vectors")))
