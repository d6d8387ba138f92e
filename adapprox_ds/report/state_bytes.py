# SPDX-License-Identifier: Apache-2.0
"""Counts the bytes of optimizer state on each process, from the shapes of parameters.

Parameters are partitioned as by DeepSpeed 0.19 with its defaults (no round-robin order, no
``parameter_alignment``, one data-parallel group). The bytes of the resulting fragments are those of
the optimizers' own code, such as :func:`~adapprox_ds.core.layout.split_fragment` and
:class:`~adapprox_ds.adapprox.factors.FactorStore`. Step counters are not counted.
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
from adapprox_ds.zero.partition import START_ALIGNMENT, cut, slot_of

Shape = tuple[int, ...]
#: The shapes of each parameter group's parameters, in the order of the optimizer.
Groups = Sequence[Sequence[Shape]]

#: The bytes of an element in each form of the first moment, without the scales of codes. "none" is
#: that of beta_1 = 0.
FIRST_MOMENTS: Mapping[str, float] = {"fp32": 4, "bf16": 2, "int8": 1, "int4": 0.5, "none": 0}
#: The bytes of an element in each form of the weights that the optimizer updates, and those of its
#: compensation.
MASTERS: Mapping[str, tuple[int, int]] = {"fp32": (4, 0), "bf16": (2, 0), "compensated": (2, 1)}
#: The bytes of an fp32 number.
FP32 = 4
#: One of ``SCOPES``, and whether each process keeps only some rows of U.
Scope = tuple[str, bool]
PARTITION: Scope = ("partition", False)
#: Constants of torchao's AdamW8bit (torchao/optim/adam.py, subclass_8bit.py): the number of
#: elements that share an fp32 scale, the smallest number of elements of a tensor that is quantised,
#: and the number of entries of the fp32 table that each tensor has.
_BLOCK_8BIT, _LEAST_8BIT, _TABLE_8BIT = 256, 4096, 256


def first_moments(
    groups: Groups, stage: int, world: int, kind: str, scope: Scope = PARTITION
) -> tuple[int, ...]:
    """The bytes of Adapprox's first moment on each process, with the scales of codes.

    Args:
        groups: the shapes of the parameters.
        stage: the ZeRO stage.
        world: the number of processes.
        kind: the form, a key of ``FIRST_MOMENTS``.
        scope: what one factorisation spans.
    """
    elements = sum(n for group in groups for n in flat_lengths(group, stage, world))
    bits = CODE_BITS.get(kind)
    if bits is None:
        return (elements * int(FIRST_MOMENTS[kind]),) * world
    if stage == 0:
        return first_moments(groups, 3, 1, kind) * world
    # With 8 bits padding has codes, too.
    held = [elements if bits == 8 else 0] * world
    for group in groups:
        for process, count, shape, start, numel in fragments_of(group, stage, world):
            parts = _pieces(shape, start, numel, scope)
            spans = [*parts.tiles, *((1, run) for run in parts.runs)]
            size = FP32 * sum(rows * group_count(cols) for rows, cols in spans)
            if bits != 8:
                size += sum(rows * code_bytes(cols, bits) for rows, cols in spans)
            held[process] += count * size
    return tuple(held)


@dataclass(frozen=True, slots=True)
class OptimizerBytes:
    """The bytes of one optimizer's state.

    Attributes:
        name: the optimizer's name in reports.
        first: the bytes of the first moment on each process.
        second: the bytes of the second moment on each process.
        mean_rank: the mean rank k of the factored blocks of all processes, which is smaller than
            the largest rank where blocks have so few rows that larger ranks save no memory; NaN
            where nothing is factored.
        compensation: the bytes of the weights' compensation on each process.
    """

    name: str
    first: tuple[int, ...]
    second: tuple[int, ...]
    mean_rank: float = math.nan
    compensation: int = 0

    @property
    def state(self) -> tuple[int, ...]:
        """The bytes of the whole state on each process."""
        return tuple(
            a + b + self.compensation for a, b in zip(self.first, self.second, strict=True)
        )

    @property
    def largest(self) -> int:
        """The bytes on the process that has the most."""
        return max(self.state)

    @property
    def mean(self) -> float:
        """The mean bytes on a process."""
        return sum(self.state) / len(self.state)


def flat_lengths(group: Sequence[Shape], stage: int, world: int) -> list[int]:
    """The lengths of the tensors that a process steps for a group, with their padding."""
    sizes = [math.prod(shape) for shape in group]
    if stage == 0:
        return sizes
    if stage == 3:
        return [sum(slot_of(n, world) for n in sizes)]
    return [-(-sum(sizes) // (START_ALIGNMENT * world)) * START_ALIGNMENT]


def fragments_of(
    group: Sequence[Shape], stage: int, world: int
) -> Iterator[tuple[int, int, Shape, int, int]]:
    """Yield the fragments of a group's parameters on each process.

    Yields:
        The number of the process, the number of equal fragments that this one stands for, the shape
        of the parameter, the index in the flattened parameter of the fragment's first element, and
        the number of its elements.
    """
    if stage == 3:
        # Parameters of one shape are cut alike.
        for shape, count in Counter(group).items():
            numel = math.prod(shape)
            for process, start, held in cut(0, numel, slot_of(numel, world)):
                yield process, count, shape, start, held
        return
    (size,) = flat_lengths(group, stage, world)
    offset = 0
    for shape in group:
        numel = math.prod(shape)
        for process, start, held in cut(offset, numel, size):
            yield process, 1, shape, start, held
        offset += numel


class _Pieces(NamedTuple):
    """A fragment as blocks, their tiles as (rows, cols), and the lengths of its dense runs."""

    blocks: tuple[Block, ...]
    tiles: tuple[tuple[int, int], ...]
    runs: tuple[int, ...]


def _pieces(shape: Shape, start: int, numel: int, scope: Scope) -> _Pieces:
    """The pieces of the fragment of ``numel`` elements from ``start`` on."""
    view = matrix_shape(shape)
    if scope == PARTITION:
        # The pieces depend only on where in its row the fragment begins.
        start = start % view[1] if view else 0
    return _split(shape, start, numel, scope)


@lru_cache(maxsize=2**16)
def _split(shape: Shape, start: int, numel: int, scope: Scope) -> _Pieces:
    parts = split_fragment(ParamFragment("", shape, start, numel, 0), *scope)
    runs = tuple(run.numel for run in parts.runs)
    if (block := parts.block) is None:
        return _Pieces((), (), runs)
    # Attributes that do not matter for its size are left out, so that more blocks are equal.
    of_u = None if block.u_rows is None else (0, block.kept_u_rows)
    like = Block(0, block.rows, block.cols, matrix_rows=block.matrix_rows, u_rows=of_u)
    return _Pieces((like,), tuple((tile.rows, tile.cols) for tile in block.tiles), runs)


@lru_cache(maxsize=2**16)
def _factors(block: Block, rank: int, kept_in: str) -> tuple[int, int]:
    """The bytes of a block's factors at the largest rank that is allowed, and that rank."""
    h = Hyperparameters(rank_max=rank, factor_dtype=kept_in)
    store = FactorStore.zeros(
        block.rows * block.cols,
        [block],
        [],
        h.rank_init,
        h.rank_control,
        h.domain,
        dtype=torch.float32,
        factor_dtype=factor_dtype(torch.float32, h),
        device=torch.device("meta"),
    )
    return store.allocated_bytes, store.factors[0].q.shape[1]


def second_moments(
    groups: Groups, stage: int, world: int, rank: int, kept_in: str, scope: Scope = PARTITION
) -> tuple[tuple[int, ...], float]:
    """The bytes of Adapprox's second moment on each process, and the mean rank k of all blocks.

    Args:
        groups: the shapes of the parameters.
        stage: the ZeRO stage.
        world: the number of processes.
        rank: the largest rank.
        kept_in: the dtype of the factors, one of ``FACTOR_DTYPES``.
        scope: what one factorisation spans.
    """
    if stage == 0:
        # Every process has all parameters, as the only process of stage 3 does.
        (second,), mean_rank = second_moments(groups, 3, 1, rank, kept_in)
        return (second,) * world, mean_rank
    held = [0] * world
    blocks = ranks = 0
    for group in groups:
        for process, count, shape, start, numel in fragments_of(group, stage, world):
            parts = _pieces(shape, start, numel, scope)
            held[process] += count * FP32 * sum(parts.runs)
            for block in parts.blocks:
                size, k = _factors(block, rank, kept_in)
                held[process] += count * size
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
    """The bytes of Adapprox's state.

    Args:
        groups: the shapes of the parameters.
        stage: the ZeRO stage.
        world: the number of processes.
        rank: the rank of every matrix, unless only smaller ones save memory for its rows.
        first_moment: the form of the first moment, a key of ``FIRST_MOMENTS``.
        kept_in: the dtype of the factors, one of ``FACTOR_DTYPES``.
        scope: what one factorisation spans.
        masters: the form of the weights that the optimizer updates, a key of ``MASTERS``.
    """
    second, mean_rank = second_moments(groups, stage, world, rank, kept_in, scope)
    limited = f", {mean_rank:.1f} on average" if round(mean_rank, 1) < rank else ""
    name = f"Adapprox, k = {rank}{limited}"
    first = first_moments(groups, stage, world, first_moment, scope)
    lost = _compensations(groups, stage, world, masters)
    return OptimizerBytes(name, first, second, mean_rank, lost)


def _compensations(groups: Groups, stage: int, world: int, masters: str) -> int:
    """The bytes of the weights' compensations on each process."""
    return MASTERS[masters][1] * sum(n for g in groups for n in flat_lengths(g, stage, world))


def micro_adam_bytes(
    groups: Groups, stage: int, world: int, masters: str = "fp32"
) -> OptimizerBytes:
    """The bytes of MicroAdam's state with its defaults.

    The window, from which both moments are computed, counts as the first moment, and the error
    feedback as the second.
    """
    lost = _compensations(groups, stage, world, masters)
    if stage == 0:
        one = micro_adam_bytes(groups, 3, 1)
        sizes = (one.first * world, one.second * world)
        return OptimizerBytes("MicroAdam", *sizes, compensation=lost)
    windows, errors = [0] * world, [0] * world
    block = MicroHyperparameters().block_size
    for group in groups:
        for process, count, _, start, numel in fragments_of(group, stage, world):
            window, error = _windowed(start % block, numel)
            windows[process] += count * window
            errors[process] += count * error
    return OptimizerBytes("MicroAdam", tuple(windows), tuple(errors), compensation=lost)


@lru_cache(maxsize=2**16)
def _windowed(start: int, numel: int) -> tuple[int, int]:
    """The bytes of the window and of the error of a fragment.

    Args:
        start: the index in a block of the fragment's first element.
        numel: the number of its elements.
    """
    h = MicroHyperparameters()
    fragment = ParamFragment("", (start + numel,), start, numel, 0)
    layout = ShardLayout.build([fragment], numel)
    window, error = new_stores(layout, h, torch.float32, "meta")
    return window.allocated_bytes, error.allocated_bytes


def peer_bytes(
    groups: Groups, stage: int, world: int, masters: str = "fp32"
) -> tuple[OptimizerBytes, ...]:
    """The bytes of the states of AdamW, Adafactor and AdamW8bit for the same tensors.

    They are the same on every process. Dense states are in the dtype of the weights that the
    optimizer updates.
    """
    flats = [n for group in groups for n in flat_lengths(group, stage, world)]
    size = MASTERS[masters][0]
    dense = size * sum(flats)
    # torch.optim.Adafactor has no first moment, and keeps row and column means of the last two
    # dimensions (torch/optim/_adafactor.py). A flat shard is a vector, of which it factors nothing.
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
    """The bytes of one moment of AdamW8bit.

    torchao does not quantise a tensor whose length is no multiple of its block, as that of most
    shards. Here such a tensor is counted as quantised, with a shorter last block, so that the
    comparison is not to AdamW8bit's disadvantage.

    Args:
        numel: the number of elements of the tensor.
        size: the bytes of an element that is not quantised.
    """
    if numel < _LEAST_8BIT:
        return size * numel
    return numel + FP32 * (-(-numel // _BLOCK_8BIT) + _TABLE_8BIT)


def cut_parameters(groups: Groups, stage: int, world: int) -> Iterator[tuple[CutParameter, int]]:
    """Yield the parameters that ZeRO cuts, without names, and how many are cut alike.

    Args:
        groups: the shapes of the parameters.
        stage: the ZeRO stage: 1, 2 or 3.
        world: the number of processes.
    """

    def cut() -> Iterator[tuple[CutParameter, int]]:
        if len(spans) > 1:
            yield CutParameter("", shape, tuple(spans), tuple(holders)), count

    spans: list[tuple[int, int]] = []
    holders: list[int] = []
    shape: Shape = ()
    count = 0
    for group in groups:
        for process, alike, of, start, numel in fragments_of(group, stage, world):
            if start == 0:
                yield from cut()
                spans, holders, shape, count = [], [], of, alike
            spans.append((start, start + numel))
            holders.append(process)
    yield from cut()


def step_traffic(groups: Groups, stage: int, world: int, h: Hyperparameters) -> Traffic:
    """The traffic of a step for all cut parameters, in fp32; none with ``scope="partition"``."""
    if stage == 0 or h.scope == "partition":
        return Traffic(0, 0)
    found = [(traffic(p, world, h), n) for p, n in cut_parameters(groups, stage, world)]
    return Traffic(sum(t.summed * n for t, n in found), sum(t.exchanged * n for t, n in found))
