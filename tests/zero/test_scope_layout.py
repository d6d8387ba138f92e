# SPDX-License-Identifier: Apache-2.0
"""Shares of matrices that are factored as one: where they lie, what they read, how they move."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapprox_ds.adapprox.factors import Factors, FactorStore
from adapprox_ds.adapprox.rank import RankPolicy
from adapprox_ds.adapprox.reshard import Piece, RankTarget, join, piece_of, reshard
from adapprox_ds.core.layout import Block, ParamFragment, ShardLayout

POLICY = RankPolicy(1, 4, 1, 0.9, 1e-3)
TARGET = RankTarget(POLICY, 4, "std")
CASES = st.tuples(st.integers(3, 14), st.integers(3, 14)).flatmap(
    lambda shape: st.tuples(
        st.just(shape), st.sets(st.integers(1, math.prod(shape) - 1), min_size=1, max_size=6)
    )
)


def shards(shape: tuple[int, int], edges: set[int], scope: str) -> list[ShardLayout]:
    """One a rank; something lies before and behind the parameter."""
    spans = pairwise([0, *sorted(edges), math.prod(shape)])
    return [
        ShardLayout.build([ParamFragment("w", shape, lo, hi - lo, 3)], hi - lo + 5, scope)
        for lo, hi in spans
    ]


def shares_of(whole: FactorStore, layouts: list[ShardLayout]) -> list[FactorStore]:
    """Each rank's store of a matrix in factors."""
    stores = []
    for layout in layouts:
        piece = reshard(whole, layout.fragments[0], TARGET)
        runs = tuple((offset, values.numel()) for offset, values in piece.runs)
        dense = torch.cat([values for _, values in piece.runs] or [torch.empty(0)])
        stores.append(FactorStore(layout.numel, list(piece.factors), runs, dense, "std"))
    return stores


def whole_matrix(shape: tuple[int, int], rank: int = 1) -> FactorStore:
    g = torch.Generator().manual_seed(shape[0] * 100 + shape[1])
    q, u = (torch.rand(n, rank, generator=g) - 0.1 for n in shape)
    block = Factors(Block(0, *shape), q, u, float(rank), 0.25)
    return FactorStore(math.prod(shape), [block], (), torch.empty(0), "std")


@given(case=CASES)
@settings(max_examples=200, deadline=None)
def test_tiles_cover_each_element_once_and_reads_are_right(
    case: tuple[tuple[int, int], set[int]],
) -> None:
    shape, edges = case
    whole = whole_matrix(shape)
    v = whole.read(0, math.prod(shape), torch.float32).view(shape)
    for layout, store in zip(
        shards(shape, edges, "matrix"),
        shares_of(whole, shards(shape, edges, "matrix")),
        strict=True,
    ):
        part = layout.fragments[0]
        block, span = part.block, part.fragment
        assert block is not None
        flat, expected = torch.zeros(layout.numel), v.reshape(-1)[span.start :][: span.numel]
        for tile in block.tiles:
            rows = slice(block.first_row + tile.row, block.first_row + tile.row + tile.rows)
            assert not tile.view(flat).any()
            tile.view(flat).copy_(v[rows, tile.col : tile.col + tile.cols])
        torch.testing.assert_close(flat[3:-2], expected)
        torch.testing.assert_close(store.read(3, layout.numel - 2, torch.float32), expected)
        lo, hi = 3 + span.numel // 3, 3 + -(-span.numel * 2 // 3)
        torch.testing.assert_close(store.read(lo, hi, torch.float32), expected[lo - 3 : hi - 3])


@given(case=CASES, more=st.sets(st.integers(1, 8), min_size=1, max_size=3))
@settings(max_examples=100, deadline=None)
def test_shares_move_to_any_partition_and_back_to_the_bit(
    case: tuple[tuple[int, int], set[int]], more: set[int]
) -> None:
    shape, edges = case
    before = whole_matrix(shape)
    for cuts in (edges, more):
        layouts = shards(shape, cuts, "matrix")
        stores = shares_of(before, layouts)
        payloads = [FactorStore.from_payload(store.to_payload()) for store in stores]
        pieces = [
            piece_of(store, layout.fragments[0].fragment)
            for store, layout in zip(payloads, layouts, strict=True)
        ]
        after = join(math.prod(shape), reversed(pieces), "std")
        (a,), (b,) = before.factors, after.factors
        assert torch.equal(a.q, b.q) and torch.equal(a.u, b.u)
        assert (a.block, a.rank, a.error) == (b.block, b.rank, b.error)
        before = after


@given(case=CASES)
@settings(max_examples=50, deadline=None)
def test_between_scopes(case: tuple[tuple[int, int], set[int]]) -> None:
    """What was one factorisation is the same in parts; parts of rank 1 fit into one of rank 4."""
    shape, edges = case
    whole = whole_matrix(shape)
    v = whole.read(0, math.prod(shape), torch.float32)
    layouts = shards(shape, edges, "partition")
    parts = shares_of(whole, layouts)
    read = torch.cat([s.read(3, s.numel - 2, torch.float32) for s in parts])
    torch.testing.assert_close(read, v)


def test_parts_become_one() -> None:
    shape, edges = (12, 9), {40}
    whole = whole_matrix(shape)
    layouts = shards(shape, edges, "partition")
    pieces = [
        piece_of(store, layout.fragments[0].fragment)
        for store, layout in zip(shares_of(whole, layouts), layouts, strict=True)
    ]
    joined = join(math.prod(shape), pieces, "std")
    stores = shares_of(joined, shards(shape, {17, 60}, "matrix"))
    read = torch.cat([s.read(3, s.numel - 2, torch.float32) for s in stores])
    expected = whole.read(0, math.prod(shape), torch.float32)
    torch.testing.assert_close(read, expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(s.factors[0].u, stores[0].factors[0].u) for s in stores)


def test_mixed_saves_are_refused() -> None:
    shape = (12, 9)
    layouts = shards(shape, {40}, "matrix")
    stores = shares_of(whole_matrix(shape), layouts)
    stores[1].factors[0].u = stores[1].factors[0].u + 1.0
    pieces: list[Piece] = [
        piece_of(store, layout.fragments[0].fragment)
        for store, layout in zip(stores, layouts, strict=True)
    ]
    with pytest.raises(ValueError, match="saves are mixed"):
        join(math.prod(shape), pieces, "std")
    with pytest.raises(ValueError, match="saved twice or not"):
        join(math.prod(shape), pieces[1:], "std")
