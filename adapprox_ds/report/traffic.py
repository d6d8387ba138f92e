# SPDX-License-Identifier: Apache-2.0
"""Bytes a step sends between ranks with ``scope="matrix"``, from parameter shapes alone."""

from __future__ import annotations

from collections.abc import Iterator

from adapprox_ds.optim.collectives import Traffic, traffic
from adapprox_ds.optim.hyperparameters import Hyperparameters
from adapprox_ds.report.state_bytes import Groups, Shape, fragments_of
from adapprox_ds.zero.peers import CutParameter


def cut_parameters(groups: Groups, stage: int, world: int) -> Iterator[tuple[CutParameter, int]]:
    """The parameters that ZeRO cuts, without names, and how many are cut alike.

    Args:
        groups: shapes by parameter group.
        stage: 1, 2 or 3.
        world: number of ranks.
    """

    def cut() -> Iterator[tuple[CutParameter, int]]:
        if len(spans) > 1:
            yield CutParameter("", shape, tuple(spans), tuple(holders)), count

    spans: list[tuple[int, int]] = []
    holders: list[int] = []
    shape: Shape = ()
    count = 0
    for group in groups:
        for rank, alike, of, start, numel in fragments_of(group, stage, world):
            if start == 0:
                yield from cut()
                spans, holders, shape, count = [], [], of, alike
            spans.append((start, start + numel))
            holders.append(rank)
    yield from cut()


def step_traffic(groups: Groups, stage: int, world: int, h: Hyperparameters) -> Traffic:
    """What a step of all cut parameters needs, computed in fp32; nothing per partition."""
    if stage == 0 or h.scope == "partition":
        return Traffic(0, 0)
    found = [(traffic(p, world, h), n) for p, n in cut_parameters(groups, stage, world)]
    return Traffic(sum(t.summed * n for t, n in found), sum(t.exchanged * n for t, n in found))
