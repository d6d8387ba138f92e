# SPDX-License-Identifier: Apache-2.0
"""Pieces of a layout cover what ZeRO puts in a shard exactly once, as views, for any partition.

ZeRO's cutting is simulated element by element: a shard is a list that says, for each of its
elements, which element of which parameter it is, or that it is padding.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapprox_ds import Adapprox
from adapprox_ds.core.layout import (
    Block,
    DenseRun,
    ParamFragment,
    ShardLayout,
    gather_runs,
    matrix_shape,
    max_saving_rank,
)

Shape = tuple[int, ...]
#: (parameter, index in the flattened parameter), or None for padding.
Element = tuple[int, int] | None
Shard = list[Element]
#: Of the parameter ``i``'s element ``j`` a test shard holds ``i * CODE + j``.
CODE = 1_000_000

MATRICES = st.tuples(st.integers(1, 40), st.integers(1, 24))
ANY_SHAPES = st.lists(st.integers(0, 7), max_size=4).map(tuple)
SHAPES = st.lists(st.one_of(MATRICES, ANY_SHAPES), min_size=1, max_size=6)
WORLDS = st.integers(1, 5)
ALIGNMENTS = st.sampled_from([1, 2, 4, 8, 30])
RELAXED = settings(deadline=None, max_examples=80)


def elements(shapes: Sequence[Shape], parameter: int) -> Shard:
    return [(parameter, j) for j in range(math.prod(shapes[parameter]))]


def padded(shard: Shard, multiple: int) -> Shard:
    return shard + [None] * (-len(shard) % multiple)


def cut_flat_group(
    shapes: Sequence[Shape], order: Sequence[int], world: int, alignment: int
) -> list[Shard]:
    """ZeRO-1/2: parameters end to end, padded to a multiple of alignment x world, equal parts."""
    flat = padded(sum((elements(shapes, i) for i in order), []), alignment * world)
    size = len(flat) // world
    return [flat[rank * size : (rank + 1) * size] for rank in range(world)]


def cut_each_parameter(
    shapes: Sequence[Shape], order: Sequence[int], world: int, alignment: int
) -> list[Shard]:
    """ZeRO-3: each parameter padded and split evenly; a rank's slots lie end to end."""
    shards: list[Shard] = [[] for _ in range(world)]
    for i in order:
        for rank, slot in enumerate(cut_flat_group(shapes, [i], world, alignment)):
            shards[rank] += slot
    return shards


CUTS = {"zero12": cut_flat_group, "zero3": cut_each_parameter}


def fragments_of(shapes: Sequence[Shape], shard: Shard) -> list[ParamFragment]:
    """The maximal contiguous ranges of one parameter in a shard."""
    found = []
    for parameter, run in itertools.groupby(
        enumerate(shard), key=lambda item: None if item[1] is None else item[1][0]
    ):
        if parameter is not None:
            places = list(run)
            offset, first = places[0]
            assert first is not None
            start = first[1]
            found.append(
                ParamFragment(f"p{parameter}", shapes[parameter], start, len(places), offset)
            )
    return found


def splits_of(shape: Shape) -> list[tuple[int, int]]:
    return [(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape))]


@st.composite
def partitions(draw: st.DrawFn) -> tuple[list[Shape], list[Shard]]:
    """Parameters and the shards of all ranks."""
    shapes = draw(SHAPES)
    order = draw(st.permutations(range(len(shapes))))
    cut = CUTS[draw(st.sampled_from(sorted(CUTS)))]
    return shapes, cut(shapes, order, draw(WORLDS), draw(ALIGNMENTS))


def build(shapes: Sequence[Shape], shard: Shard) -> ShardLayout:
    # Backwards: the order in which fragments are given must not matter.
    return ShardLayout.build(reversed(fragments_of(shapes, shard)), len(shard))


@given(partitions())
@RELAXED
def test_every_element_exactly_once(partition: tuple[list[Shape], list[Shard]]) -> None:
    """Over all ranks; blocks are the right rows of the matrix, and all are views of the shard."""
    shapes, shards = partition
    covered: Counter[Element] = Counter()
    for shard in shards:
        layout = build(shapes, shard)
        codes = torch.tensor([-1 if e is None else e[0] * CODE + e[1] for e in shard])
        visits = torch.zeros(len(shard), dtype=torch.int64)
        for block in layout.blocks:
            parameter = int(block.name[1:])
            matrix = torch.arange(math.prod(shapes[parameter])).view(-1, block.cols)
            rows = matrix[block.first_row : block.first_row + block.rows]
            assert (block.rows, block.cols) == block.view(codes).shape
            assert torch.equal(block.view(codes), rows + parameter * CODE)
            block.view(visits).add_(1)
        for run in layout.runs:
            begin = int(run.name[1:]) * CODE + run.start
            assert run.view(codes).tolist() == list(range(begin, begin + run.numel))
            run.view(visits).add_(1)
        # Writes through the views arrived in the shard, once an element, never in padding.
        assert visits.tolist() == [int(e is not None) for e in shard]
        inside = sum(part.fragment.numel for part in layout.fragments)
        assert inside == int(visits.sum()) and layout.numel == len(shard)
        covered.update(e for e, n in zip(shard, visits.tolist(), strict=True) if n)
        runs = [e[0] * CODE + e[1] for e in shard_runs(layout, shard)]
        assert gather_runs(layout.runs, codes).tolist() == runs
    assert covered == Counter(sum((elements(shapes, i) for i in range(len(shapes))), []))


def shard_runs(layout: ShardLayout, shard: Shard) -> list[tuple[int, int]]:
    """The shard's elements that no block covers, padding left out."""
    in_block = {
        i for block in layout.blocks for i in range(block.offset, block.offset + block.numel)
    }
    return [e for i, e in enumerate(shard) if e is not None and i not in in_block]


@given(partitions())
@RELAXED
def test_views_share_the_shards_storage(partition: tuple[list[Shape], list[Shard]]) -> None:
    """A pattern written through each view stands at the view's offset in the shard."""
    shapes, shards = partition
    for shard in shards:
        layout = build(shapes, shard)
        flat = torch.full((len(shard),), torch.nan)
        pieces: list[Block | DenseRun] = [*layout.blocks, *layout.runs]
        for piece in pieces:
            view = piece.view(flat)
            assert view.is_contiguous()
            assert view.data_ptr() == flat.data_ptr() + piece.offset * flat.element_size()
            view.copy_(torch.arange(view.numel(), dtype=flat.dtype).view(view.shape) + piece.offset)
        expected = [float("nan") if e is None else float(i) for i, e in enumerate(shard)]
        torch.testing.assert_close(flat, torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


@given(partitions())
@RELAXED
def test_factored_where_it_saves_memory(partition: tuple[list[Shape], list[Shard]]) -> None:
    """A fragment's whole rows are one block if rank-1 factors are smaller; else all is dense."""
    shapes, shards = partition
    for shard in shards:
        for part in build(shapes, shard).fragments:
            f = part.fragment
            expected = []
            if len(f.shape) >= 2:
                cols = min(splits_of(f.shape), key=sum)[1]
                begins = range(0, math.prod(f.shape), cols)
                rows = [b for b in begins if f.start <= b and b + cols <= f.start + f.numel]
                if len(rows) + cols < len(rows) * cols:
                    expected = [(rows[0] // cols, len(rows), cols)]
            assert [(b.first_row, b.rows, b.cols) for b in (part.block,) if b] == expected
            for b in filter(None, (part.block,)):
                k, dense = b.rank_bound, b.rows * b.cols
                assert k >= 1
                assert k * (b.rows + b.cols) < dense <= (k + 1) * (b.rows + b.cols)
            assert len(part.runs) <= 2 and all(run.numel for run in part.runs)


@given(partitions(), st.data())
@RELAXED
def test_impossible_fragments_raise(
    partition: tuple[list[Shape], list[Shard]], data: st.DataObject
) -> None:
    """Overlap, or leaving the shard or the parameter, names a parameter that is involved."""
    shapes, shards = partition
    candidates = [(s, fragments_of(shapes, s)) for s in shards]
    candidates = [(s, fragments) for s, fragments in candidates if fragments]
    if not candidates:
        return
    shard, fragments = data.draw(st.sampled_from(candidates))
    at = data.draw(st.integers(0, len(fragments) - 1))
    bad = fragments[at]
    damage = data.draw(st.sampled_from(["twice", "beyond", "before", "negative", "outside"]))
    if damage == "twice":
        fragments.append(replace(bad, offset=bad.offset + data.draw(st.integers(0, bad.numel - 1))))
    elif damage == "beyond":
        offset = len(shard) - bad.numel + data.draw(st.integers(1, 5))
        fragments = [replace(bad, offset=offset)]
    elif damage == "before":
        fragments = [replace(bad, offset=-data.draw(st.integers(1, 5)))]
    elif damage == "negative":
        fragments[at] = replace(bad, start=-data.draw(st.integers(1, 5)))
    else:
        start = math.prod(bad.shape) - bad.numel + data.draw(st.integers(1, 5))
        fragments[at] = replace(bad, start=start)
    with pytest.raises(ValueError, match=r"fragment.* '?p\d+'?") as caught:
        ShardLayout.build(fragments, len(shard))
    if damage != "twice":  # there it may be the neighbour that is met first
        assert f"{bad.name!r}" in str(caught.value)


@given(ANY_SHAPES)
@settings(deadline=None, max_examples=300)
def test_matrix_shape_has_fewest_factor_elements(shape: Shape) -> None:
    """Against all splits: the smallest rows + cols, the earliest of equals."""
    if len(shape) < 2 or 0 in shape:
        assert matrix_shape(shape) is None
        return
    splits = splits_of(shape)
    fewest = min(rows + cols for rows, cols in splits)
    assert matrix_shape(shape) == next(s for s in splits if sum(s) == fewest)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((64, 32, 3, 3), (64, 288)),  # a convolution (o, i, h, w) -> (o, i h w)
        ((8, 1024, 512), (8192, 512)),  # experts (E, m, n) -> (E m, n), not (E, m n)
        ((4, 10, 100), (40, 100)),
        ((300, 2), (300, 2)),
        ((1, 8), (1, 8)),
        ((2, 3, 6), (6, 6)),
        ((2, 2, 2), (2, 4)),  # (4, 2) is as good: the earliest
        ((5,), None),
        ((), None),
        ((4, 0), None),
        ((0, 3, 3), None),
    ],
)
def test_matrix_shape_examples(shape: Shape, expected: tuple[int, int] | None) -> None:
    """Convolutions, stacked experts and shapes without a 2-D view."""
    assert matrix_shape(shape) == expected


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_max_saving_rank_is_tight(rows: int, cols: int) -> None:
    """The bound saves memory (or is 0), one more does not."""
    k = max_saving_rank(rows, cols)
    assert k == 0 or k * (rows + cols) < rows * cols
    assert (k + 1) * (rows + cols) >= rows * cols


@given(st.one_of(MATRICES, ANY_SHAPES))
@RELAXED
def test_whole_parameter(shape: Shape) -> None:
    """A parameter that is its own flat tensor has no padding and no cut rows."""
    layout = ShardLayout.of_parameter("p0", shape)
    assert layout == build([shape], elements([shape], 0))
    covered = sum(part.fragment.numel for part in layout.fragments)
    assert layout.numel == covered == math.prod(shape)
    view = matrix_shape(shape)
    factored = view is not None and max_saving_rank(*view) >= 1
    assert [(b.rows, b.cols) for b in layout.blocks] == ([view] if factored else [])
    assert [(r.start, r.numel) for r in layout.runs] == (
        [] if factored or not layout.numel else [(0, layout.numel)]
    )


def test_padding_only_shard() -> None:
    """A rank whose part is all padding has nothing to step."""
    layout = ShardLayout.build([], 12)
    assert (layout.numel, layout.fragments) == (12, ())
    assert not layout.blocks and not layout.runs
    assert gather_runs(layout.runs, torch.ones(12)).shape == (0,)


KNOBS = {"rank_init": 2, "rank_max": 4}


def stepped(shape: Shape, **knobs: Any) -> tuple[torch.nn.Parameter, Adapprox]:
    """A parameter of ones after one step."""
    p = torch.nn.Parameter(torch.ones(shape))
    p.grad = torch.linspace(-1, 2, p.numel()).view(shape)
    optimizer = Adapprox([p], **KNOBS | knobs)
    optimizer.step()
    return p, optimizer


def test_moment_of_another_layout_raises() -> None:
    """The same number of elements cut into other matrices; nothing is trained on it."""
    (ours, optimizer), (_, theirs) = stepped((24, 16)), stepped((16, 24))
    optimizer.load_state_dict(theirs.state_dict())
    before = ours.detach().clone()
    with pytest.raises(RuntimeError, match=r"another model.*universal checkpoint"):
        optimizer.step()
    assert torch.equal(ours, before)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("preset", [None, "paper"])
def test_dense_state_of_another_size_raises(key: str, preset: str | None) -> None:
    """Of another model: refused, as torch's own optimizers would, not silently cut to size."""
    p, optimizer = stepped((24, 16), preset=preset)
    before = p.detach().clone()
    optimizer.state[p][key] = torch.ones(40, 40)
    with pytest.raises((RuntimeError, ValueError)):
        optimizer.step()
    assert torch.equal(p, before)


def test_moment_of_another_domain_is_not_misread() -> None:
    """Factors of V where settings now ask for factors of its root: converted or refused."""
    p, optimizer = stepped((24, 16), preset="paper", rank_init=4)
    assert p.grad is not None
    expected = 0.999 * optimizer.state[p]["exp_avg_sq"].to_dense() + 0.001 * p.grad**2
    optimizer.param_groups[0].update(stepped((24, 16))[1].param_groups[0], params=[p])
    try:
        optimizer.step()
    except (RuntimeError, ValueError):
        return
    after = optimizer.state[p]["exp_avg_sq"].to_dense()
    assert (after - expected).norm() < 0.1 * expected.norm()
