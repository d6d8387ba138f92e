# SPDX-License-Identifier: Apache-2.0
"""The layouts of Adapprox's shards, with the processes that hold the rest of a cut matrix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from adapprox_ds.adapprox.fragment import Fragment
from adapprox_ds.core.peers import Peers, find_peers
from adapprox_ds.core.shards import Shard, ShardTable


class MatrixTable(ShardTable[Any]):
    """A table of shards whose cut matrices several processes may factor together.

    Attributes:
        peers: by shard, the processes that hold the other parts of its parameters; only of shards
            in groups with ``scope="matrix"``.
    """

    def __init__(self, owner: str) -> None:
        super().__init__(owner)
        self.peers: dict[Tensor, Peers] = {}

    def adopt(self, shards: Iterable[Shard]) -> None:
        """Take over the layouts of verified shards.

        With ``scope="matrix"`` this is a collective call: processes tell each other what they hold.

        Raises:
            RuntimeError: with ``scope="matrix"``, the process group of a shard is not known, or the
                processes' parts of a parameter overlap or leave a gap.
        """
        shards = list(shards)
        peers, layouts = {}, {}
        for shard in shards:
            h = self.settings[shard.group]
            if h.scope == "partition" or shard.is_clone:
                continue
            if shard.process_group is None:
                raise RuntimeError(
                    "scope='matrix' needs the process group of a shard; build the engine by "
                    "adapprox_ds.initialize, or call adapprox_ds.attach(engine) before the first "
                    "step"
                )
            fragments = [part.fragment for part in shard.layout.fragments]
            peers[shard.flat] = find_peers(fragments, shard.process_group)
            layouts[shard.flat] = shard.layout.with_scope(h.scope, h.shards_u)
        # Last, so that nothing is taken over where any shard is refused.
        super().adopt(shards)
        self.peers.update(peers)
        self.layouts.update(layouts)

    def uncut(self, flat: Tensor, fragments: Sequence[Fragment]) -> list[Fragment]:
        """Those fragments of a tensor that this process steps without the other processes."""
        cut = self.peers[flat].cut if flat in self.peers else {}
        return [f for f in fragments if f.layout.fragment.name not in cut]
