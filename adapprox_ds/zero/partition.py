# SPDX-License-Identifier: Apache-2.0
"""The rules by which ZeRO cuts flat tensors into parts of one size, one for each process.

Stages 1 and 2 cut the flat tensor of a group, in which parameters lie end to end, without regard to
where a parameter begins. Stage 3 cuts each parameter alone, as if it were a flat tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

#: Stages 1 and 2 pad a group to a multiple of this times the number of processes
#: (stage_1_and_2.py, nccl_start_alignment_factor).
START_ALIGNMENT = 2


def slot_of(numel: int, world: int) -> int:
    """The length of the slots into which stage 3 cuts a parameter; the last may not be full."""
    return -(-numel // world)


def cut(begin: int, numel: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Yield the parts of a parameter in a flat tensor.

    Args:
        begin: the offset of the parameter in the flat tensor.
        numel: the number of its elements.
        size: the length of each process's part of the flat tensor.

    Yields:
        The number of the process, the index in the flattened parameter of the part's first element,
        and the number of the part's elements.
    """
    for process in range(begin // size, -(-(begin + numel) // size)):
        low = max(process * size - begin, 0)
        high = min((process + 1) * size - begin, numel)
        yield process, low, high - low
