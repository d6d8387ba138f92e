# SPDX-License-Identifier: Apache-2.0
"""Bytes of optimizer state a rank: ZeRO's cuts simulated, pieces counted by the optimizer's code.

Cuts are made as DeepSpeed 0.19 makes them with its defaults (no round-robin order, no
``parameter_alignment``, one data-parallel group); what of a piece is factored, and in how many
bytes, is asked of :func:`~adapprox_ds.core.layout.split_fragment` and
:class:`~adapprox_ds.adapprox.factors.FactorStore`. ``step`` counters are left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from adapprox_ds.adapprox.collectives import Traffic, traffic
from adapprox_ds.adapprox.factors import FactorStore
from adapprox_ds.adapprox.hyperparameters import CODE_BITS, Hyperparameters
from adapprox_ds.adapprox.quantized import code_bytes, group_count
from adapprox_ds.adapprox.state import factor_dtype
from adapprox_ds.core.layout import Block, ParamFragment, ShardLayout, matrix_shape, split_fragment
from adapprox_ds.core.peers import CutParameter
from adapprox_ds.micro_adam.hyperparameters import MicroHyperparameters
from adapprox_ds.micro_adam.state import new_stores

Shape = tuple[int, ...]
#: Shapes by parameter group, in the order of the optimizer.
Groups = Sequence[Sequence[Shape]]

#: Bytes of an element of the first moment; "none" is beta_1 = 0. Codes have scales beside them.
FIRST_MOMENTS: Mapping[str, float] = {"fp32": 4, "bf16": 2, "int8": 1, "int4": 0.5, "none": 0}
#: Bytes of an element of the optimizer's own weights, and of what is kept of their rounding.
MASTERS: Mapping[str, tuple[int, int]] = {"fp32": (4, 0), "bf16": (2, 0), "compensated": (2, 1)}
FP32 = 4
#: What one factorisation spans, one of ``SCOPES``, and whether ranks keep rows of U only.
Scope = tuple[str, bool]
PARTITION: Scope = ("partition", False)
#: Stages 1 and 2 pad a group to a multiple of this times the world size
#: (runtime/zero/stage_1_and_2.py, nccl_start_alignment_factor).
_START_ALIGNMENT = 2
#: torchao's AdamW8bit (torchao/optim/adam.py, subclass_8bit.py): elements that share an fp32
#: scale, the least elements that are quantised, entries of the fp32 table that a tensor carries.
_BLOCK_8BIT, _LEAST_8BIT, _TABLE_8BIT = 256, 4096, 256


def first_moments(
    groups: Groups, stage: int, world: int, kind: str, scope: Scope = PARTITION
) -> tuple[int, ...]:
    """Adapprox's first moment in bytes by rank; ``kind`` is in FIRST_MOMENTS.

    Elements, and where they are codes the scales of their groups.
    """
    elements = sum(n for group in groups for n in flat_lengths(group, stage, world))
    bits = CODE_BITS.get(kind)
    if bits is None:
        return (elements * int(FIRST_MOMENTS[kind]),) * world
    if stage == 0:
        return first_moments(groups, 3, 1, kind) * world
    # Codes of 8 bits have one for padding, too.
    held = [elements if bits == 8 else 0] * world
    for group in groups:
        for rank, count, shape, start, numel in fragments_of(group, stage, world):
            parts = _pieces(shape, start, numel, scope)
            spans = [*parts.tiles, *((1, run) for run in parts.runs)]
            size = FP32 * sum(rows * group_count(cols) for rows, cols in spans)
            if bits == 4:
                size += sum(rows * code_bytes(cols, bits) for rows, cols in spans)
            held[rank] += count * size
    return tuple(held)


@dataclass(frozen=True, slots=True)
class OptimizerBytes:
    """The state of one optimizer.

    Attributes:
        name: what a report calls it.
        first: bytes of the first moment, by rank.
        second: bytes of the second moment, by rank.
        mean_rank: mean of k over the factored blocks of all ranks; NaN where there is none. A
            block of few rows is held to the ranks that save memory.
        compensation: bytes a rank of what rounding took from the weights.
    """

    name: str
    first: tuple[int, ...]
    second: tuple[int, ...]
    mean_rank: float = math.nan
    compensation: int = 0

    @property
    def state(self) -> tuple[int, ...]:
        """Bytes of all of it, by rank."""
        return tuple(
            a + b + self.compensation for a, b in zip(self.first, self.second, strict=True)
        )

    @property
    def largest(self) -> int:
        """Bytes on the rank that holds most."""
        return max(self.state)

    @property
    def mean(self) -> float:
        """Bytes, the mean over ranks."""
        return sum(self.state) / len(self.state)


def flat_lengths(group: Sequence[Shape], stage: int, world: int) -> list[int]:
    """Lengths, padding included, of the tensors a rank's optimizer is stepped with."""
    sizes = [math.prod(shape) for shape in group]
    if stage == 0:
        return sizes
    if stage == 3:
        return [sum(-(-n // world) for n in sizes)]
    return [-(-sum(sizes) // (_START_ALIGNMENT * world)) * _START_ALIGNMENT]


def fragments_of(
    group: Sequence[Shape], stage: int, world: int
) -> Iterator[tuple[int, int, Shape, int, int]]:
    """(rank, how many alike, shape, start, numel) of each parameter's part on each rank."""
    if stage == 3:
        # Each parameter is cut for itself, so that equal shapes are cut alike.
        for shape, count in Counter(group).items():
            numel = math.prod(shape)
            slot = -(-numel // world)
            for rank in range(-(-numel // slot)):
                start = rank * slot
                yield rank, count, shape, start, min(slot, numel - start)
        return
    (size,) = flat_lengths(group, stage, world)
    offset = 0
    for shape in group:
        end = offset + math.prod(shape)
        for rank in range(offset // size, -(-end // size)):
            low, high = max(offset, rank * size), min(end, (rank + 1) * size)
            yield rank, 1, shape, low - offset, high - low
        offset = end


class _Pieces(NamedTuple):
    """What a part of a parameter consists of: blocks, their (rows, cols) tiles, dense lengths."""

    blocks: tuple[Block, ...]
    tiles: tuple[tuple[int, int], ...]
    runs: tuple[int, ...]


def _pieces(shape: Shape, start: int, numel: int, scope: Scope) -> _Pieces:
    """The pieces of a part of a parameter."""
    view = matrix_shape(shape)
    if scope == PARTITION:
        # Where in its row a part begins is all that matters to a cut.
        start = start % view[1] if view else 0
    return _split(shape, start, numel, scope)


@lru_cache(maxsize=2**16)
def _split(shape: Shape, start: int, numel: int, scope: Scope) -> _Pieces:
    parts = split_fragment(ParamFragment("", shape, start, numel, 0), *scope)
    runs = tuple(run.numel for run in parts.runs)
    if (block := parts.block) is None:
        return _Pieces((), (), runs)
    # Without what does not matter to its size.
    of_u = None if block.u_rows is None else (0, block.kept_u_rows)
    like = Block(0, block.rows, block.cols, matrix_rows=block.matrix_rows, u_rows=of_u)
    return _Pieces((like,), tuple((tile.rows, tile.cols) for tile in block.tiles), runs)


@lru_cache(maxsize=2**16)
def _factors(block: Block, rank: int, kept_in: str) -> tuple[int, int]:
    """(bytes, k) of a block's factors when its rank is as large as it may be."""
    h = Hyperparameters(rank_max=rank, factor_dtype=kept_in)
    store = FactorStore.zeros(
        block.rows * block.cols,
        [block],
        [],
        h.k0,
        h.rank_control,
        h.factor,
        dtype=torch.float32,
        factor_dtype=factor_dtype(torch.float32, h),
        device=torch.device("meta"),
    )
    return store.allocated_bytes, store.factors[0].q.shape[1]


def second_moments(
    groups: Groups, stage: int, world: int, rank: int, kept_in: str, scope: Scope = PARTITION
) -> tuple[tuple[int, ...], float]:
    """Adapprox's second moment in bytes by rank, and the mean of k over all blocks."""
    if stage == 0:
        # Every rank holds all parameters whole: what stage 3 does on a single one.
        (second,), mean_rank = second_moments(groups, 3, 1, rank, kept_in)
        return (second,) * world, mean_rank
    held = [0] * world
    blocks = ranks = 0
    for group in groups:
        for r, count, shape, start, numel in fragments_of(group, stage, world):
            parts = _pieces(shape, start, numel, scope)
            held[r] += count * FP32 * sum(parts.runs)
            for place in parts.blocks:
                size, k = _factors(place, rank, kept_in)
                held[r] += count * size
                blocks += count
                ranks += count * k
    return tuple(held), ranks / blocks if blocks else math.nan


def adapprox_bytes(
    groups: Groups,
    stage: int,
    world: int,
    rank: int,
    first_moment: str,
    kept_in: str,
    scope: Scope = PARTITION,
    masters: str = "fp32",
) -> OptimizerBytes:
    """Adapprox's state with every matrix at ``rank``, within what saves memory.

    Args:
        groups: the parameters' shapes.
        stage: ZeRO stage.
        world: number of ranks.
        rank: ``rank_max`` and ``rank_init``.
        first_moment: a key of ``FIRST_MOMENTS``.
        kept_in: the factors' dtype, one of ``FACTOR_DTYPES``.
        scope: what one factorisation spans, and where U is.
        masters: a key of ``MASTERS``.
    """
    second, mean_rank = second_moments(groups, stage, world, rank, kept_in, scope)
    limited = f", {mean_rank:.1f} on average" if round(mean_rank, 1) < rank else ""
    name = f"Adapprox, k = {rank}{limited}"
    first = first_moments(groups, stage, world, first_moment, scope)
    return OptimizerBytes(name, first, second, mean_rank, _rest(groups, stage, world, masters))


def _rest(groups: Groups, stage: int, world: int, masters: str) -> int:
    """Bytes a rank of the compensations of weights."""
    return MASTERS[masters][1] * sum(n for g in groups for n in flat_lengths(g, stage, world))


def micro_adam_bytes(
    groups: Groups, stage: int, world: int, masters: str = "fp32"
) -> OptimizerBytes:
    """MicroAdam's state at its defaults.

    Both moments are read from the window, which is counted as the first; the error feedback is
    counted as the second.
    """
    rest = _rest(groups, stage, world, masters)
    if stage == 0:
        one = micro_adam_bytes(groups, 3, 1)
        sizes = (one.first * world, one.second * world)
        return OptimizerBytes("MicroAdam", *sizes, compensation=rest)
    windows, errors = [0] * world, [0] * world
    block = MicroHyperparameters().block_size
    for group in groups:
        for rank, count, _, start, numel in fragments_of(group, stage, world):
            window, error = _windowed(start % block, numel)
            windows[rank] += count * window
            errors[rank] += count * error
    return OptimizerBytes("MicroAdam", tuple(windows), tuple(errors), compensation=rest)


@lru_cache(maxsize=2**16)
def _windowed(start: int, numel: int) -> tuple[int, int]:
    """Bytes of the window and of the error of a part of a parameter, by its place in a block."""
    h = MicroHyperparameters()
    fragment = ParamFragment("", (start + numel,), start, numel, 0)
    layout = ShardLayout.build([fragment], numel)
    window, error = new_stores(layout, h, torch.float32, "meta")
    return window.allocated_bytes, error.allocated_bytes


def peer_bytes(
    groups: Groups, stage: int, world: int, masters: str = "fp32"
) -> tuple[OptimizerBytes, ...]:
    """AdamW's, Adafactor's and AdamW8bit's state for the same tensors, on every rank the same.

    Their dense states are in the dtype of the weights that they update.
    """
    flats = [n for group in groups for n in flat_lengths(group, stage, world)]
    size = MASTERS[masters][0]
    dense = size * sum(flats)
    # torch.optim.Adafactor has no first moment, and row and column means of the last two
    # dimensions (torch/optim/_adafactor.py). Of a flat shard, a vector, it factors nothing.
    adafactor = dense
    if stage == 0:
        adafactor = sum(size * _adafactor_numel(shape) for group in groups for shape in group)
    eight = sum(_eight_bit_bytes(n, size) for n in flats)
    sizes = {"AdamW": (dense, dense), "Adafactor": (0, adafactor), "AdamW8bit": (eight, eight)}
    return tuple(
        OptimizerBytes(name, (first,) * world, (second,) * world)
        for name, (first, second) in sizes.items()
    )


def _adafactor_numel(shape: Shape) -> int:
    if len(shape) < 2:
        return math.prod(shape)
    return math.prod(shape[:-2]) * (shape[-2] + shape[-1])


def _eight_bit_bytes(numel: int, size: int) -> int:
    """Bytes of one moment of AdamW8bit.

    torchao leaves a tensor as it is whose length is no multiple of the block, as few shards' is.
    It is counted as if its last block were shorter, lest the peer be made to look larger.
    """
    if numel < _LEAST_8BIT:
        return size * numel
    return numel + FP32 * (-(-numel // _BLOCK_8BIT) + _TABLE_8BIT)


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
